"""A program for a system without what only POSIX or Linux has, as Windows is: client and core still work.

    python -m support.without_posix TARGET UNIX_TARGET

The libraries that lovasz uses are loaded first: they have code of their own for each system.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch

for library in filter(find_spec, ("grpc", "numba")):
    import_module(library)

ABSENT: dict[ModuleType, list[str]] = {
    os: ["register_at_fork", "fork", "memfd_create", "posix_fallocate", "pread", "pwrite", "getuid", "sysconf"],
    mmap: ["MAP_PRIVATE", "MAP_ANONYMOUS", "MAP_SHARED", "MADV_HUGEPAGE"],
    socket: ["AF_UNIX", "SOCK_SEQPACKET", "SO_PEERCRED", "send_fds", "recv_fds"],
    select: ["poll", "epoll"],
}
MODULES = ["fcntl", "resource", "pwd", "grp", "termios"]


def main(target: str, unix_target: str) -> None:
    for module, names in ABSENT.items():
        for name in names:
            vars(module).pop(name, None)
    absent: dict[str, Any] = sys.modules
    absent.update(dict.fromkeys(MODULES))

    from lovasz.client import LossClient, LovaszSoftmax
    from lovasz.client.torch import RemoteLoss
    from lovasz.core import lovasz_softmax

    logits = torch.randn(1, 5, 200, 300, requires_grad=True)  # Large enough for pooled memory.
    labels = torch.randint(0, 5, (1, 200, 300))
    lovasz_softmax(logits, labels).backward()
    assert logits.grad is not None
    expected = logits.grad.clone()
    for place in (target, unix_target, "inprocess"):
        logits.grad = None
        RemoteLoss(place, LovaszSoftmax())(logits, labels).backward()
        assert torch.equal(logits.grad, expected), place
    with LossClient(target) as client:
        result = client.submit(logits.detach().numpy(), labels.numpy(), LovaszSoftmax()).result(timeout=60)
        assert np.array_equal(result.grad, expected.numpy())
        assert result.timing.transport == "grpc"
    try:
        LossClient(unix_target, transport="shm")
    except ValueError as error:
        print(error)


if __name__ == "__main__":
    main(*sys.argv[1:])
