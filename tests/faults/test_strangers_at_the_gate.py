"""Strangers at a server with TLS and tokens: connections that say nothing, and floods of calls without a token."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
from faults.conftest import ARGUMENTS
from support.certificates import Authority
from support.fork_server import ForkedServer
from support.waiting import eventually, has_ended

from lovasz.client import TLS, LossClient, LovaszSoftmax

TOKEN = "alice-" + "a" * 20
SILENT = 100
CALLS = 300
"""More than the server has threads for calls."""
CHANNELS = 3
COMPUTE = "/lovasz.v1.LossService/ComputeStream"


def test_strangers_take_no_place_from_a_caller_with_a_token(tmp_path: Path) -> None:
    ca = Authority(tmp_path, "ca")
    pair, tokens = ca.sign("server"), tmp_path / "tokens"
    tokens.write_text(f"alice:{TOKEN}\n")
    access = ["--tls-cert", str(pair.cert), "--tls-key", str(pair.key), "--tokens", str(tokens)]
    logits, labels = np.zeros((1, 3, 8, 8), np.float32), np.zeros((1, 8, 8), np.uint8)
    with (
        ForkedServer([*ARGUMENTS, *access, "--metrics-tls"]) as server,
        LossClient(server.target, tls=TLS(ca.path), token=TOKEN) as client,
        contextlib.ExitStack() as connections,
    ):
        expected = client.compute(logits, labels, LovaszSoftmax()).loss
        descriptors = len(os.listdir(f"/proc/{server.pid}/fd"))
        silent = [
            connections.enter_context(socket.create_connection((host, int(port)), 30))
            for url in (server.target, server.metrics_url.split("/")[2])
            for host, _, port in [url.rpartition(":")] * SILENT
        ]
        credentials = grpc.ssl_channel_credentials(ca.path.read_bytes())
        # A connection each: beyond 128 calls of one, gRPC itself may reset some before the server sees them.
        own = [("grpc.use_local_subchannel_pool", 1)]
        channels = [
            connections.enter_context(grpc.secure_channel(server.target, credentials, own)) for _ in range(CHANNELS)
        ]
        streams = [channel.stream_stream(COMPUTE) for channel in channels]
        release = threading.Event()
        connections.callback(release.set)
        # None of them sends a message, or says that none will come.
        calls = [
            stream(iter(release.wait, True), timeout=60, wait_for_ready=True)
            for _ in range(CALLS // CHANNELS)
            for stream in streams
        ]
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda _: client.compute(logits, labels, LovaszSoftmax()).loss, range(40)))
        assert found == [expected] * 40
        context = ssl.create_default_context(cafile=str(ca.path))
        with urllib.request.urlopen(server.metrics_url, timeout=30, context=context) as page:
            assert b"lovasz_device_healthy 1.0" in page.read()
        outcomes = {(call.code().name, call.details()) for call in calls}
        assert outcomes == {("UNAUTHENTICATED", "a token is missing; expected metadata 'authorization: Bearer TOKEN'")}
        assert eventually(lambda: all(map(has_ended, silent)))
        for channel in channels:
            channel.close()
        assert eventually(lambda: len(os.listdir(f"/proc/{server.pid}/fd")) <= descriptors + 2)
