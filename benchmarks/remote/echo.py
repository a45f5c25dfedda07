"""Raw gRPC: a server that answers with ready bytes and computes nothing, and calls that send ready bytes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import grpc

HOST = "127.0.0.1"
THREADS = 16
CALL_SECONDS = 300.0
ECHO = "/benchmark.Echo/Echo"
COMPUTE = "/lovasz.v1.LossService/Compute"
ANY_SIZE = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
OWN_CONNECTION = ("grpc.use_local_subchannel_pool", 1)
"""Otherwise all channels of a process to one target share a connection."""


class EchoServer:
    """A threaded gRPC server that answers each message with ``answer_bytes`` bytes. Runs in a child process."""

    def __init__(self, answer_bytes: int) -> None:
        answer = bytes(answer_bytes)
        self._server = grpc.server(ThreadPoolExecutor(THREADS), options=ANY_SIZE)
        handler: Any = grpc.unary_unary_rpc_method_handler(lambda request, context: answer)
        _, service, method = ECHO.split("/")
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        self._port = self._server.add_insecure_port(f"{HOST}:0")
        self._server.start()

    def target(self) -> str:
        return f"{HOST}:{self._port}"

    def close(self) -> None:
        self._server.stop(0).wait()


def raw_call(target: str, method: str, request: bytes, stack: ExitStack) -> Callable[[], bytes]:
    """A call with ready bytes, over a connection of its own that closes with the stack. The answer is not decoded."""
    channel = stack.enter_context(grpc.insecure_channel(target, options=(*ANY_SIZE, OWN_CONNECTION)))
    call: Any = channel.unary_unary(method)

    def ask() -> bytes:
        answer: bytes = call(request, timeout=CALL_SECONDS)
        return answer

    return ask
