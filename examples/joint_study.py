"""Does the joint loss train a better network than each rank's own loss? Trains with both, and compares their IoU.

Four ranks train the network of ddp_digits.py on the scenes of digit_scenes.py: with the loss of all images (joint),
with the mean of the ranks' own losses, or with the mean of the joint losses of micro-batches. A rank is not a process
here: one process has the images of all ranks and takes the mean of the losses of their parts. That is the same: the
network has no batch norm, so an image has no influence on another but by the loss, and the joint loss of ranks has the
bits of one process. So "own losses" with one image a rank are also the accumulation of micro-batches of one image.

    python examples/joint_study.py                    # twenty minutes on one core, half of it on two
    python examples/joint_study.py --long             # two images a rank as well: fifty minutes on one core
    python examples/joint_study.py --json study.json  # keeps each training; does not repeat those that are there

All trainings of a seed begin with the same weights and see the same images in the same order, so the differences
between them are taken seed by seed. docs/joint.md has the results.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ddp_digits import DIGITS_HELD, compose_quarter, with_group_norm
from digit_scenes import CLASS_NAMES, CLASSES, VOID, Scenes, compose_scenes, split_digits
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student
from torch import Tensor
from training import evaluate
from unet import UNet

from lovasz.core import CrossEntropy, LocalLoss, LovaszSoftmax

RANKS = len(DIGITS_HELD)
CE, LOVASZ = CrossEntropy(ignore_index=VOID), LovaszSoftmax(ignore_index=VOID)
LOSSES = {
    "cross-entropy": LocalLoss(CE),
    "cross-entropy + Lovász": LocalLoss([(1.0, CE), (1.0, LOVASZ)]),
    "Lovász": LocalLoss(LOVASZ),
}
GROUPS = 16
PEAK_LEARNING_RATE = 1e-2
"""With these, the network learns faster than with those of the other examples, which have another norm or optimizer."""
RARE = [CLASS_NAMES.index(digit) for digit in "789"]
CONFIDENCE = 0.95


# --- What is trained ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Which images a rank gets.

    Attributes:
        images: of each rank in each step.
        by_rank: each rank has canvases of its own, with two or three of the digits; else any rank gets any canvas.
    """

    images: int
    by_rank: bool

    def __str__(self) -> str:
        data = "digits divided among the ranks" if self.by_rank else "all digits on all ranks"
        return f"{self.images} image{'s' if self.images > 1 else ''} a rank, {data}"

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the global batch that can have a loss of their own, as ``parts_of`` makes them."""
        return ("joint", "own losses") if self.images == 1 else ("joint", "own losses", "joint micro-batches")


@dataclass(frozen=True)
class Scale:
    """How much is trained."""

    settings: tuple[Setting, ...] = (Setting(1, False), Setting(1, True))
    seeds: int = 5
    steps: int = 1600
    train_canvases: int = 1000
    test_canvases: int = 300


LONG = Scale((*Scale().settings, Setting(2, False)))
QUICK = Scale((Setting(2, True),), seeds=2, steps=2, train_canvases=16, test_canvases=4)


@dataclass(frozen=True)
class Way:
    """A way to train: a loss, and the parts of the global batch that it is computed of."""

    loss: str
    parts: str

    def __str__(self) -> str:
        return self.loss if self.loss == "cross-entropy" else f"{self.loss}, {self.parts}"


def ways(setting: Setting) -> list[Way]:
    lovasz = [Way(loss, parts) for loss in LOSSES if loss != "cross-entropy" for parts in setting.parts]
    return [Way("cross-entropy", "joint"), *lovasz]


def parts_of(tensor: Tensor, parts: str, images: int) -> list[Tensor]:
    """The parts of a global batch, in which the images of a rank stand together. A micro-batch has one of each rank."""
    if parts == "joint":
        return [tensor]
    if parts == "own losses":
        return list(tensor.chunk(RANKS))
    return [tensor[number::images] for number in range(images)]


# --- A training ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """What is kept of a training.

    Attributes:
        class_iou: of each class over all pixels of the test set.
        image_iou: the mean IoU of an image, over the classes that it has or is said to have; their mean over images.
    """

    setting: str
    way: str
    seed: int
    steps: int
    class_iou: list[float]
    image_iou: float

    @property
    def scores(self) -> tuple[float, float, float]:
        """Mean IoU, mean IoU of the rare digits, mean IoU of an image."""
        return float(np.nanmean(self.class_iou)), float(np.mean([self.class_iou[c] for c in RARE])), self.image_iou


def trained(setting: Setting, way: Way, seed: int, scale: Scale) -> Trained:
    """Trains a network and scores it."""
    torch.set_num_threads(1)
    stores, test = data_of(setting, scale, seed)
    torch.manual_seed(seed)
    model = UNet(widths=(16, 32, 64))
    with_group_norm(model, GROUPS)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=PEAK_LEARNING_RATE, total_steps=scale.steps)
    criterion = LOSSES[way.loss]
    for images, labels in global_batches(stores, setting.images, scale.steps, seed):
        logits = model(images)
        divided = zip(*(parts_of(one, way.parts, setting.images) for one in (logits, labels)), strict=True)
        loss = torch.stack([criterion(*part) for part in divided]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    score = evaluate(model, test)
    return Trained(
        str(setting), str(way), seed, scale.steps, score.class_iou.tolist(), image_iou(score.predictions, test)
    )


def global_batches(stores: Sequence[Scenes], images: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The images and labels of all ranks, step by step."""
    generator = torch.Generator().manual_seed(seed)
    share = RANKS // len(stores) * images
    for _ in range(steps):
        chosen = [torch.randint(len(store.images), (share,), generator=generator) for store in stores]
        drawn = [(store.images[some], store.labels[some]) for store, some in zip(stores, chosen, strict=True)]
        yield torch.cat([pair[0] for pair in drawn]), torch.cat([pair[1] for pair in drawn])


