"""Data-parallel training with the Lovász loss of the global batch, by a process group or by a server.

IoU is not a mean over images, and neither is its loss: the mean of the losses that the ranks compute for their own
images is a different loss, even more so if the ranks have different classes. With a joint loss, each rank gets its part
of the gradient of the loss of all logits. In a DistributedDataParallel training, it is one more argument:

    criterion = LocalLoss(loss, group="world")
    criterion = RemoteLoss(target, loss, joint=Joint.from_distributed("name of this training"))

On 1, 2 or 4 ranks; the second line needs a running server:

    torchrun --nproc-per-node 2 examples/ddp_digits.py --joint group
    torchrun --nproc-per-node 2 examples/ddp_digits.py --joint server --target localhost:50051

The images are those of segment_digits.py, but each quarter of them has only some of the digits, and each rank has one
or more quarters. compare_ddp.py shows that this equals the training of one process, and what happens with
``--joint none``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from digit_scenes import VOID, Digits, Scenes, batches, compose_scenes, split_digits
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector
from tqdm import tqdm
from unet import UNet

from lovasz.client import Joint, LovaszSoftmax, Result
from lovasz.client.torch import RemoteLoss
from lovasz.core import LocalLoss

LOSS = LovaszSoftmax(ignore_index=VOID)  # or a sum: [(1.0, CrossEntropy(ignore_index=VOID)), (1.0, LovaszSoftmax(...))]
DIGITS_HELD = ((0, 1, 2), (3, 4), (5, 6, 7), (8, 9))  # Of each quarter of the data.
CANVASES = 100  # In each quarter.
GROUPS = 8
STEPS = 50
LEARNING_RATE = 0.2


# --- The training -------------------------------------------------------------------------------------------------


def main() -> None:
    args = parse_arguments()
    prepare(args.float64)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    run = train_rank(args)
    if distributed.get_rank() == 0 and args.save:
        torch.save(asdict(run), args.save)
    # train_rank() has freed the model: with PyTorch 2.13 and gloo, a model that outlives its process group may hang.
    distributed.destroy_process_group()


def train_rank(args: argparse.Namespace) -> Run:
    model = DistributedDataParallel(new_model())
    criterion: Criterion
    if args.joint == "group":
        criterion = LocalLoss(LOSS, group="world")
    elif args.joint == "server":
        criterion = RemoteLoss(args.target, LOSS, joint=Joint.from_distributed("ddp-digits"))
    else:
        criterion = OwnLoss()
    return train(model, criterion, loader(distributed.get_rank(), distributed.get_world_size(), args.steps))


def train(model: nn.Module, criterion: Criterion, loader: Iterable[tuple[Tensor, Tensor]]) -> Run:
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    run = Run()
    for images, labels in loader:
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        run.note(model, criterion.result)
        optimizer.step()
    run.weights = parameters_to_vector(model.parameters()).detach()
    return run


def prepare(float64: bool) -> None:
    """One thread and only deterministic algorithms, so that runs can be compared; in float64 more closely."""
    torch.set_default_dtype(torch.float64 if float64 else torch.float32)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def new_model() -> nn.Module:
    """The U-Net with its first weights, the same in every process."""
    torch.manual_seed(0)
    return with_group_norm(UNet(widths=(16, 32, 64)))


def with_group_norm(module: nn.Module, groups: int = GROUPS) -> nn.Module:
    """Replaces each batch norm by a group norm: a batch norm would see the images of one rank only."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(groups, child.num_features))
        else:
            with_group_norm(child, groups)
    return module


class OwnLoss(nn.Module):
    """A training without a joint loss: each rank has the loss of its own images, and the gradients are averaged.

    Attributes:
        result: the loss of the global batch, to compare with; the training does not use it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.own = LocalLoss(LOSS)
        self.all = LocalLoss(LOSS, group="world")
        self.result: Result[Any] | None = None

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            self.all(logits, labels)
        self.result = self.all.result
        loss: Tensor = self.own(logits, labels)
        return loss


Criterion: TypeAlias = RemoteLoss | LocalLoss | OwnLoss


@dataclass
class Run:
    """What is kept of a training: the loss of the global batch at each step, the first gradient, the last weights."""

    losses: list[float] = field(default_factory=list)
    first_gradient: Tensor = field(default_factory=lambda: torch.empty(0))
    weights: Tensor = field(default_factory=lambda: torch.empty(0))

    def note(self, model: nn.Module, result: Result[Any] | None) -> None:
        assert result is not None
        if not self.losses:
            self.first_gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        self.losses.append(result.loss)


# --- Its data -----------------------------------------------------------------------------------------------------


def loader(rank: int, world_size: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one rank. Those of all ranks together are the same for any number of ranks."""
    if len(DIGITS_HELD) % world_size:
        raise ValueError(f"the data come in {len(DIGITS_HELD)} quarters; got {world_size} ranks; expected 1, 2 or 4")
    digits, _ = split_digits(seed=0)
    share = len(DIGITS_HELD) // world_size
    quarters = range(rank * share, (rank + 1) * share)
    streams = [
        batches(compose_quarter(digits, quarter, CANVASES, quarter), steps, seed=quarter) for quarter in quarters
    ]
    progress = tqdm(zip(*streams, strict=True), total=steps, unit="step", leave=False, disable=True if rank else None)
    for parts in progress:
        images, labels = zip(*parts, strict=True)
        yield torch.cat(images).to(torch.get_default_dtype()), torch.cat(labels)


def compose_quarter(digits: Digits, quarter: int, count: int, seed: int) -> Scenes:
    """Canvases with some digits only: ``compose_scenes`` draws ten, so it gets these few under ten numbers."""
    held = DIGITS_HELD[quarter]
    true = np.array([held[number % len(held)] for number in range(10)])
    bitmaps = [digits.bitmaps[digits.values == value] for value in true]
    numbered = Digits(np.concatenate(bitmaps), np.repeat(np.arange(10), [len(some) for some in bitmaps]))
    scenes = compose_scenes(numbered, count, seed)
    label = torch.arange(256)
    label[1:11] = torch.from_numpy(true) + 1
    return Scenes(scenes.images, label[scenes.labels])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--joint",
        choices=["group", "server", "none"],
        default="group",
        help="who computes the loss of all images: the ranks themselves (group, the default), a server, or nobody, and "
        "each rank has the loss of its own images (none)",
    )
    parser.add_argument("--target", metavar="HOST:PORT", help="a running loss server, for --joint server")
    parser.add_argument("--steps", type=int, default=STEPS, help="(%(default)s)")
    parser.add_argument(
        "--float64", action="store_true", help="compute in float64, so that rounding hides no difference between runs"
    )
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="write losses, first gradient and weights to this file"
    )
    args = parser.parse_args()
    if (args.joint == "server") != (args.target is not None):
        parser.error("--target: expected with --joint server, and only then")
    return args


if __name__ == "__main__":
    main()
