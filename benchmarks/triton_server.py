"""The usual implementation of Lovász-Softmax behind NVIDIA's Triton Inference Server: what one would serve it with.

    .venv-triton/bin/python benchmarks/triton_server.py --port 8001

PyTriton starts Triton and hands each request to a Python function, which computes loss and gradient with
segmentation-models-pytorch on the CPU. Model ``lovasz``: ``logits`` float32 (N, C, H, W) and ``labels`` uint8 (N, H, W)
in, ``loss`` float32 (1,) and ``grad`` like the logits out.

Triton's batching is off. It joins requests along the first axis, and this loss ranks all pixels of its input together:
joined requests would become one loss, of nobody's. So one request is one call of the function.

Listens on the loopback interface, gRPC alone. READY on a line of its own on the standard output says that it can be
asked; Triton's log goes to the standard error. SIGTERM ends it, for which Triton takes 4 to 13 seconds.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import signal
import sys
import sysconfig
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pytriton.decorators import sample
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig
from triton_client import MODEL, Labels, Logits, TritonLoss

HOST = "127.0.0.1"
SMP_MODULE = "segmentation_models_pytorch"
ALIVE_SECONDS = 1.0
"""So often it looks whether Triton is still there."""

Arrays = dict[str, npt.NDArray[Any]]


def usual_losses() -> Any:
    """The losses of segmentation-models-pytorch, whose top level wants torchvision: see ``contenders._smp_losses``."""
    spec = importlib.util.find_spec(SMP_MODULE)
    if spec is None:
        raise ModuleNotFoundError(f"{SMP_MODULE} is not installed: see benchmarks/requirements.txt")
    bare = types.ModuleType(SMP_MODULE)
    bare.__path__ = list(spec.submodule_search_locations or [])
    bare.__spec__ = spec
    sys.modules[SMP_MODULE] = bare
    return importlib.import_module(f"{SMP_MODULE}.losses")


def inference(threads: int) -> Callable[..., Arrays]:
    """What one instance of the model does, on so many threads of torch."""
    criterion = usual_losses().LovaszLoss("multiclass", from_logits=True)

    def infer(logits: Logits, labels: Labels) -> Arrays:
        torch.set_num_threads(threads)  # here, because each instance is a thread, and the number is the thread's own
        leaf = torch.from_numpy(logits).requires_grad_()
        loss = criterion(leaf, torch.from_numpy(labels))
        (grad,) = torch.autograd.grad(loss, leaf)
        return {"loss": loss.detach().numpy().reshape(1), "grad": grad.numpy()}

    wrapped: Callable[..., Arrays] = sample(infer)
    return wrapped


def serve(port: int, instances: int, threads: int, ready: Callable[[], None]) -> None:
    """Returns when Triton has ended by itself.

    Args:
        ready: called once it has answered a first, small request.
    """
    config = TritonConfig(allow_http=False, allow_metrics=False, grpc_address=HOST, grpc_port=port)
    with tempfile.TemporaryDirectory() as folder, Triton(config=config, workspace=Path(folder, "triton")) as triton:
        triton.bind(
            model_name=MODEL,
            infer_func=[inference(threads) for _ in range(instances)],
            inputs=[
                Tensor(name="logits", dtype=np.float32, shape=(-1, -1, -1, -1)),
                Tensor(name="labels", dtype=np.uint8, shape=(-1, -1, -1)),
            ],
            outputs=[
                Tensor(name="loss", dtype=np.float32, shape=(1,)),
                Tensor(name="grad", dtype=np.float32, shape=(-1, -1, -1, -1)),
            ],
            config=ModelConfig(batching=False),
        )
        with TritonLoss(f"{HOST}:{port}") as criterion:
            criterion(np.zeros((1, 2, 8, 8), np.float32), np.zeros((1, 8, 8), np.uint8))
        ready()
        while triton.is_alive():
            time.sleep(ALIVE_SECONDS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True, help="a free port")
    parser.add_argument("--instances", type=int, default=1, help="requests computed at a time (default 1)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, for each of these")
    args = parser.parse_args()
    # Triton and all that it starts print there, too: only READY goes to the true standard output.
    said = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # Triton runs Python in processes of its own, which need this Python's library where it lies outside the system's.
    paths = [str(sysconfig.get_config_var("LIBDIR")), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    os.environ["LD_LIBRARY_PATH"] = ":".join(paths)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serve(args.port, args.instances, args.threads, lambda: print("READY", file=said, flush=True))
    except KeyboardInterrupt:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
