"""The Python snippets of README.md and usage.md run, and do what the pages say about them.

Those of trainers.md need the frameworks: ``tests/trainers`` runs them. Here only their criterion is made.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import recipes
from support.imports import REPOSITORY
from support.snippets import Snippet, snippets_of
from torch import Tensor, distributed, nn

from lovasz.client.torch import RemoteLoss
from lovasz.core import DatasetIoU, LocalLoss, LovaszSoftmax, compute
from lovasz.server.launch import ServerProcess

USAGE = snippets_of(REPOSITORY / "docs" / "usage.md")
CLASSES, VOID = 4, 255
Names = dict[str, Any]


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of one rank."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def batches(count: int, labels_of: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(count)
    images = [torch.randn(2, 3, 12, 10, generator=random) for _ in range(count)]
    return [(one, labels_of(one)) for one in images]


def class_numbers(images: Tensor) -> Tensor:
    return images.sum(1).abs().long().clamp(max=CLASSES - 1)


def with_void(images: Tensor) -> Tensor:
    labels = class_numbers(images)
    labels[:, 0] = VOID
    return labels


def masks(images: Tensor) -> Tensor:
    labels = (images[:, :1] > 0.5).long()
    labels[:, :, 0] = VOID
    return labels


def several_masks(images: Tensor) -> Tensor:
    return (images > 0.5).long()


README = "README"
LABELS = {
    "One binary label": (1, masks),
    "Several binary labels": (3, several_masks),
    README: (CLASSES, class_numbers),
}
"""Channels of the model and labels of a section; elsewhere they are classes, with void pixels."""


def names_for(heading: str) -> Names:
    """What a page supposes to be there: a model, its optimizer and its data."""
    torch.manual_seed(0)
    channels, labels_of = LABELS.get(heading, (CLASSES, with_void))
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, channels, 1))
    loader = batches(8, labels_of)
    return {
        "torch": torch,
        "device": torch.device("cpu"),
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": loader,
        "validation_loader": batches(3, labels_of),
        "images": loader[0][0],
        "labels": loader[0][1],
    }


def run(snippet: Snippet, names: Names, server: ServerProcess) -> None:
    """Runs a snippet; the server that it names is ours."""
    target = "localhost:50051"
    (snippet.changed(target, server.target) if target in snippet.code else snippet).run(names)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Of torch's compiler.
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("snippet", USAGE, ids=str)
def test_a_snippet_on_usage_runs_by_itself(snippet: Snippet, server: ServerProcess) -> None:
    if "torch.compile" in snippet.code and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    names = names_for(snippet.heading)
    weights = copy.deepcopy(names["model"].state_dict())
    run(snippet, names, server)
    changed = any(not torch.equal(value, weights[key]) for key, value in names["model"].state_dict().items())
    assert changed == ("optimizer.step()" in snippet.code or "scaler.step(optimizer)" in snippet.code)
    if "criterion" in names and not changed:
        names["criterion"](names["model"](names["images"]), names["labels"]).backward()


@pytest.mark.usefixtures("process_group")
def test_the_snippets_of_the_readme_run_one_after_the_other(server: ServerProcess) -> None:
    names = names_for(README)
    names |= {"logits": names["model"](names["images"]).detach(), "DistributedDataParallel": nn.Identity}
    snippets = snippets_of(REPOSITORY / "README.md")
    assert len(snippets) > 3
    for snippet in snippets:
        run(snippet, names, server)
    assert names["result"].grad.shape == names["logits"].shape


def the_snippet(heading: str, number: int = 0) -> Snippet:
    (found,) = (one for one in USAGE if (one.heading, one.number) == (heading, number))
    return found


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("number", [0, 2])
def test_the_iou_of_the_page_is_that_of_all_images_in_one_request(number: int) -> None:
    snippet = the_snippet("IoU of a data set", number)
    names = names_for(snippet.heading)
    snippet.run(names)
    images, labels = (torch.cat(parts) for parts in zip(*names["validation_loader"], strict=True))
    with torch.no_grad():
        whole = compute(names["model"](images), labels, LovaszSoftmax(ignore_index=VOID), want_grad=False)
    assert isinstance(names["iou"], DatasetIoU)
    assert names["iou"].mean_iou == whole.mean_iou


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_two_forward_passes_give_the_gradient_of_the_whole_batch() -> None:
    snippet = the_snippet("Gradient accumulation", 1)
    names = names_for(snippet.heading)
    expected = copy.deepcopy(names["model"])
    snippet.run(names)
    images, labels = (torch.cat(parts) for parts in zip(*names["loader"][:4], strict=True))
    logits = expected(images)
    logits.backward(compute(logits.detach(), labels, LovaszSoftmax(ignore_index=VOID)).grad)
    assert torch.allclose(gradients(names["model"]), gradients(expected), rtol=1e-4, atol=1e-7)


def test_checkpointed_activations_change_no_bit() -> None:
    snippet = the_snippet("Activation checkpointing")
    plain = snippet.changed("checkpoint(model, images, use_reentrant=False)", "model(images)")
    with_it, without = names_for(snippet.heading), names_for(snippet.heading)
    snippet.run(with_it)
    plain.run(without)
    assert torch.equal(gradients(with_it["model"]), gradients(without["model"]))


def test_the_ways_to_create_the_criterion_of_trainers_md(process_group: None, server: ServerProcess) -> None:
    assert len(recipes.sections()["The criterion"]) == len(recipes.CRITERIA)
    labels = recipes.batch()[1]
    logits = torch.randn(recipes.IMAGES, recipes.CLASSES, *labels.shape[1:])
    losses = {}
    for way in recipes.CRITERIA:
        criterion = recipes.criterion(way, server.target)["criterion"]
        losses[way] = float(criterion(logits, labels))
        assert isinstance(criterion, RemoteLoss if "server" in way else LocalLoss)
        joins_ranks = criterion.joint is not None if "server" in way else criterion.group is not None
        assert joins_ranks == ("group" in way or "all ranks" in way)
    assert max(losses.values()) - min(losses.values()) < 1e-6
