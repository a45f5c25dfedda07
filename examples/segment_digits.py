"""Trains one U-Net twice, with cross-entropy and with cross-entropy + Lovász-Softmax, and compares their IoU.

The images are composed of real handwritten digits (scikit-learn's 1,797 scans of 8x8 pixels): several a canvas, in many
sizes, among fragments of other digits and under noise. Background is class 0, digit d is class d + 1, and a thin border
round each digit is void: label 255, which neither the losses nor the scores count. Background dominates and some digits
are rarer than others, as in most real segmentation problems.

Both trainings start from the same weights and see the same images in the same order. The first takes its loss from
PyTorch; the second asks a loss server, which this script starts and stops (or name a running one with --target):

    python examples/segment_digits.py                            # two to three minutes on two CPU cores
    python examples/segment_digits.py --target localhost:50051   # with a server that is already there
"""

from __future__ import annotations

import argparse
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from prometheus_client.parser import text_string_to_metric_families
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from lovasz.client import CrossEntropy, LossClient, LovaszSoftmax
from lovasz.client.torch import RemoteLoss
from lovasz.server.launch import ServerProcess

CLASS_NAMES = ("background", *"0123456789")
CLASSES = len(CLASS_NAMES)
VOID = 255
CANVAS = 48  # pixels a side
BATCH = 4  # canvases
PEAK_LEARNING_RATE = 6e-3


@dataclass(frozen=True)
class Scale:
    """How much is composed and trained."""

    train_canvases: int = 2500
    test_canvases: int = 500
    steps: int = 1400


QUICK = Scale(train_canvases=64, test_canvases=32, steps=10)


# --- Data ---------------------------------------------------------------------------------------------------------

Bitmap = npt.NDArray[np.float32]
Place = tuple[slice, slice]


