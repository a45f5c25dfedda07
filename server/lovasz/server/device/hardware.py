"""The device that a server computes on: which one it is, and its name."""

from __future__ import annotations

import torch

from lovasz.server.errors import DeviceError


def choose_device(name: str) -> torch.device:
    """The device that a configuration names.

    Raises:
        DeviceError: this host has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = torch.device(name).index or 0
        if index >= count:
            raise DeviceError(f"--device {name}: torch sees {count} CUDA devices here; expected cpu or auto, or a GPU")
        return torch.device("cuda", index)
    return torch.device(name)


def hardware_name(device: torch.device) -> str:
    """The name of the hardware, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
