"""Shows that data-parallel training with a joint loss equals that of one process, and what happens without it.

Runs the training of ddp_digits.py on all canvases of each batch in one process, then by torchrun on 2 and on 4 ranks,
with the joint loss (of a server, and of a process group) and with each rank's own loss, from the same weights. Starts a
loss server and stops it:

    python examples/compare_ddp.py --plot out    # three minutes on two CPU cores

All runs compute in float64 and use SGD. In float32, two runs that add the same numbers in a different order differ by
1e-4 to 1e-2 after 50 steps, which could hide a difference of the losses. With Adam, whose steps are as long where the
gradient is only rounding, one last bit becomes 1e-3. (To a server, the logits travel in float32 in any case.)

The ranks' own losses are a different loss, which may fall faster in its first 50 steps: the mean of a rank is over the
few classes that it has. The comparison shows whether ranks train as one process does, not which training is better.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import ddp_digits
import torch
from ddp_digits import LOSS, STEPS, Run
from matplotlib.figure import Figure
from torch.nn import functional

from lovasz.client.torch import RemoteLoss
from lovasz.server.launch import ServerProcess

STOP_SECONDS = 45.0  # torchrun itself gives its ranks 30.


NAMES = {"server": "joint loss", "group": "process group", "none": "own losses"}


@dataclass(frozen=True)
class Way:
    """One way to train on ranks: ``ddp_digits.py --joint``, which says where they get their loss, and their number."""

    joint: str
    ranks: int

    def __str__(self) -> str:
        return f"{NAMES[self.joint]}, {self.ranks} ranks"


# --- The trainings ------------------------------------------------------------------------------------------------


def train_alone(target: str, steps: int) -> Run:
    """Trains in one process, on all canvases of a batch in the order of the ranks that would have them."""
    ddp_digits.prepare(float64=True)
    return ddp_digits.train(ddp_digits.new_model(), RemoteLoss(target, LOSS), ddp_digits.loader(0, 1, steps))


def train_on_ranks(way: Way, target: str, steps: int, timeout: float) -> Run:
    """Trains on ranks by torchrun, which has ended with all ranks when this returns.

    Raises:
        SystemExit: a rank failed, or they took too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "run.pt"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command += ["--nproc-per-node", str(way.ranks), ddp_digits.__file__]
        command += ["--steps", str(steps), "--float64", "--save", str(saved)]
        command += ["--joint", way.joint, *(["--target", target] if way.joint == "server" else [])]
        # The loopback interface, also on a machine whose name has no address.
        environment = {"GLOO_SOCKET_IFNAME": "lo", **os.environ, "OMP_NUM_THREADS": "1"}
        # A session of its own: Ctrl-C reaches this process alone, which then stops torchrun, once.
        torchrun = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            status = torchrun.wait(timeout)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"{way}: took longer than {timeout:g} s (--timeout)") from None
        finally:
            stop(torchrun)
        if status != 0:
            raise SystemExit(f"{way}: torchrun ended with {status}; what the ranks said is above")
        return Run(**torch.load(saved))


def stop(torchrun: subprocess.Popen[bytes]) -> None:
    """Ends torchrun, which ends its ranks."""
    torchrun.terminate()
    try:
        torchrun.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        torchrun.kill()
        torchrun.wait()


# --- The report ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distance:
    """The difference to the training of one process, in the first gradient and in the last weights.

    a: weights of the ranks; b: weights of the one process.
    """

    one_minus_cosine: float
    largest: float  # max |a-b|
    largest_relative: float  # max |a-b| / max |b|, over all weights
    norm_relative: float  # |a-b| / |b|, over all weights
    loss: float  # of the global batch, at the last step


def distance(run: Run, alone: Run) -> Distance:
    # Half the squared chord of the angle: 1 minus a cosine of nearly 1 would be only rounding.
    a, b = (functional.normalize(gradient.double(), dim=0) for gradient in (run.first_gradient, alone.first_gradient))
    chord = (a - b).norm().item()
    apart, weights = run.weights - alone.weights, alone.weights
    largest = apart.abs().max().item()
    relative = largest / weights.abs().max().item()
    return Distance(chord**2 / 2, largest, relative, (apart.norm() / weights.norm()).item(), run.losses[-1])


def print_table(alone: Run, distances: dict[Way, Distance]) -> None:
    steps = f"weights after {len(alone.losses)} steps: a, one process: b"
    print(f"\n{'':23}{'first gradient':>16}   {steps:^37}   {'loss of the':>13}")
    print(f"{'':23}{'1 - cosine':>16}   {'max |a-b|':>11}{'/ max |b|':>12}{'|a-b| / |b|':>14}   {'global batch':>13}")
    print(f"  {'one process':<21}{'':56}   {alone.losses[-1]:>13.6f}")
    for way, d in distances.items():
        weights = f"{d.largest:>11.1e}{d.largest_relative:>12.1e}{d.norm_relative:>14.1e}"
        print(f"  {way!s:<21}{d.one_minus_cosine:>16.1e}   {weights}   {d.loss:>13.6f}")


def draw(alone: Run, runs: dict[Way, Run], folder: Path) -> Path:
    """Draws the loss of the global batch over the steps, and the difference of each run to the one process."""
    figure = Figure(figsize=(9.5, 4), layout="constrained")
    losses, apart = figure.subplots(1, 2)
    steps = range(1, len(alone.losses) + 1)
    losses.plot(steps, alone.losses, color="#bbbbbb", linewidth=5, label="one process")
    for way, run in runs.items():
        colour = {"server": "#2a6f97", "group": "#5a9367", "none": "#d1602f"}[way.joint]
        style = "--" if way.ranks == 2 else ":"
        losses.plot(steps, run.losses, style, color=colour, linewidth=1.4, label=str(way))
        # A logarithmic axis has no 0: runs that are equal to the bit are drawn on its lower edge.
        gaps = [max(abs(a - b), 1e-12) for a, b in zip(run.losses, alone.losses, strict=True)]
        apart.plot(steps, gaps, style, color=colour, linewidth=1.4)
    losses.set(xlabel="step", ylabel="Lovász-Softmax loss of the global batch")
    apart.set(xlabel="step", ylabel="|its difference from one process| (bottom: none)", yscale="log", ylim=(0.7e-12, 1))
    for axes in (losses, apart):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    losses.legend(frameon=False, fontsize=9)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "joint_digits.png"
    figure.savefig(path, dpi=72)
    return path


# --- The comparison -----------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="(%(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], choices=[2, 4], help="(2 4)")
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="SECONDS", help="for each training (%(default)g)"
    )
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw joint_digits.png into this folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of the table to this file")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # As Ctrl-C: ends what was started.
    started = time.perf_counter()
    ways = [Way(joint, ranks) for joint in NAMES for ranks in args.ranks]
    with ServerProcess(["--device", "cpu"]) as server:
        print(f"loss server at {server.target}; {args.steps} steps each\n  one process ...", flush=True)
        alone = train_alone(server.target, args.steps)
        runs = {}
        for way in ways:
            print(f"  {way} ...", flush=True)
            runs[way] = train_on_ranks(way, server.target, args.steps, args.timeout)
    distances = {way: distance(run, alone) for way, run in runs.items()}
    print_table(alone, distances)
    if args.json:
        args.json.write_text(json.dumps({str(way): asdict(distances[way]) for way in ways}, indent=2) + "\n")
    if args.plot:
        print(f"\ndrawn: {draw(alone, runs, args.plot)}")
    print(f"\nAll this took {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
