"""CUDA's driver is called as its Python package expects it: with the package itself, and a stand-in for libcuda."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import weakref
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lovasz.device_memory.cuda import CudaDriver
from lovasz.device_memory.driver import DriverError

CODE = """
import ctypes, gc, os
from lovasz.device_memory.cuda import CudaDriver
from lovasz.device_memory.driver import DriverError
from lovasz.device_memory.mapping import create, load

def refused(what, *arguments):
    try:
        what(*arguments)
    except DriverError as error:
        return str(error)

driver = CudaDriver()
assert driver.count == 2
assert [driver.uuid(device) for device in range(2)] == [b"\\xa0" * 16, b"\\xa1" * 16]
assert [driver.can_access(*pair) for pair in ((0, 0), (0, 1), (1, 0))] == [True, True, False]
assert driver.granularity(1) == 1 << 16
made, descriptor = create(driver, 1, 100_000)
assert (made.nbytes, made.owner, made.device) == (1 << 17, 1, 1)
loaded = load(driver, descriptor, made.nbytes, 0)
assert (loaded.owner, loaded.device) == (1, 0)
source = (ctypes.c_char * 10)(*b"0123456789")
driver.copy(made.address + 5, ctypes.addressof(source), 10, 1, 0)
assert ctypes.string_at(loaded.address + 5, 10) == source.raw
assert refused(load, driver, descriptor, made.nbytes * 2, 0) == "cuMemMap: CUDA_ERROR_INVALID_VALUE"
assert refused(load, driver, 0, 1 << 16, 0) == "cuMemImportFromShareableHandle: CUDA_ERROR_INVALID_VALUE"
assert refused(driver.uuid, 2) == "cuDeviceGet: CUDA_ERROR_INVALID_DEVICE"
assert refused(driver.create, 0, 5) == "cuMemCreate: CUDA_ERROR_INVALID_VALUE"
assert refused(driver.extent, 4096, 0) == "cuMemGetAddressRange: CUDA_ERROR_NOT_FOUND"
os.close(descriptor)
del made, loaded
gc.collect()
for one in os.listdir("/proc/self/fd"):
    path = f"/proc/self/fd/{one}"
    assert not os.path.lexists(path) or "memfd:libcuda" not in os.readlink(path), path
assert "memfd:libcuda" not in open("/proc/self/maps").read()
print("as expected")
"""


def test_every_call_of_the_driver(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    try:
        installed = find_spec("cuda.bindings") is not None
    except ModuleNotFoundError:
        installed = False
    if compiler is None or not installed:
        pytest.skip("needs a C compiler and cuda-bindings")
    source = Path(__file__).with_name("libcuda.c")
    library = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source], check=True, timeout=60)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "as expected\n"), ran.stderr


def test_the_owner_is_read_while_the_properties_that_hold_it_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuda-bindings 12.9 to 13.1 free the memory of a location with the properties that it is a part of."""

    class Location:
        def __init__(self, properties: Properties) -> None:
            self._properties = weakref.ref(properties)

        def _read(self, value: int) -> int:
            assert self._properties() is not None, "read after its memory was freed"
            return value

        type = property(lambda self: self._read(1))
        id = property(lambda self: self._read(3))

    class Properties:
        location = property(Location)

    class Bindings:
        CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
        CUmemGenericAllocationHandle = int

        @staticmethod
        def cuInit(flags: int) -> tuple[int]:
            return (0,)

        @staticmethod
        def cuMemGetAllocationPropertiesFromHandle(handle: int) -> tuple[int, Properties]:
            return 0, Properties()

    take(monkeypatch, Bindings)
    assert CudaDriver().owner(7) == 3


def take(monkeypatch: pytest.MonkeyPatch, bindings: type) -> None:
    """Makes a class the module ``cuda.bindings.driver``."""
    package: Any = ModuleType("cuda.bindings")
    package.driver = bindings
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)


def test_a_package_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(DriverError, match=r"cuda-bindings: not installed \(.*\); pip install 'lovasz\[gpu\]'"):
        CudaDriver()


def test_a_driver_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bindings:
        @staticmethod
        def cuInit(flags: int) -> tuple[int]:
            raise RuntimeError("libcuda.so.1 was not found")

    take(monkeypatch, Bindings)
    with pytest.raises(DriverError, match=r"cuInit: libcuda\.so\.1 was not found"):
        CudaDriver()
