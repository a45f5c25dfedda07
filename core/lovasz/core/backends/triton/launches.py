"""Launches of kernels, whose arguments are found by name in the buffers of a batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lovasz.core.backends.triton.layout import Room


class Launch:
    """A launch of a kernel: its grid, its constants, and where its arguments are.

    ``compile`` compiles the kernel, once; later calls only fill in addresses and launch. That takes a tenth of the time
    in which Triton finds the compiled kernel by its arguments.
    """

    def __init__(self, kernel: Any, grid: int, warps: int, registers: int | None = None, **constants: Any) -> None:
        """Describes a launch; compiles nothing yet.

        Args:
            grid: the number of instances.
            registers: the most registers per thread; None for no limit.
        """
        self.kernel = kernel
        self.grid = (grid, 1, 1)
        # Without fused operations, all kernels compute the same errors.
        self.options = {"num_warps": warps, "enable_fp_fusion": False}
        if registers is not None:
            self.options["maxnreg"] = registers
        self.constants = constants
        self._run: Any = None
        self._arguments: list[Any] = []
        self._places: list[tuple[int, str, int]] = []

    def compile(self, rooms: dict[str, Room], numbers: dict[str, int | float], buffers: dict[str, Tensor]) -> None:
        """Compiles the kernel for these arguments, and launches it once."""
        names = self.kernel.arg_names
        named: dict[str, Any] = {
            name: _view(rooms[name], buffers) if name in rooms else numbers[name]
            for name in names
            if name not in self.constants
        }
        compiled = self.kernel[self.grid](**named, **self.constants, **self.options)
        if compiled is not None:  # It is None under the interpreter.
            self._arguments = [self.constants.get(name, numbers.get(name)) for name in names]
            self._places = [(i, rooms[n].buffer, rooms[n].offset) for i, n in enumerate(names) if n in rooms]
            self._run = compiled[self.grid]

    @property
    def is_compiled(self) -> bool:
        return self._run is not None

    def __call__(self, bases: dict[str, int], stream: int) -> None:
        """Launches the compiled kernel on a stream.

        Args:
            bases: the address of each buffer, by name.
        """
        arguments = self._arguments.copy()
        for place, buffer, offset in self._places:
            arguments[place] = bases[buffer] + offset
        self._run(*arguments, stream=stream)


def _view(room: Room, buffers: dict[str, Tensor]) -> Tensor:
    return buffers[room.buffer][room.offset : room.stop].view(room.dtype)
