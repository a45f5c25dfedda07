"""The usual implementation of Lovász-Softmax behind NVIDIA's Triton Inference Server, in a child process.

PyTriton starts the server and hands each request to a Python function, which computes loss and gradient with
segmentation-models-pytorch on the CPU. Model ``lovasz``: ``logits`` float32 (N, C, H, W) and ``labels`` uint8 (N, H, W)
in; ``loss`` float32 (1,) and ``grad``, shaped like the logits, out.

Batching is off. The server would join requests along the first axis, and this loss ranks all pixels of its input
together: it would return one loss for all joined requests. So one request is one call of the function.

Runs in the environment of ``inference_server.txt``, and listens on the loopback interface, for gRPC alone. The server
takes 4 to 13 seconds to stop.
"""

from __future__ import annotations

import os
import signal
import socket
import sysconfig
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pytriton.decorators import sample
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from benchmarks import usual
from benchmarks.remote.inference_client import MODEL, connect
from benchmarks.remote.load import Labels, Logits

HOST = "127.0.0.1"

Arrays = dict[str, npt.NDArray[Any]]


class InferenceServer:
    def __init__(self, instances: int, threads: int) -> None:
        """Returns when the server has answered a first, small request.

        Args:
            instances: how many requests are computed at a time.
            threads: torch's threads for each of them.
        """
        # The server runs Python in processes of its own, which need the library of this Python.
        paths = [str(sysconfig.get_config_var("LIBDIR")), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        os.environ["LD_LIBRARY_PATH"] = ":".join(paths)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # So that close() is called.
        with socket.create_server((HOST, 0)) as free:
            self._port = free.getsockname()[1]
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            config = TritonConfig(allow_http=False, allow_metrics=False, grpc_address=HOST, grpc_port=self._port)
            triton = stack.enter_context(Triton(config=config, workspace=Path(folder, "triton")))
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
            with connect(self.target()) as criterion:
                criterion(np.zeros((1, 2, 8, 8), np.float32), np.zeros((1, 8, 8), np.uint8))
            self._stack = stack.pop_all()

    def target(self) -> str:
        return f"{HOST}:{self._port}"

    def close(self) -> None:
        self._stack.close()


def inference(threads: int) -> Callable[..., Arrays]:
    """The function of one instance of the model."""
    criterion = usual.losses().LovaszLoss("multiclass", from_logits=True)

    def infer(logits: Logits, labels: Labels) -> Arrays:
        torch.set_num_threads(threads)  # Here, because each instance is a thread, and each thread has its own number.
        leaf = torch.from_numpy(logits).requires_grad_()
        loss = criterion(leaf, torch.from_numpy(labels))
        (grad,) = torch.autograd.grad(loss, leaf)
        return {"loss": loss.detach().numpy().reshape(1), "grad": grad.numpy()}

    wrapped: Callable[..., Arrays] = sample(infer)
    return wrapped
