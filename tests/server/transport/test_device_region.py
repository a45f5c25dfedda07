"""Device memory that is shared: what is taken, what is refused by name, and that nothing is left of it."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.host_driver import GRANULARITY, HostDriver
from support.waiting import eventually

from lovasz import wire
from lovasz.device_memory.driver import DriverError
from lovasz.device_memory.mapping import Mapping, create
from lovasz.server.memory.device_staging import DeviceBytes, DeviceStaging
from lovasz.server.memory.pool import StagingPool
from lovasz.server.memory.shared_devices import SharedDevices, shared_devices
from lovasz.server.transport.shared_memory import SharedMemory
from lovasz.server.transport.tensor_bytes import TensorBytes
from lovasz.spec import InvalidInput, LovaszSoftmax, weighted_sum
from lovasz.v1 import loss_pb2 as pb

MAX_BYTES = 4 * GRANULARITY
CPU = torch.device("cpu")
LOGITS, LABELS = torch.arange(30, dtype=torch.float32), torch.arange(10, dtype=torch.uint8)


def header(session: bytes, region: int, offsets: tuple[int, int, int] = (0, 128, 192)) -> wire.Request:
    return wire.Request.checked(
        weighted_sum(LovaszSoftmax()),
        wire.TensorSpec(wire.dtype_named("float32"), (1, 3, 10)),
        wire.TensorSpec(wire.dtype_named("uint8"), (1, 10)),
        True,
        wire.SharedTensors(session, region, *offsets),
    )


class Caller:
    """A process that shares memory of its device 0, which the server's driver knows as device 1."""

    def __init__(self, path: str) -> None:
        self.driver = HostDriver(1, first=1)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(30)
        self.socket.connect(path)
        hello = self.reply()
        self.name, self.devices = hello.session, list(hello.devices)
        self.mapping, self.descriptor = create(self.driver, 0, 2 * GRANULARITY)

    def reply(self) -> pb.SharedMemoryReply:
        return pb.SharedMemoryReply.FromString(self.socket.recv(4096))

    def share(
        self, number: int, descriptor: int | None = None, device: bytes | None = None, nbytes: int | None = None
    ) -> str:
        """Shares its memory, or says that it does; the error that it is answered with."""
        memory = pb.DeviceMemory(
            device=self.driver.uuid(0) if device is None else device,
            nbytes=self.mapping.nbytes if nbytes is None else nbytes,
        )
        packet = pb.SharedMemoryRequest(region=number, device_memory=memory).SerializeToString()
        socket.send_fds(self.socket, [packet], [self.descriptor if descriptor is None else descriptor])
        return self.reply().error

    @property
    def memory(self) -> torch.Tensor:
        return self.driver.tensor(self.mapping.address, self.mapping.nbytes, 0, self.mapping)

    def close(self) -> None:
        self.socket.close()
        os.close(self.descriptor)


@pytest.fixture
def driver() -> HostDriver:
    return HostDriver(3, strangers=frozenset({(0, 2)}))


@pytest.fixture
def server(tmp_path: Path, driver: HostDriver) -> Iterator[SharedMemory]:
    server = SharedMemory(str(tmp_path / "s"), MAX_BYTES, 2 * MAX_BYTES, SharedDevices(driver, 0))
    server.start()
    yield server
    server.stop()
    gc.collect()
    assert (server.nbytes, driver.in_use) == (0, (0, 0))


@pytest.fixture
def caller(server: SharedMemory) -> Iterator[Caller]:
    caller = Caller(server.path)
    yield caller
    caller.close()


def test_the_server_names_the_devices_that_it_can_access(caller: Caller, driver: HostDriver) -> None:
    assert caller.devices == [driver.uuid(0), driver.uuid(1)]


def test_tensors_are_copied_from_the_memory_and_the_gradient_into_it(
    server: SharedMemory, caller: Caller, driver: HostDriver
) -> None:
    caller.memory[:120] = LOGITS.view(torch.uint8)
    caller.memory[128:138] = LABELS
    assert caller.share(5) == ""
    assert server.nbytes == server.device_nbytes == 2 * GRANULARITY
    request = header(caller.name, 5)
    assert server.is_on_device(request)
    logits, labels, grad = server.tensors(request)
    staging = DeviceStaging(request, StagingPool(CPU))
    staging.receive([logits, labels])
    caller.memory.fill_(99)  # The caller's tensors are the server's own from here on.
    assert torch.equal(staging.request().logits.view(-1), LOGITS)
    assert torch.equal(staging.request().labels.view(-1), LABELS)
    grad.write(-LOGITS, None)
    assert torch.equal(caller.memory[192:312].view(torch.float32), -LOGITS)
    assert driver.copies == [120, 10, 120]