@dataclass(frozen=True)
class Digits:
    """Scans of handwritten digits: ``bitmaps`` (N, 8, 8) with ink in [0, 1], ``values`` (N,) from 0 to 9."""

    bitmaps: Bitmap
    values: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Scenes:
    """Segmentation data: ``images`` float32 (N, 1, H, W) and ``labels`` int64 (N, H, W)."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Scenes:
        return Scenes(self.images.to(device), self.labels.to(device))


def split_digits(seed: int) -> tuple[Digits, Digits]:
    """Digits to compose the training canvases of, and others for the test canvases."""
    bitmaps, values = load_digits(return_X_y=True)
    bitmaps = (bitmaps / 16).astype(np.float32).reshape(-1, 8, 8)
    train, test = train_test_split(np.arange(len(values)), test_size=0.3, stratify=values, random_state=seed)
    return Digits(bitmaps[train], values[train]), Digits(bitmaps[test], values[test])


def compose_scenes(digits: Digits, count: int, seed: int) -> Scenes:
    rng = np.random.default_rng(seed)
    images, labels = zip(*(compose_canvas(digits, rng) for _ in range(count)), strict=True)
    return Scenes(torch.from_numpy(np.stack(images)[:, None]), torch.from_numpy(np.stack(labels)))


def compose_canvas(digits: Digits, rng: np.random.Generator) -> tuple[Bitmap, npt.NDArray[np.int64]]:
    """One image (H, W) and its labels (H, W): uneven paper, fragments of digits, whole digits, and noise over all."""
    image = enlarge(rng.uniform(0.0, 0.4, (4, 4)).astype(np.float32), CANVAS)
    labels = np.zeros((CANVAS, CANVAS), np.int64)
    for _ in range(rng.integers(2, 5)):
        side = int(rng.integers(8, 17))
        draw(enlarge(random_fragment(digits, rng), side), image, random_place(side, rng), rng)  # stays background
    for _ in range(rng.integers(6, 12)):
        side = int(rng.integers(14, 25))
        place = random_place(side, rng)
        if (labels[place] != 0).mean() > 0.1:
            continue  # it would cover too much of another digit
        value = random_value(rng)
        ink = enlarge(rng.choice(digits.bitmaps[digits.values == value]), side)
        draw(ink, image, place, rng)
        labels[place] = np.where(ink > 0.5, value + 1, np.where(thicken(ink) > 0.5, VOID, labels[place]))
    image += rng.normal(0.0, 0.08, image.shape).astype(np.float32)
    return image, labels


def random_value(rng: np.random.Generator) -> int:
    """A digit from 0 to 9, each rarer than the one before: 0s are drawn two and a half times as often as 9s."""
    frequency = 0.9 ** np.arange(10)
    return int(rng.choice(10, p=frequency / frequency.sum()))


def random_fragment(digits: Digits, rng: np.random.Generator) -> Bitmap:
    """A quarter of some digit, with a margin that softens its cut edges."""
    top, left = rng.integers(0, 5, size=2)
    return np.pad(rng.choice(digits.bitmaps)[top : top + 4, left : left + 4], 1)


def random_place(side: int, rng: np.random.Generator) -> Place:
    top, left = rng.integers(0, CANVAS - side + 1, size=2)
    return slice(top, top + side), slice(left, left + side)


def draw(ink: Bitmap, image: Bitmap, place: Place, rng: np.random.Generator) -> None:
    """Draws on the image, in a random shade."""
    image[place] += ink * (rng.uniform(0.6, 1.0) - image[place])


def enlarge(bitmap: Bitmap, side: int) -> Bitmap:
    source = torch.from_numpy(bitmap)[None, None]
    enlarged: Bitmap = functional.interpolate(source, (side, side), mode="bilinear")[0, 0].numpy()
    return enlarged


def thicken(ink: Bitmap) -> Bitmap:
    """Grows the ink by one pixel to all sides."""
    thick: Bitmap = functional.max_pool2d(torch.from_numpy(ink)[None], kernel_size=3, stride=1, padding=1)[0].numpy()
    return thick


# --- Model --------------------------------------------------------------------------------------------------------


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def convolutions(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(convolution(inputs, outputs), convolution(outputs, outputs))


class UNet(nn.Module):
    """A small U-Net (Ronneberger et al., 2015): images (N, 1, H, W) to logits (N, CLASSES, H, W).

    It works at half the resolution, which loses little on digits enlarged from 8x8, and enlarges its logits.
    """

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96)) -> None:
        super().__init__()
        levels = list(pairwise(widths))
        self.stem = nn.Sequential(convolution(1, widths[0], stride=2), convolutions(widths[0], widths[0]))
        self.down = nn.ModuleList(convolutions(fine, coarse) for fine, coarse in levels)
        self.up = nn.ModuleList(convolutions(coarse + fine, fine) for fine, coarse in reversed(levels))
        self.head = nn.Conv2d(widths[0], CLASSES, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        features = [self.stem(images)]
        for block in self.down:
            features.append(block(functional.max_pool2d(features[-1], 2)))
        x = features.pop()
        for block in self.up:
            x = block(torch.cat([functional.interpolate(x, scale_factor=2.0), features.pop()], dim=1))
        return functional.interpolate(self.head(x), scale_factor=2.0, mode="bilinear")


# --- Training and evaluation --------------------------------------------------------------------------------------

Criterion = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Training:
    """A trained model, how long each step took, and how much of that was the call of its criterion."""

    name: str
    model: UNet
    step_seconds: list[float] = field(default_factory=list)
    loss_seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Score:
    """A model on the test set: its ``predictions`` (N, H, W), and each class's IoU over all pixels that count."""

    predictions: Tensor
    class_iou: npt.NDArray[np.float64]

    @property
    def mean_iou(self) -> float:
        return float(np.nanmean(self.class_iou))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, ignore_index=VOID)


def cross_entropy_and_lovasz(client: LossClient) -> RemoteLoss:
    """The sum of both losses, which the client's server computes in one call."""
    return RemoteLoss(client, [(1.0, CrossEntropy(ignore_index=VOID)), (1.0, LovaszSoftmax(ignore_index=VOID))])


def batches(scenes: Scenes, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(scenes.images), (BATCH,), generator=generator).to(scenes.images.device)
        yield scenes.images[chosen], scenes.labels[chosen]


def train(name: str, criterion: Criterion, scenes: Scenes, steps: int, seed: int) -> Training:
    """Trains a new U-Net. The seed fixes its first weights and its batches, whatever the criterion."""
    device = scenes.images.device
    torch.manual_seed(seed)
    model = UNet().to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=PEAK_LEARNING_RATE, total_steps=steps)
    training = Training(name, model)
    # disable=None: no bar where the output is not a terminal.
    progress = tqdm(batches(scenes, steps, seed), name, total=steps, unit="step", leave=False, disable=None)
    for images, labels in progress:
        started = now(device)
        logits = model(images)
        asked = now(device)
        loss = criterion(logits, labels)
        answered = now(device)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        training.loss_seconds.append(answered - asked)
        training.step_seconds.append(now(device) - started)
        progress.set_postfix(loss=f"{loss.item():.3f}")
    print(f"trained with {name}: {steps:,} steps in {sum(training.step_seconds):.0f} s", flush=True)
    return training


