"""Device memory is made, handed over, measured and given back, whatever the driver refuses."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from support.host_driver import GRANULARITY, HostDriver

from lovasz.device_memory.driver import INVALID_VALUE, OUT_OF_MEMORY, DriverError
from lovasz.device_memory.mapping import Mapping, create, load


@pytest.fixture
def driver() -> Iterator[HostDriver]:
    driver = HostDriver(2, strangers=frozenset({(1, 0)}))
    yield driver
    gc.collect()
    assert driver.in_use == (0, 0)


class Made(NamedTuple):
    mapping: Mapping
    descriptor: int


@pytest.fixture
def made(driver: HostDriver) -> Iterator[list[Made]]:
    """Memory of device 0; a list, as pytest keeps what a fixture yields until after the fixtures have ended."""
    made = [Made(*create(driver, 0, 100_000))]
    yield made
    os.close(made.pop().descriptor)


def content(mapping: Mapping) -> torch.Tensor:
    return mapping.driver.tensor(mapping.address, mapping.nbytes, mapping.device, mapping)


def test_what_one_writes_the_other_reads(driver: HostDriver, made: list[Made]) -> None:
    mapping, descriptor = made[0]
    assert (mapping.device, mapping.owner, mapping.nbytes) == (0, 0, 2 * GRANULARITY)
    other = load(HostDriver(1), descriptor, mapping.nbytes, 0)
    content(mapping)[1000:] = 7
    content(other)[:1000] = 3
    assert content(mapping).sum() == content(other).sum() == 7 * (mapping.nbytes - 1000) + 3000


def test_memory_stays_as_long_as_a_tensor_is_in_it(driver: HostDriver) -> None:
    mapping, descriptor = create(driver, 0, 1)
    os.close(descriptor)
    view = content(mapping)[4:8].view(torch.float32)
    del mapping
    gc.collect()
    assert driver.in_use == (0, 1)
    assert view.fill_(2.5).sum() == 2.5
    del view
    gc.collect()
    assert driver.in_use == (0, 0)


def test_a_part_of_memory_can_be_loaded_but_no_more_than_there_is(driver: HostDriver, made: list[Made]) -> None:
    mapping, descriptor = made[0]
    assert load(driver, descriptor, GRANULARITY, 0).nbytes == GRANULARITY
    for nbytes in (mapping.nbytes + GRANULARITY, mapping.nbytes - 1):
        with pytest.raises(DriverError, match=f"cuMemMap: {INVALID_VALUE}"):
            load(driver, descriptor, nbytes, 0)


def test_a_driver_that_measures_less_than_was_said_is_believed(driver: HostDriver, made: list[Made]) -> None:
    class Small(HostDriver):
        def extent(self, address: int, device: int) -> int:
            return GRANULARITY

    small = Small(1)
    with pytest.raises(DriverError, match=f"the memory has {GRANULARITY} bytes, not {2 * GRANULARITY}"):
        load(small, made[0].descriptor, 2 * GRANULARITY, 0)
    assert small.in_use == (0, 0)


def test_memory_that_a_device_cannot_reach_is_not_mapped(driver: HostDriver, made: list[Made]) -> None:
    with pytest.raises(DriverError, match="device 1 cannot access device 0"):
        load(driver, made[0].descriptor, GRANULARITY, 1)


def test_other_descriptors_are_no_device_memory(driver: HostDriver) -> None:
    for descriptor in (os.memfd_create("memory"), os.open("/dev/null", os.O_RDONLY)):
        with pytest.raises(DriverError, match=f"cuMemImportFromShareableHandle: {INVALID_VALUE}"):
            load(driver, descriptor, GRANULARITY, 0)
        os.close(descriptor)


def test_a_device_without_memory_says_so() -> None:
    driver = HostDriver(1, memory_bytes=GRANULARITY)
    mapping, descriptor = create(driver, 0, GRANULARITY)
    with pytest.raises(DriverError) as refused:
        create(driver, 0, 1)
    assert refused.value.code == OUT_OF_MEMORY
    os.close(descriptor)
    del mapping


@pytest.mark.parametrize("call", ["export", "map", "extent"])
def test_a_call_that_fails_leaves_nothing(driver: HostDriver, call: str) -> None:
    def fail(*_: object) -> int:
        raise DriverError(call, INVALID_VALUE)

    before = len(os.listdir("/proc/self/fd"))
    setattr(driver, call, fail)
    with pytest.raises(DriverError, match=call):
        create(driver, 0, 1)
    gc.collect()
    assert driver.in_use == (0, 0)
    assert len(os.listdir("/proc/self/fd")) == before