@lru_cache(maxsize=1)
def data_of(setting: Setting, scale: Scale, seed: int) -> tuple[list[Scenes], Scenes]:
    """The canvases of each rank, or one element if all ranks draw from the same; the test canvases."""
    digits, others = split_digits(seed)
    test = compose_scenes(others, scale.test_canvases, seed=2 * seed + 1)
    if not setting.by_rank:
        return [compose_scenes(digits, scale.train_canvases, seed=2 * seed)], test
    count = scale.train_canvases // RANKS
    return [compose_quarter(digits, quarter, count, seed=RANKS * seed + quarter) for quarter in range(RANKS)], test


def image_iou(predictions: Tensor, scenes: Scenes) -> float:
    counts = scenes.labels != VOID
    ious = np.full((CLASSES, len(counts)), np.nan)
    for c in range(CLASSES):
        is_class, is_predicted = scenes.labels == c, (predictions == c) & counts
        union = (is_class | is_predicted).sum(dim=(1, 2)).double()
        ious[c] = ((is_class & is_predicted).sum(dim=(1, 2)) / union).numpy()  # NaN without such a pixel.
    return float(np.nanmean(ious, axis=0).mean())


# --- The report ---------------------------------------------------------------------------------------------------


def table_of(setting: Setting, found: Sequence[Trained]) -> str:
    """Mean and standard deviation of each way's scores, and the differences to its joint loss."""
    lines = [f"{setting}: {len({one.seed for one in found})} seeds, {found[0].steps} steps; mean ± standard deviation"]
    lines += [
        "",
        "| | mIoU | digits 7, 8, 9 | of an image | joint minus this: mIoU | of an image |",
        "|---|" + "---:|" * 5,
    ]
    for way in ways(setting):
        scores = scores_of(way, found)
        cells = [
            f"{mean:.3f} ± {spread:.3f}" for mean, spread in zip(scores.mean(0), scores.std(0, ddof=1), strict=True)
        ]
        if way.parts != "joint":
            apart = scores_of(Way(way.loss, "joint"), found) - scores
            cells += [difference(apart[:, 0]), difference(apart[:, 2])]
        else:
            cells += ["", ""]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def scores_of(way: Way, found: Sequence[Trained]) -> npt.NDArray[np.float64]:
    """The scores of all seeds, in their order: (seeds, 3)."""
    return np.array([one.scores for one in sorted(found, key=lambda one: one.seed) if one.way == str(way)])


