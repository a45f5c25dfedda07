"""One rank of a training with the lines of docs/trainers.md; test_ranks.py starts two of them with torchrun.

Each rank has its share of the batch. Rank 0 writes the weights after two steps to a file.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from support import absent_operators, recipes
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

absent_operators.declare()

STEPS = 2

Training = Callable[[str], torch.nn.Module]


def joint_criterion(target: str) -> dict[str, Any]:
    """A criterion of all ranks, on a server. The process group must exist."""
    return recipes.criterion("of all ranks on a server", target)


def share() -> tuple[Tensor, Tensor]:
    images, labels = recipes.batch()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return images.chunk(ranks)[rank], labels.chunk(ranks)[rank]


def dataset() -> list[tuple[Tensor, Tensor]]:
    """The whole batch; frameworks give each rank its share."""
    return list(zip(*recipes.batch(), strict=True))


def with_ddp(target: str) -> torch.nn.Module:
    dist.init_process_group("gloo")
    return _ddp(joint_criterion(target), target)


def with_ddp_and_process_group(target: str) -> torch.nn.Module:
    criterion = recipes.criterion("of a process group", target)
    dist.init_process_group("gloo")
    return _ddp(criterion, target)


def _ddp(criterion: dict[str, Any], target: str) -> torch.nn.Module:
    model = recipes.new_model()
    names = criterion | {"model": model, "DistributedDataParallel": DistributedDataParallel}
    names |= {"loader": [share()] * STEPS, "optimizer": torch.optim.SGD(model.parameters(), lr=recipes.RATE)}
    recipes.run_lines("DistributedDataParallel", 0, names, target)
    return model


def with_fsdp(target: str) -> torch.nn.Module:
    dist.init_process_group("gloo")
    model = recipes.new_model()
    names = joint_criterion(target) | {"torch": torch, "model": model, "loader": [share()] * STEPS}
    recipes.run_lines("FSDP", 0, names, target)
    for parameter_name, parameter in list(model.named_parameters()):
        owner, _, leaf = parameter_name.rpartition(".")
        whole = parameter.full_tensor().detach()  # type: ignore[attr-defined]
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(whole))
    return model


def with_fsdp1(target: str) -> torch.nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    dist.init_process_group("gloo")
    model = recipes.new_model()
    names = joint_criterion(target) | {"torch": torch, "model": model, "loader": [share()] * STEPS}
    names["device"] = torch.device("cpu")
    recipes.run_lines("FSDP", 1, names, target)
    whole = recipes.new_model()
    with FullyShardedDataParallel.summon_full_params(names["model"]):
        whole.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    return whole


def with_lightning(target: str) -> torch.nn.Module:
    from lightning import LightningModule, Trainer

    from lovasz.client import Joint
    from lovasz.client.torch import RemoteLoss

    names = {"torch": torch, "LightningModule": LightningModule, "criterion": None, "terms": recipes.TERMS}
    names |= {"RemoteLoss": RemoteLoss, "Joint": Joint}
    recipes.run_lines("Lightning", 0, names, target)
    recipes.run_lines("Lightning", 1, names, target)
    module: Any = names["JointSegmenter"]
    segmenter = module(recipes.new_model())
    loader = torch.utils.data.DataLoader(dataset(), batch_size=2)  # type: ignore[arg-type]
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=STEPS, **quiet_lightning())
    trainer.fit(segmenter, loader)
    return segmenter.model  # type: ignore[no-any-return]


def quiet_lightning() -> dict[str, Any]:
    return {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


def with_accelerate(target: str) -> torch.nn.Module:
    from accelerate import Accelerator

    model = recipes.new_model()
    Accelerator()  # makes the process group
    names = joint_criterion(target) | {"Accelerator": Accelerator, "model": model}
    names["loader"] = torch.utils.data.DataLoader(dataset() * 2 * STEPS, batch_size=2)  # type: ignore[arg-type]
    names["optimizer"] = torch.optim.SGD(model.parameters(), lr=recipes.RATE)
    recipes.run_lines("accelerate", 0, names, target)
    return model


def with_transformers(target: str) -> torch.nn.Module:
    from support.recipe_models import LogitsModel, hugging_face_arguments, hugging_face_dataset
    from transformers import Trainer

    model = LogitsModel(recipes.new_model())
    with tempfile.TemporaryDirectory() as folder:
        arguments = hugging_face_arguments(folder, per_device_train_batch_size=2, max_steps=STEPS)
        names = joint_criterion(target) | {"torch": torch, "Trainer": Trainer, "model": model, "arguments": arguments}
        names["dataset"] = hugging_face_dataset()
        recipes.run_lines("Hugging Face Trainer", 0, names, target)
        names["trainer"].train()
    return model.network


def with_compute_loss_func(target: str) -> torch.nn.Module:
    """One step of what the page warns of: two accumulated batches of one image on each rank, each with its own loss."""
    from support.recipe_models import LogitsModel, hugging_face_arguments, hugging_face_dataset
    from transformers import Trainer

    from lovasz.core import LocalLoss

    model, criterion = LogitsModel(recipes.new_model()), LocalLoss(recipes.TERMS)
    with tempfile.TemporaryDirectory() as folder:
        arguments = hugging_face_arguments(
            folder, per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=1
        )
        Trainer(
            model,
            arguments,
            train_dataset=hugging_face_dataset(),
            compute_loss_func=lambda outputs, labels, num_items_in_batch: criterion(outputs.logits, labels),
        ).train()
    return model.network


TRAININGS: dict[str, Training] = {
    "DistributedDataParallel": with_ddp,
    "DistributedDataParallel, process group": with_ddp_and_process_group,
    "FSDP": with_fsdp,
    "FSDP 1": with_fsdp1,
    "Lightning": with_lightning,
    "accelerate": with_accelerate,
    "Hugging Face Trainer": with_transformers,
    "compute_loss_func": with_compute_loss_func,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("training", choices=TRAININGS)
    parser.add_argument("target")
    parser.add_argument("saved", help="the file for the weights")
    given = parser.parse_args()
    torch.set_num_threads(1)
    trained = TRAININGS[given.training](given.target)
    if dist.get_rank() == 0:
        torch.save(recipes.weights(trained), given.saved)
    # With PyTorch 2.13 and gloo, a model that outlives its process group may hang or abort at the end.
    dist.barrier()
    dist.destroy_process_group()
