"""What ``test_joint_absent.py`` runs in processes of their own: a training whose ranks have unequal data."""

from __future__ import annotations

import argparse
import json

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lovasz.client import CrossEntropy, LovaszSoftmax
from lovasz.client.torch import RemoteLoss
from lovasz.spec import LossLike

LOSS: LossLike = [(1.0, CrossEntropy()), (1.0, LovaszSoftmax(per_image=True))]
CLASSES = 4
IMAGES = (((2, 0, 1), (1, 2, 3, 1, 2)), ((1, 2, 1), ()), ((1,), (0, 2)))
"""The images in each batch, by epoch and rank."""
WORLD = 2


def model() -> torch.nn.Module:
    torch.manual_seed(7)
    return torch.nn.Conv2d(2, CLASSES, 3, padding=1)


def batch(epoch: int, rank: int, number: int) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    generator = torch.Generator().manual_seed(1000 * epoch + 100 * rank + number)
    images = torch.randn(IMAGES[epoch][rank][number], 2, 9, 11, generator=generator)
    return images, (images.sum(1) * 1.5).round().long().clamp(0, CLASSES - 1)


def train(target: str, rank: int, reduction: str) -> dict[str, list[float]]:
    """Each step's loss, and the last weights."""
    # Named before the process group exists.
    criterion = RemoteLoss(target, LOSS, joint=f"uneven {reduction}", gradient_reduction=reduction)
    net = DistributedDataParallel(model())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for epoch, images_of in enumerate(IMAGES):
        with net.join(divide_by_initial_world_size=reduction == "mean"):
            for number in range(len(images_of[rank])):
                images, labels = batch(epoch, rank, number)
                optimizer.zero_grad()
                loss = criterion(net(images), labels)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            criterion.leave()
    criterion.close()
    weights = torch.nn.utils.parameters_to_vector(net.parameters())
    return {"losses": losses, "weights": weights.tolist()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--reduction", required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{given.store}", rank=given.rank, world_size=WORLD)
    answer = train(given.target, given.rank, given.reduction)
    # With PyTorch 2.13 and gloo, a model that outlives its process group may hang or abort at the end.
    dist.destroy_process_group()
    print(json.dumps(answer), flush=True)
