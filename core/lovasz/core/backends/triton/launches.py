"""Launches of kernels: arguments by name, found in the buffers of a batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lovasz.core.backends.triton.layout import Room


class Launch:
    """A kernel, its grid and its constants. The first call compiles it; later ones only fill addresses in and launch:
    a tenth of the time that finding the compiled kernel by its arguments would take."""

    def __init__(self, kernel: Any, grid: int, warps: int, registers: int | None = None, **constants: Any) -> None:
        """Nothing is compiled yet.

        Args:
            registers: the most that a thread may take; None for no limit.
        """
        self.kernel = kernel
        self.grid = (grid, 1, 1)
        # Without the fusion of operations all kernels compute the same errors.
        self.options = {"num_warps": warps, "enable_fp_fusion": False}
        if registers is not None:
            self.options["maxnreg"] = registers
        self.constants = constants
        self._compiled: Any = None
        self._arguments: list[Any] = []
        self._places: list[tuple[int, str, int]] = []

    def compile(self, rooms: dict[str, Room], numbers: dict[str, int | float], buffers: dict[str, Tensor]) -> None:
        """Launches it, too."""
        names = self.kernel.arg_names
        named: dict[str, Any] = {
            name: _view(rooms[name], buffers) if name in rooms else numbers[name]
            for name in names
            if name not in self.constants
        }
        compiled = self.kernel[self.grid](**named, **self.constants, **self.options)
        if compiled is not None:  # as it is under the interpreter
            self._arguments = [self.constants.get(name, numbers.get(name)) for name in names]
            self._places = [(i, rooms[n].buffer, rooms[n].offset) for i, n in enumerate(names) if n in rooms]
            self._compiled = compiled

    @property
    def is_compiled(self) -> bool:
        return self._compiled is not None

    def __call__(self, bases: dict[str, int], stream: int) -> None:
        """Launches it on a stream.

        Args:
            bases: the address of each buffer.
        """
        arguments = self._arguments.copy()
        for place, buffer, offset in self._places:
            arguments[place] = bases[buffer] + offset
        self._compiled[self.grid](*arguments, stream=stream)


def _view(room: Room, buffers: dict[str, Tensor]) -> Tensor:
    return buffers[room.buffer][room.offset : room.stop].view(room.dtype)