def now(device: torch.device) -> float:
    """The time in seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def evaluate(model: UNet, scenes: Scenes) -> Score:
    model.eval()
    predictions = torch.cat([model(images).argmax(dim=1) for images in torch.split(scenes.images, 50)])
    counts = scenes.labels != VOID
    pairs = scenes.labels[counts] * CLASSES + predictions[counts]
    confusion = pairs.bincount(minlength=CLASSES**2).reshape(CLASSES, CLASSES).double()
    intersection = confusion.diag()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - intersection
    return Score(predictions.cpu(), (intersection / union).cpu().numpy())


# --- The server and what it counts --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    target: str
    metrics_url: str | None


@contextmanager
def loss_server(target: str | None, metrics_url: str | None) -> Iterator[Server]:
    """The running server at ``target``, or else one of our own while the context lasts."""
    if target is not None:
        yield Server(target, metrics_url)
        return
    with ServerProcess(["--device", "auto"]) as own:
        yield Server(own.target, own.metrics_url)


@dataclass(frozen=True)
class Metrics:
    """A server's Prometheus metrics: the value of each sample by its name and its sorted labels."""

    samples: dict[tuple[str, tuple[tuple[str, str], ...]], float]

    @classmethod
    def scrape(cls, url: str) -> Metrics:
        with urllib.request.urlopen(url, timeout=10) as response:
            families = text_string_to_metric_families(response.read().decode())
            samples = [sample for family in families for sample in family.samples]
        return cls({(s.name, tuple(sorted(s.labels.items()))): s.value for s in samples})

    def since(self, earlier: Metrics) -> Metrics:
        return Metrics({key: value - earlier.samples.get(key, 0.0) for key, value in self.samples.items()})

    def labelled(self, name: str) -> list[tuple[dict[str, str], float]]:
        """The samples of this name that have counted something, each with its labels."""
        return [(dict(labels), value) for (n, labels), value in self.samples.items() if n == name and value]

    def total(self, name: str, **labels: str) -> float:
        return sum(value for found, value in self.labelled(name) if labels.items() <= found.items())


# --- The report ---------------------------------------------------------------------------------------------------


def print_scores(scenes: Scenes, baseline: Score, lovasz: Score) -> None:
    pixels = scenes.labels[scenes.labels != VOID].bincount(minlength=CLASSES).double()
    print("\nIoU on the test set   share of pixels   cross-entropy   + Lovász   difference")
    for name, share, a, b in zip(
        CLASS_NAMES, (pixels / pixels.sum()).tolist(), baseline.class_iou, lovasz.class_iou, strict=True
    ):
        print(f"  {name:<19} {share:>15.1%} {a:>15.3f} {b:>10.3f} {b - a:>+12.3f}")
    a, b = baseline.mean_iou, lovasz.mean_iou
    print(f"  {'mean (mIoU)':<19} {'':>15} {a:>15.3f} {b:>10.3f} {b - a:>+12.3f}")


def print_times(trainings: list[Training]) -> None:
    print("\nMilliseconds a step (the second loss is one remote call, which brings its gradient too)")
    print(f"{'':25}{'the whole step':>22}{'the loss alone':>24}")
    print(f"{'':25}{'median':>12}{'p90':>10}{'median':>14}{'p90':>10}")
    for training in trainings:
        step, step_p90 = 1000 * np.percentile(training.step_seconds, (50, 90))
        loss, loss_p90 = 1000 * np.percentile(training.loss_seconds, (50, 90))
        print(f"  {training.name:<23}{step:>12.1f}{step_p90:>10.1f}{loss:>14.1f}{loss_p90:>10.1f}")


def print_metrics(metrics: Metrics) -> None:
    print("\nWhat the server counted")
    for labels, requests in metrics.labelled("lovasz_requests_total"):
        print(f"  requests    {requests:,.0f} x {labels['method']} of {labels['loss']}: {labels['code']}")
    errors = metrics.total("lovasz_requests_total") - metrics.total("lovasz_requests_total", code="OK")
    print(f"  errors      {errors:,.0f}")
    batches, joined = metrics.total("lovasz_batch_requests_count"), metrics.total("lovasz_batch_requests_sum")
    print(f"  batches     {batches:,.0f}, with {joined / max(batches, 1):.2f} requests on average")
    print(f"  elements    {metrics.total('lovasz_elements_total'):,.0f} logits")
    phases = [f"{phase} {mean_milliseconds(metrics, phase):.2f}" for phase in ("receive", "queue", "compute", "send")]
    print(f"  a request   {', '.join(phases)} ms on average")


