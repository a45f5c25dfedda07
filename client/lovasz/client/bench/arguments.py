"""The arguments of ``lovasz bench``: the options, their checks, and the settings that they make."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lovasz import spec, wire
from lovasz.client import number_arguments
from lovasz.client.access import Access
from lovasz.client.bench.load import DEFAULT_DURATION_SECONDS, DEFAULT_WARMUP_SECONDS
from lovasz.client.bench.text import choice_text, shape_text
from lovasz.client.bench.workload import Workload, loss_for
from lovasz.client.options import DEFAULT_TIMEOUT_SECONDS, TRANSPORTS, Transport
from lovasz.client.tensors import HOST

DEFAULT_SHAPE = (1, 19, 512, 1024)
DEFAULT_DTYPE = "float32"
DEFAULT_TRANSPORT = "auto"
DEFAULT_LOSS = "lovasz_softmax"
MAX_CONCURRENCY = 1024

_EPILOG = """\
Runs every combination of shape, dtype, transport and concurrency, one after another. To give several values, list them
after one option or repeat the option; TARGET comes first. Latency is the time that the caller waits. The server's
receive, queue, compute and copy are medians of what it reports; "other" is the client's median minus these: encoding,
transport, decoding. MiB/s counts the tensors of answered requests in both directions. "batch" is how many requests
shared a batch."""


@dataclass(frozen=True)
class Settings:
    """What ``lovasz bench`` was told to do.

    Attributes:
        loss: the kind of the loss.
        workloads: the combinations, in the order in which they run.
        device: where the tensors are, as torch names it.
        json: the file for all figures; None: none.
        plot: the file for the plot; None: none.
        access: TLS and token.
    """

    target: str
    loss: str
    want_grad: bool
    workloads: tuple[Workload, ...]
    duration_seconds: float
    warmup_seconds: float
    timeout_seconds: float
    device: str
    json: Path | None
    plot: Path | None
    access: Access

    @classmethod
    def of(cls, parsed: argparse.Namespace) -> Settings:
        """The settings from parsed arguments.

        Raises:
            InvalidInput: a shape does not fit the loss.
        """
        combinations = itertools.product(
            parsed.shape or [DEFAULT_SHAPE],
            parsed.dtype or [_dtype(DEFAULT_DTYPE)],
            parsed.transport or [Transport(DEFAULT_TRANSPORT)],
            parsed.concurrency or [1],
        )
        want_grad = not parsed.no_grad
        return cls(
            target=parsed.target,
            loss=parsed.loss,
            want_grad=want_grad,
            workloads=tuple(
                Workload(shape, loss_for(parsed.loss, shape), dtype, transport, concurrency, want_grad)
                for shape, dtype, transport, concurrency in combinations
            ),
            duration_seconds=parsed.duration,
            warmup_seconds=parsed.warmup,
            timeout_seconds=parsed.timeout,
            device=parsed.device,
            json=parsed.json,
            plot=parsed.plot,
            access=parsed.access,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Makes it the parser of ``lovasz bench``."""
    parser.usage = "lovasz bench TARGET [options]"
    parser.description = "Measures how many losses a server computes per second, and where the time goes."
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter

    def several(option: str, parse: Callable[[str], Any], metavar: str, text: str) -> None:
        parser.add_argument(option, type=parse, nargs="+", action="extend", metavar=metavar, help=text)

    parser.add_argument("target", metavar="TARGET", help="HOST:PORT, unix:/path, or inprocess (no server)")
    several("--shape", _shape, "NxCxSIZES", f"shape of the logits (default: {shape_text(DEFAULT_SHAPE)})")
    several(
        "--dtype",
        _dtype,
        "DTYPE",
        f"the dtype of logits and gradient: {choice_text(wire.FLOATS)} (default: {DEFAULT_DTYPE})",
    )
    several("--transport", _transport, "KIND", f"{choice_text(TRANSPORTS)} (default: {DEFAULT_TRANSPORT})")
    concurrency = number_arguments.whole_number(MAX_CONCURRENCY)
    several("--concurrency", concurrency, "N", "how many clients send at a time, each in its own thread (default: 1)")
    parser.add_argument(
        "--duration",
        type=number_arguments.seconds_above_zero,
        default=DEFAULT_DURATION_SECONDS,
        metavar="SECONDS",
        help=f"how long each combination is measured (default: {DEFAULT_DURATION_SECONDS:g})",
    )
    parser.add_argument(
        "--warmup",
        type=number_arguments.seconds,
        default=DEFAULT_WARMUP_SECONDS,
        metavar="SECONDS",
        help="how long each combination runs before it is measured "
        f"(default: {DEFAULT_WARMUP_SECONDS:g}; even with 0, one request is sent)",
    )
    parser.add_argument(
        "--loss",
        type=_loss,
        default=DEFAULT_LOSS,
        metavar="LOSS",
        help=f"{choice_text(spec.LOSS_KINDS)} (default: {DEFAULT_LOSS})",
    )
    parser.add_argument(
        "--no-grad", action="store_true", help="request only the loss, without its gradient, as in validation"
    )
    parser.add_argument(
        "--timeout",
        type=number_arguments.seconds_above_zero,
        default=DEFAULT_TIMEOUT_SECONDS,
        metavar="SECONDS",
        help=f"the timeout of each call (default: {DEFAULT_TIMEOUT_SECONDS:g})",
    )
    parser.add_argument(
        "--device",
        default=HOST,
        metavar="DEVICE",
        help="where the tensors are, such as cuda (needs torch); default: cpu",
    )
    parser.add_argument("--json", type=_new_file, metavar="FILE", help="also write all figures to this file")
    parser.add_argument(
        "--plot", type=_new_file, metavar="FILE.png", help="draw the figures into this file (needs matplotlib)"
    )


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if len(sizes) < 2 or not all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected N x C x sizes such as {shape_text(DEFAULT_SHAPE)}")
    return tuple(int(size) for size in sizes)


def _dtype(text: str) -> wire.DType:
    return wire.dtype_named(_one_of(wire.FLOATS, text))


def _transport(text: str) -> Transport:
    return Transport(_one_of(TRANSPORTS, text))


def _loss(text: str) -> str:
    return _one_of(spec.LOSS_KINDS, text)


def _one_of(names: Sequence[str], text: str) -> str:
    if text not in names:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected {choice_text(names)}")
    return text


def _new_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a file in a directory that exists")
    return path