def difference(apart: npt.NDArray[np.float64]) -> str:
    """The mean of paired differences, its confidence interval, and in how many pairs the difference is above 0."""
    mean, n = apart.mean(), len(apart)
    half = student.ppf(0.5 + CONFIDENCE / 2, n - 1) * apart.std(ddof=1) / math.sqrt(n)
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}], {(apart > 0).sum()} of {n}"


def draw(found: Sequence[Trained], settings: Sequence[Setting], path: Path) -> None:
    """Draws the mIoU of each training; a line joins the trainings of a seed with the same loss."""
    figure = Figure(figsize=(4.8 * len(settings), 4.2), layout="constrained")
    all_axes = figure.subplots(1, len(settings), squeeze=False, sharey=True)[0]
    for axes, setting in zip(all_axes, settings, strict=True):
        draw_setting(axes, setting, [one for one in found if one.setting == str(setting)])
    all_axes[0].set_ylabel("mIoU on the test set")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=72)


def draw_setting(axes: Axes, setting: Setting, found: Sequence[Trained]) -> None:
    every = ways(setting)
    colours = dict(zip(LOSSES, ("#8a8a8a", "#4178a4", "#d1602f"), strict=True))
    for loss, colour in colours.items():
        places = [place for place, way in enumerate(every) if way.loss == loss]
        scores = np.array([scores_of(every[place], found)[:, 0] for place in places])
        axes.plot(places, scores, "o-", color=colour, linewidth=0.7, markersize=4, alpha=0.6)
        axes.plot(places, scores.mean(1), "_", color="black", markersize=22, markeredgewidth=2)
    axes.set_xticks(range(len(every)))
    axes.set_xticklabels([str(way).replace(", ", "\n").replace(" + ", "\n+ ") for way in every], fontsize=8)
    axes.set_title(str(setting), fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


# --- The study ----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--long", action="store_true", help="two images a rank as well")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"how many; at least two ({Scale().seeds})")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to check that everything works")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings at the same time (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep each training here, and do not repeat it")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw joint_study.png into this folder")
    args = parser.parse_args()
    scale = QUICK if args.quick else LONG if args.long else Scale()
    scale = replace(scale, seeds=args.seeds or scale.seeds)
    found = kept(args.json, scale)
    done = {(one.setting, one.way, one.seed) for one in found}
    every = itertools.product(range(scale.seeds), scale.settings)
    missing = [(setting, way, seed) for seed, setting in every for way in ways(setting)]
    missing = [one for one in missing if (str(one[0]), str(one[1]), one[2]) not in done]
    # New processes, not forked ones: a fork would have none of the threads of torch.
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        for training in as_completed([pool.submit(trained, *one, scale) for one in missing]):
            one = training.result()
            found.append(one)
            print(f"seed {one.seed}, {one.setting}, {one.way}: mIoU {one.scores[0]:.3f}", flush=True)
            if args.json:
                keep(args.json, found)
    for setting in scale.settings:
        print(f"\n{table_of(setting, [one for one in found if one.setting == str(setting)])}")
    if args.plot:
        draw(found, scale.settings, args.plot / "joint_study.png")


def keep(path: Path, found: Sequence[Trained]) -> None:
    """Writes the trainings, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(found, key=lambda one: (one.setting, one.seed, one.way))
    path.write_text("[\n" + ",\n".join(json.dumps(asdict(one), ensure_ascii=False) for one in ordered) + "\n]\n")


def kept(path: Path | None, scale: Scale) -> list[Trained]:
    """The trainings of this scale in the file."""
    if path is None or not path.exists():
        return []
    every: list[dict[str, Any]] = json.loads(path.read_text())
    settings = [str(setting) for setting in scale.settings]
    found = [Trained(**one) for one in every]
    return [one for one in found if one.setting in settings and one.steps == scale.steps and one.seed < scale.seeds]


if __name__ == "__main__":
    main()