def mean_milliseconds(metrics: Metrics, phase: str) -> float:
    seconds = metrics.total("lovasz_phase_seconds_sum", phase=phase)
    return 1000 * seconds / max(metrics.total("lovasz_phase_seconds_count", phase=phase), 1)


BACKGROUND_COLOUR = "#f4f4f2"
DIGIT_COLOURS = (
    *("#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f"),
    *("#edc948", "#b07aa1", "#ff9da7", "#9c755f", "#2f3e6b"),
)
VOID_COLOUR = "#c4c4c4"


def draw_figure(scenes: Scenes, baseline: Score, lovasz: Score, path: Path, canvases: int = 6) -> None:
    """Saves the first test canvases, one a column: image, truth and both predictions."""
    scenes = scenes.to(torch.device("cpu"))
    colours = [BACKGROUND_COLOUR, *DIGIT_COLOURS, VOID_COLOUR]
    void = scenes.labels == VOID
    rows = {
        "image": scenes.images[:, 0],
        "truth": scenes.labels.masked_fill(void, CLASSES),
        "cross-entropy": baseline.predictions.masked_fill(void, CLASSES),
        "+ Lovász-Softmax": lovasz.predictions.masked_fill(void, CLASSES),
    }
    figure = Figure(figsize=(1.6 * canvases + 0.4, 7.1), layout="constrained")
    axes = figure.subplots(len(rows), canvases, squeeze=False)
    for row, (title, maps) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(title, fontsize=11)
        for axis, shown in zip(row, maps, strict=False):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_color(VOID_COLOUR)
            if shown.is_floating_point():
                axis.imshow(shown, cmap="gray", vmin=0.0, vmax=1.0)
            else:
                axis.imshow(shown, cmap=ListedColormap(colours), vmin=0, vmax=len(colours) - 1, interpolation="nearest")
    patches = [Patch(facecolor=colour, edgecolor=VOID_COLOUR) for colour in colours]
    names = [*CLASS_NAMES, "void (not counted)"]
    figure.legend(patches, names, loc="outside lower center", ncols=len(names), frameon=False, columnspacing=1.0)
    figure.suptitle(
        f"Test mIoU: {baseline.mean_iou:.3f} with cross-entropy, {lovasz.mean_iou:.3f} with Lovász-Softmax added"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


# --- The demo -----------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", metavar="HOST:PORT", help="a running server (default: start one)")
    parser.add_argument(
        "--metrics-url", metavar="URL", help="that server's metrics, such as http://localhost:9095/metrics"
    )
    parser.add_argument("--out", type=Path, default=Path("out/segment_digits.png"), help="the picture (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and batches (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that everything works")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    scale = QUICK if args.quick else Scale()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # more do not help so small a network, and they would be in the way of the server
    started = time.perf_counter()

    train_digits, test_digits = split_digits(args.seed)
    train_scenes = compose_scenes(train_digits, scale.train_canvases, seed=2 * args.seed).to(device)
    test_scenes = compose_scenes(test_digits, scale.test_canvases, seed=2 * args.seed + 1).to(device)
    print(f"{len(train_digits.values):,} digits on {scale.train_canvases:,} canvases to train with, ", end="")
    print(f"{len(test_digits.values):,} other digits on {scale.test_canvases:,} canvases to test with", flush=True)

    with loss_server(args.target, args.metrics_url) as server, LossClient(server.target) as client:
        there = client.server_info()
        print(f"loss server {there.version} at {server.target}, {there.devices[0].hardware}")
        print(f"U-Net on {device}, {scale.steps:,} steps of {BATCH} canvases each", flush=True)
        before = Metrics.scrape(server.metrics_url) if server.metrics_url else None
        baseline = train("cross-entropy", cross_entropy, train_scenes, scale.steps, args.seed)
        lovasz = train("cross-entropy + Lovász", cross_entropy_and_lovasz(client), train_scenes, scale.steps, args.seed)
        counted = Metrics.scrape(server.metrics_url).since(before) if server.metrics_url and before else None

    baseline_score, lovasz_score = (evaluate(training.model, test_scenes) for training in (baseline, lovasz))
    print_scores(test_scenes, baseline_score, lovasz_score)
    print_times([baseline, lovasz])
    if counted:
        print_metrics(counted)
    draw_figure(test_scenes, baseline_score, lovasz_score, args.out)
    print(f"\n{args.out} shows the first test canvases. All this took {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