def test_memory_is_given_back_when_it_is_taken_back_and_nothing_uses_it(
    server: SharedMemory, caller: Caller, driver: HostDriver
) -> None:
    assert caller.share(5) == ""
    used: TensorBytes | None = server.tensors(header(caller.name, 5))
    caller.socket.close()
    assert eventually(lambda: server.sessions == 0)
    gc.collect()
    assert driver.in_use == (0, 1)
    assert server.device_nbytes == server.nbytes > 0
    assert used is not None
    used.grad.write(LOGITS, None)  # A call that still runs.
    used = None
    gc.collect()
    assert driver.in_use == (0, 0)
    assert server.nbytes == 0


@pytest.mark.parametrize("place", [0, 1, 2], ids=["logits", "labels", "grad"])
@pytest.mark.parametrize(
    ("offset", "text"),
    [
        *(
            (offset, "in a region of 131072; expected a place within it")
            for offset in (-64, 2**17 - 9, 2**62, 2**63 - 1)
        ),
        (4, "in device memory; expected a multiple of 64"),
    ],
)
def test_a_tensor_that_is_not_within_its_region_or_misaligned_is_refused(
    server: SharedMemory, caller: Caller, place: int, offset: int, text: str
) -> None:
    assert caller.share(1) == ""
    offsets = [0, 128, 192]
    offsets[place] = offset
    field = ("logits", "labels", "grad")[place]
    with pytest.raises(InvalidInput, match=rf"shared_tensors\.{field}_offset: got {offset} .*{text}"):
        server.tensors(header(caller.name, 1, tuple(offsets)))


def test_memory_that_is_not_what_its_caller_says_is_refused(
    server: SharedMemory, caller: Caller, driver: HostDriver
) -> None:
    other = HostDriver(1, first=2)
    unreachable, descriptor = create(other, 0, GRANULARITY)
    memfd = os.memfd_create("no device memory")
    too_large = 3 * GRANULARITY
    for says, text in (
        ({"device": driver.uuid(0)}, "got memory of GPU-[0-]{35}1; expected GPU-[0-]{36}, as its caller said"),
        ({"device": driver.uuid(2)}, "got memory of GPU-[0-]{35}2, which this server cannot reach"),
        ({"device": b"unknown"}, "got memory of GPU 756e6b6e6f776e, which"),
        ({"descriptor": descriptor, "nbytes": GRANULARITY}, "device 0 cannot access device 2"),
        ({"descriptor": memfd}, "cuMemImportFromShareableHandle: CUDA_ERROR_INVALID_VALUE"),
        ({"nbytes": too_large}, f"this cannot be used as device memory of {too_large} bytes: cuMemMap"),
        ({"nbytes": 5}, "this cannot be used as device memory of 5 bytes: cuMemMap"),
        ({"nbytes": 0}, rf"got device memory of 0 bytes; expected 1 to {MAX_BYTES} \(--memory-budget\)"),
        ({"nbytes": -1}, "got device memory of -1 bytes"),
        ({"nbytes": 2**62}, f"got device memory of {2**62} bytes"),
    ):
        with pytest.raises(InvalidInput, match=text):
            raise InvalidInput("", caller.share(1, **says))
        assert server.nbytes == 0
        assert driver.in_use == (0, 0)
    os.close(memfd)
    os.close(descriptor)
    del unreachable
    assert caller.share(1) == "", "the session goes on"


def test_all_regions_together_have_a_limit(server: SharedMemory, caller: Caller, driver: HostDriver) -> None:
    assert [caller.share(number) for number in range(4)] == [""] * 4
    assert "--max-shared-memory" in caller.share(4)
    assert server.nbytes == 2 * MAX_BYTES


def test_a_server_without_devices_takes_no_device_memory(tmp_path: Path) -> None:
    server = SharedMemory(str(tmp_path / "s"), MAX_BYTES, MAX_BYTES)
    server.start()
    caller = Caller(server.path)
    assert caller.devices == []
    assert "expected a memfd, as this server takes nothing else" in caller.share(1)
    caller.close()
    server.stop()


def test_a_driver_that_shares_nothing_is_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def no_driver() -> HostDriver:
        raise DriverError("cuInit", "CUDA_ERROR_NO_DEVICE")

    assert shared_devices(CPU, no_driver) is None
    assert not caplog.records
    assert shared_devices(torch.device("cuda", 0), no_driver) is None
    (record,) = caplog.records
    assert (record.message, record.reason) == (
        "device memory cannot be shared; callers share host memory",
        "cuInit: CUDA_ERROR_NO_DEVICE",
    )
    devices = shared_devices(torch.device("cuda", 1), lambda: HostDriver(2, strangers=frozenset({(1, 0)})))
    assert devices is not None
    assert devices.uuids == (HostDriver(2).uuid(1),)


def test_a_part_keeps_its_memory(driver: HostDriver) -> None:
    mapping: Mapping | None
    mapping, descriptor = create(driver, 0, 1)
    os.close(descriptor)
    part = DeviceBytes(mapping, "field", 64, 40)
    mapping = None
    gc.collect()
    part.write(torch.ones(10), None)
    read = torch.zeros(10)
    part.read(read, None)
    assert read.sum() == 10
