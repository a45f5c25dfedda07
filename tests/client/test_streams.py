"""A caller's stream on its GPU: its calls stay on it, and its memory stays until the work on it is done."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from support.host_driver import HostDriver
from support.streams import Stream, Streams, stand_in

from lovasz import wire
from lovasz.client import LossClient, LovaszSoftmax
from lovasz.client.device_memory import DeviceRegion
from lovasz.client.memory import Pool
from lovasz.client.target import Target
from lovasz.client.tensors import Outgoing, encode_labels, encode_logits

OWN = Stream("own")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    return stand_in(monkeypatch)


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


class StreamTarget:
    """A target whose result is the stream on which it has computed."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    def prepare(self, *_: object) -> Any:
        return SimpleNamespace(compute=lambda _: self._streams.current, discard=lambda: None)

    def close(self) -> None:
        pass


def test_a_submitted_call_computes_on_the_stream_of_its_caller(streams: Streams) -> None:
    labels = torch.zeros(1, 4, dtype=torch.uint8)
    on_gpu, on_host = torch.zeros(1, 3, 4).as_subclass(OnGpu), torch.zeros(1, 3, 4)
    with LossClient("inprocess") as client:
        client._target = cast("Target", StreamTarget(streams))
        with streams.on(OWN):
            assert client.submit(on_gpu, labels, LovaszSoftmax()).result() is OWN
            assert client.submit(on_host, labels, LovaszSoftmax()).result() is streams.default
        assert client.submit(on_gpu, labels, LovaszSoftmax()).result() is streams.default


@pytest.fixture
def driver() -> Iterator[HostDriver]:
    driver = HostDriver()
    yield driver
    gc.collect()
    assert driver.in_use == (0, 0)


def places() -> tuple[wire.Places, Outgoing, Outgoing]:
    logits, labels = encode_logits(torch.ones(1, 3, 4)), encode_labels(torch.zeros(1, 4, dtype=torch.uint8))
    return wire.Places(0, 64, 128, 192), logits, labels


def region(driver: HostDriver) -> DeviceRegion:
    return DeviceRegion(driver, 0, 192, Pool(lambda _: region(driver)))


@pytest.mark.parametrize("is_closed", [True, False])
def test_memory_is_unmapped_after_the_work_that_uses_it(streams: Streams, driver: HostDriver, is_closed: bool) -> None:
    stream, mapped = Stream("work"), []
    stream.when_waited = lambda: mapped.append(driver.in_use[1])
    block = region(driver)
    with streams.on(stream):
        block.write_tensors(*places())
    if is_closed:
        block.close()
    assert stream.waits == 0
    del block
    gc.collect()
    assert (mapped, driver.in_use) == ([1], (0, 0))


def test_memory_is_unmapped_after_copies_of_a_request_that_failed_in_between(
    streams: Streams, driver: HostDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, mapped = Stream("work"), []
    stream.when_waited = lambda: mapped.append(driver.in_use[1])
    where, logits, _ = places()
    block = region(driver)
    with streams.on(stream), pytest.raises(AttributeError):
        block.write_tensors(where, logits, cast("Outgoing", None))
    del block
    gc.collect()
    assert mapped == [1]


def test_memory_whose_stream_has_failed_is_unmapped(streams: Streams, driver: HostDriver) -> None:
    stream = Stream("broken")

    def fail() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    stream.when_waited = fail
    block = region(driver)
    with streams.on(stream):
        block.write_tensors(*places())
    del block
    gc.collect()
    assert (stream.waits, driver.in_use) == (1, (0, 0))
