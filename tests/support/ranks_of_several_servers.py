"""What ``test_several_servers.py`` runs in processes of their own: gRPC finds its variable when a client opens."""

from __future__ import annotations

import argparse
import json
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lovasz.client import (
    CrossEntropy,
    Joint,
    LossClient,
    LossError,
    LovaszSoftmax,
    ServerUnavailableError,
)
from lovasz.client.torch import RemoteLoss
from lovasz.spec import LossLike

LOSS: LossLike = [(1.0, CrossEntropy()), (1.0, LovaszSoftmax())]
WORLD = 3
CLASSES = 4
LOST_STEP = 10
"""At this step, one rank acts as if its answer had been lost on its way, when the others have theirs."""
ATTEMPTS = 8


def model() -> torch.nn.Module:
    torch.manual_seed(7)
    return torch.nn.Conv2d(2, CLASSES, 3, padding=1)


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Images and labels of a rank at a step; every third is larger than goes in one message."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    side = 400 if step % 3 == 0 else 16
    images = torch.randn(1, 2, side, side, generator=generator)
    return images, (images.sum(1) * 1.5).round().long().clamp(0, CLASSES - 1)


def groups(addresses: list[str], runs: int) -> dict[str, object]:
    """Steps of many runs: one small and one streamed; then requests of nobody's run. The ranks list the addresses in
    orders of their own."""
    targets = ["ipv4:" + ",".join(random.sample(addresses, len(addresses))) for _ in range(WORLD)]
    clients = [LossClient(target, load_balancing="ring_hash") for target in targets]
    inputs = [[tuple(t.numpy() for t in batch(step, rank)) for rank in range(WORLD)] for step in (1, 0)]
    losses = []
    with ThreadPoolExecutor(WORLD) as ranks:
        for run in range(runs):
            for step, of_ranks in enumerate(inputs):
                calls = [
                    ranks.submit(
                        client.compute,
                        np.repeat(images, 2, axis=1),
                        labels,
                        LOSS,
                        joint=Joint(f"rün {run}", rank, WORLD, step),
                    )
                    for rank, (client, (images, labels)) in enumerate(zip(clients, of_ranks, strict=True))
                ]
                losses.append([call.result().loss for call in calls])
    images, labels = inputs[0][0]
    for _ in range(60):
        clients[0].compute(np.repeat(images, 2, axis=1), labels, LOSS)
    version = clients[0].server_info().version
    for client in clients:
        client.close()
    return {"losses": losses, "version": version}


def train(addresses: list[str], rank: int, steps: int) -> dict[str, object]:
    """The recipe of docs/joint.md: all ranks agree on whether the step has its loss, and repeat it if one has not."""
    net = DistributedDataParallel(model())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    criterion = RemoteLoss(
        "ipv4:" + ",".join(addresses), LOSS, joint=Joint.from_distributed("killed"), load_balancing="ring_hash"
    )
    losses, errors = [], []
    for step in range(steps):
        images, labels = batch(step, rank)
        logits = net(images)
        for attempt in range(ATTEMPTS):
            loss = None
            try:
                loss = criterion(logits, labels, step=step)
                if step == LOST_STEP and rank == 1 and attempt == 0:
                    raise ServerUnavailableError("as if the answer had been lost")
            except LossError as error:
                errors.append(f"step {step}: {type(error).__name__}: {error}")
                loss = None
            everyone = torch.tensor(float(loss is not None))
            dist.all_reduce(everyone, dist.ReduceOp.MIN)
            if everyone:
                break
        else:
            raise LossError(f"step {step} did not succeed in {ATTEMPTS} attempts: {errors[-1]}")
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    criterion.close()
    return {"losses": losses, "errors": errors}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["groups", "train"])
    parser.add_argument("addresses", type=lambda text: text.split(","))
    parser.add_argument("--count", type=int, required=True, help="runs, or steps")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--store", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.role == "groups":
        answer = groups(given.addresses, given.count)
    else:
        dist.init_process_group("gloo", init_method=f"file://{given.store}", rank=given.rank, world_size=WORLD)
        answer = train(given.addresses, given.rank, given.count)
        # With PyTorch 2.13 and gloo, a model that outlives its process group may hang or abort at the end.
        dist.destroy_process_group()
    print(json.dumps(answer), flush=True)
