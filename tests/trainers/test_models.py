"""Libraries of models and their losses, with the lines of docs/trainers.md."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import recipes
from support.comparison import norm_error, reference_answer
from torch import Tensor
from torch.nn.functional import interpolate

from lovasz.client.torch import RemoteLoss
from lovasz.core import CrossEntropy, LocalLoss, LovaszHinge, LovaszSoftmax, reference
from lovasz.server.launch import ServerProcess
from lovasz.spec import LossLike

pytestmark = pytest.mark.filterwarnings("default")

Lines = Callable[..., None]
LOSSES = {
    "LocalLoss": LocalLoss,
    "LovaszSoftmax": LovaszSoftmax,
    "LovaszHinge": LovaszHinge,
    "CrossEntropy": CrossEntropy,
}


@pytest.fixture(params=["in this process", "on a server"])
def losses(request: pytest.FixtureRequest, server: ServerProcess) -> dict[str, Any]:
    """Names for the lines that make a loss of their own; ``LocalLoss`` may be a ``RemoteLoss``."""
    if request.param == "in this process":
        return dict(LOSSES)
    return LOSSES | {"LocalLoss": lambda loss: RemoteLoss(server.target, loss)}


def value_and_grad(function: Callable[..., Tensor], logits: Tensor, labels: Any) -> tuple[float, Tensor]:
    of_it = logits.detach().requires_grad_()
    loss = function(of_it, labels)
    loss.backward()
    assert of_it.grad is not None
    return loss.item(), of_it.grad


def answers(scales: list[Tensor], labels: list[Tensor], terms: LossLike) -> list[tuple[float, Tensor]]:
    """The right loss and gradient of each scale; labels (N, 1, *spatial)."""
    pairs = zip(scales, labels, strict=True)
    return [reference_answer(logits.detach(), of_them[:, 0].long(), terms) for logits, of_them in pairs]


def test_segmentation_models_pytorch(lines: Lines, losses: dict[str, Any]) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(3)
    model = smp.Unet("resnet18", encoder_weights=None, classes=recipes.CLASSES)
    lines("segmentation-models-pytorch", 0, losses)
    images, labels = recipes.batch()
    with torch.no_grad():
        logits = model(interpolate(images, (64, 64)))
    labels = interpolate(labels[:, None].float(), (64, 64))[:, 0].long()
    masks = torch.where(labels == 255, 255, (labels == 1).long())
    peer = smp.losses.LovaszLoss
    for ours, theirs, given, of_it in [
        (losses["multiclass"], peer("multiclass", ignore_index=255), logits, labels),
        (losses["binary"], peer("binary", ignore_index=255), logits[:, :1], masks[:, None]),
    ]:
        loss, grad = value_and_grad(ours, given, of_it)
        expected, expected_grad = value_and_grad(theirs, given, of_it)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert norm_error(grad, expected_grad.double()) < 1e-3  # theirs is float32 with cancellation
    several = torch.nn.functional.one_hot(labels % 255, recipes.CLASSES).movedim(-1, 1)
    loss, grad = value_and_grad(losses["multilabel"], logits, several)
    each = [peer("binary")(logits[:, i], several[:, i]).item() for i in range(recipes.CLASSES)]
    assert loss == pytest.approx(np.mean(each), rel=1e-5)
    assert abs(loss - peer("multilabel")(logits, several).item()) > 1e-3


def test_monai(lines: Lines, namespace: dict[str, Any]) -> None:
    monai = pytest.importorskip("monai")
    from monai.losses import DeepSupervisionLoss

    torch.manual_seed(3)
    network = monai.networks.nets.UNet(3, 1, recipes.CLASSES, channels=(4, 8), strides=(2,))
    images = torch.randn(2, 1, 8, 8, 8)
    labels = (images * 2).round().clamp(0, recipes.CLASSES - 1)
    labels[:, :, 0] = 255
    batch = {"image": monai.data.MetaTensor(images), "label": monai.data.MetaTensor(labels)}
    seen: list[Tensor] = []

    def kept(image: Tensor) -> Tensor:
        seen.append(network(image))
        seen[-1].retain_grad()
        return seen[-1]

    namespace |= {"network": kept, "batch": batch}
    lines("MONAI", 0, namespace)
    assert labels.dtype == torch.float32
    plain = seen[0].detach().as_subclass(Tensor)
    expected, grad = reference_answer(plain, labels[:, 0].long(), recipes.TERMS)
    assert namespace["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert norm_error(seen[0].grad.as_subclass(Tensor), grad) < 1e-5  # type: ignore[union-attr]

    scales = [torch.randn(2, recipes.CLASSES, *[size] * 3).requires_grad_() for size in (8, 4)]
    namespace |= {"DeepSupervisionLoss": DeepSupervisionLoss, "deep_network": lambda image: scales}
    lines("MONAI", 1, namespace)
    coarse = interpolate(labels, scales[1].shape[2:], mode="nearest-exact")
    each = answers(scales, [labels, coarse], recipes.TERMS)
    assert namespace["loss"].item() == pytest.approx(each[0][0] + 0.5 * each[1][0], rel=1e-5)
    assert norm_error(scales[0].grad, each[0][1]) < 1e-5
    assert norm_error(scales[1].grad, 0.5 * each[1][1]) < 1e-5


@pytest.mark.parametrize("deep", [False, True])
def test_nnunet(deep: bool, lines: Lines, losses: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    trainers = pytest.importorskip("nnunetv2.training.nnUNetTrainer.nnUNetTrainer")
    losses["nnUNetTrainer"] = trainers.nnUNetTrainer
    lines("nnU-Net", 0, losses)
    trainer = object.__new__(losses["nnUNetTrainerLovasz"])  # Its __init__ wants a planned data set on disk.
    trainer.label_manager = SimpleNamespace(ignore_label=3, has_regions=False)
    sizes = [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
    trainer.configuration_manager = SimpleNamespace(batch_dice=True, pool_op_kernel_sizes=sizes)
    trainer.enable_deep_supervision, trainer.is_ddp = deep, False
    monkeypatch.setenv("nnUNet_compile", "f")
    trainer.device = torch.device("cpu")
    criterion = trainer._build_loss()
    scales = [torch.randn(2, 3, *[size] * 3).requires_grad_() for size in (8, 4, 2)]
    labels = [torch.randint(0, 4, (2, 1, *scale.shape[2:])).float() for scale in scales]
    loss = criterion(scales, labels) if deep else criterion(scales[0], labels[0])
    loss.backward()
    terms = [(1.0, CrossEntropy(ignore_index=3)), (1.0, LovaszSoftmax(ignore_index=3))]
    weights = [2 / 3, 1 / 3, 0.0] if deep else [1.0, 0.0, 0.0]
    each = [
        reference_answer(scale.detach(), of_it[:, 0].long(), terms) for scale, of_it in zip(scales, labels, strict=True)
    ]
    assert loss.item() == pytest.approx(sum(w * value for w, (value, _) in zip(weights, each, strict=True)), rel=1e-5)
    assert norm_error(scales[0].grad, weights[0] * each[0][1]) < 1e-5


def test_mmsegmentation(lines: Lines, namespace: dict[str, Any]) -> None:
    pytest.importorskip("mmseg")
    from mmengine.structures import PixelData
    from mmseg.models import FCNHead
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

    lines("mmsegmentation", 0, namespace)
    try:
        lines("mmsegmentation", 1, namespace)
        options = namespace["model"]["decode_head"]
        torch.manual_seed(3)
        head = FCNHead(in_channels=3, channels=8, num_convs=1, num_classes=recipes.CLASSES, dropout_ratio=0, **options)
    finally:
        MODELS.module_dict.pop("lovasz_loss")
    images, labels = recipes.batch()
    samples = [SegDataSample(gt_sem_seg=PixelData(data=of_it[None])) for of_it in labels]
    found = head.loss((images,), samples, {})
    found["loss_lovasz"].backward()
    got = {name: parameter.grad.clone() for name, parameter in head.named_parameters()}
    head.zero_grad()
    right = reference.compute(head((images,)), labels, recipes.TERMS)
    right.backward()
    assert found["loss_lovasz"].item() == pytest.approx(right.item(), rel=1e-5)
    for name, parameter in head.named_parameters():
        assert norm_error(got[name], parameter.grad.double()) < 1e-4, name  # type: ignore[union-attr]


def test_mask2former(lines: Lines, losses: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.mask2former import modeling_mask2former

    monkeypatch.setattr(modeling_mask2former, "dice_loss", modeling_mask2former.dice_loss)  # put back at the end
    lines("Mask2Former", 0, losses)
    config = transformers.Mask2FormerConfig(num_labels=3, train_num_points=50)
    criterion = modeling_mask2former.Mask2FormerLoss(
        config, config.loss_weights if hasattr(config, "loss_weights") else {}
    )
    torch.manual_seed(3)
    logits = torch.randn(2, 5, 8, 8, requires_grad=True)
    masks = [(torch.randn(count, 16, 16) > 0).float() for count in (2, 3)]
    indices = [(torch.tensor([0, 3]), torch.tensor([1, 0])), (torch.tensor([4, 1, 2]), torch.tensor([0, 1, 2]))]
    seen: list[tuple[Tensor, Tensor]] = []
    of_masks = losses["of_masks"]
    losses["of_masks"] = lambda points, labels: (seen.append((points.detach(), labels)), of_masks(points, labels))[1]
    loss = criterion.loss_masks(logits, masks, indices, num_masks=4)["loss_dice"]
    loss.backward()
    points, labels = seen[0]
    assert points.shape == labels.shape == (5, 50)
    assert 0 < labels.float().mean() < 1
    each = [
        reference.compute(x[None].double(), y[None].long(), LovaszHinge()).item()
        for x, y in zip(points, labels, strict=True)
    ]
    assert loss.item() == pytest.approx(sum(each) / 4, rel=1e-5)
    assert logits.grad is not None
    assert logits.grad.abs().sum(dim=(2, 3)).gt(0).sum() == 5
    nothing = losses["lovasz_of_masks"](torch.zeros(0, 50, requires_grad=True), torch.zeros(0, 50), 1)
    nothing.backward()
    assert nothing.item() == 0
