"""How much memory the process may use: the host's, or what its cgroups allow; and whether a budget fits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from lovasz.server.device.host_memory import budget_warning, host_memory

GIB = 1 << 30
HOST = 3 * GIB, 16 * GIB
UNLIMITED_V1 = 9223372036854771712


class Host:
    """A tree of files as Linux has it in /proc and in /sys/fs/cgroup: a host with 16 GiB, of which 3 GiB are in use."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.cgroups = folder / "proc", folder / "cgroup"
        self.write(
            self.proc / "meminfo",
            f"MemTotal: {16 << 20} kB\nMemFree: {1 << 20} kB\nMemAvailable: {13 << 20} kB\nHugePages_Total: 0\n",
        )

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def belongs_to(self, *lines: str) -> None:
        """Says which cgroups the process belongs to."""
        self.write(self.proc / "self" / "cgroup", "".join(f"{line}\n" for line in lines))

    def v2(self, path: str, limit: object, usage: object = 0, stat: str = "") -> None:
        self._cgroup(path, {"memory.max": limit, "memory.current": usage, "memory.stat": stat})

    def v1(self, path: str, limit: object, usage: object = 0, stat: str = "") -> None:
        files = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": usage, "memory.stat": stat}
        self._cgroup(f"memory/{path}", files)

    def _cgroup(self, path: str, files: Mapping[str, object]) -> None:
        for name, content in files.items():
            self.write(self.cgroups / path / name, f"{content}\n")

    def memory(self) -> tuple[int, int]:
        return host_memory(self.proc, self.cgroups)

    def warning(self, budget_bytes: int, on_gpu: bool) -> str | None:
        return budget_warning(budget_bytes, on_gpu, self.proc, self.cgroups)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_without_cgroups_it_is_the_hosts(host: Host) -> None:
    assert host.memory() == HOST
    host.belongs_to("0::/user.slice")
    assert host.memory() == HOST


def test_a_limit_counts_and_its_inactive_file_pages_are_not_used(host: Host) -> None:
    host.belongs_to("0::/system.slice/lovasz.service")
    stat = f"anon 5\ninactive_anon 7\ninactive_file {GIB // 2}\nactive_file 9"
    host.v2("system.slice/lovasz.service", 2 * GIB, GIB, stat)
    assert host.memory() == (GIB // 2, 2 * GIB)


@pytest.mark.parametrize(("outer", "inner", "expected"), [(2, 4, (2, 2)), (4, 2, (1, 2)), (4, "max", (2, 4))])
def test_the_lowest_of_nested_limits_counts(
    host: Host, outer: int, inner: int | str, expected: tuple[int, int]
) -> None:
    host.belongs_to("0::/pods/pod/server")
    host.v2("pods", "max")
    host.v2("pods/pod", outer * GIB, 2 * GIB)
    host.v2("pods/pod/server", inner * GIB if isinstance(inner, int) else inner, GIB)
    host.v2("pods/neighbour", GIB)
    assert host.memory() == (expected[0] * GIB, expected[1] * GIB)


@pytest.mark.parametrize("limit", ["max", 16 * GIB, 32 * GIB])
def test_no_limit_or_a_high_one_leaves_the_hosts(host: Host, limit: object) -> None:
    host.belongs_to("0::/server")
    host.v2("server", limit, GIB)
    assert host.memory() == HOST


@pytest.mark.parametrize("path", ["/", "/docker/0123abcd", "/../other"])
def test_in_a_container_the_root_of_the_mount_is_its_own_cgroup(host: Host, path: str) -> None:
    host.belongs_to(f"0::{path}")
    host.v2("", 2 * GIB, GIB)
    host.v2("docker", GIB)
    host.v2("../other", GIB)
    assert host.memory() == (GIB, 2 * GIB)


@pytest.mark.parametrize(("path", "folder"), [("/docker/a:b", "docker/a:b"), ("/docker/a:b", ""), ("/", "")])
def test_version_1_has_a_hierarchy_for_memory(host: Host, path: str, folder: str) -> None:
    host.belongs_to("9:name=systemd:/a", "5:cpu,cpuacct:/b", f"4:hugetlb,memory:{path}", "0::/")
    host.v1("", UNLIMITED_V1, 9 * GIB)
    host.v1(folder, 2 * GIB, GIB, f"inactive_file 1\ntotal_inactive_file {GIB // 4}")
    host.v1("b", GIB)
    assert host.memory() == (GIB * 3 // 4, 2 * GIB)


def test_version_1_without_a_limit_leaves_the_hosts(host: Host) -> None:
    host.belongs_to("4:memory:/server")
    host.v1("server", UNLIMITED_V1, GIB)
    assert host.memory() == HOST


@pytest.mark.parametrize(("limit", "usage"), [("", GIB), ("2 GiB", GIB), (2 * GIB, "much"), ("\udcff", GIB)])
def test_a_limit_that_cannot_be_read_is_none(host: Host, limit: object, usage: object) -> None:
    host.belongs_to("0::/server")
    host.v2("server", 0)
    for name, content in (("memory.max", limit), ("memory.current", usage)):
        (host.cgroups / "server" / name).write_text(str(content), errors="surrogateescape")
    assert host.memory() == HOST


@pytest.mark.parametrize("line", ["", "nothing", "0::", ":", "4:memory", "0::/server\0"])
def test_a_line_that_is_no_cgroup_is_none(host: Host, line: str) -> None:
    host.belongs_to(line)
    assert host.memory() == HOST


@pytest.mark.parametrize(
    ("stat", "used"),
    [("", GIB), ("inactive_file", GIB), ("inactive_file much", GIB), (f"inactive_file {2 * GIB}", 0)],
)
def test_inactive_pages_that_are_unknown_count_as_used_and_the_rest_is_never_negative(
    host: Host, stat: str, used: int
) -> None:
    host.belongs_to("0::/server")
    host.v2("server", 2 * GIB, GIB, stat)
    assert host.memory() == (used, 2 * GIB)


def test_a_name_that_is_too_long_for_the_system_is_none(host: Host) -> None:
    host.belongs_to(f"0::/{'a' * 5000}")
    host.v2("", 2 * GIB, GIB)
    assert host.memory() == (GIB, 2 * GIB)


def test_this_host_has_memory() -> None:
    used, total = host_memory()
    assert 0 < used < total


def test_a_budget_that_may_need_more_than_the_limit_is_warned_of(host: Host) -> None:
    host.belongs_to("0::/")
    host.v2("", 2 * GIB, GIB)
    assert host.warning(4 * GIB, on_gpu=False) == (
        "--memory-budget 4 GiB may need 10 GiB of memory with the computation's and PyTorch's own, and there are 2 GiB "
        "here: the system may end the server under load; lower it, or give more memory"
    )
    assert host.warning(4 * GIB, on_gpu=True) == (
        "--memory-budget 4 GiB may need 6 GiB of memory with PyTorch's own, and there are 2 GiB here: the system may "
        "end the server under load; lower it, or give more memory"
    )


@pytest.mark.parametrize(("budget", "on_gpu"), [(7 * GIB, False), (14 * GIB, True)])
def test_a_budget_that_just_fits_is_not_warned_of(host: Host, budget: int, on_gpu: bool) -> None:
    assert host.warning(budget, on_gpu) is None
    assert "there are 16 GiB here" in str(host.warning(budget + 1, on_gpu))


@pytest.mark.parametrize("meminfo", [None, "", "garbage", "MemTotal:\n", "MemTotal: 5 kB\n", "MemTotal: much\n"])
def test_nothing_is_said_where_the_memory_is_unknown(host: Host, meminfo: str | None) -> None:
    (host.proc / "meminfo").unlink()
    if meminfo is not None:
        host.write(host.proc / "meminfo", meminfo)
    with pytest.raises((OSError, ValueError, LookupError)):
        host.memory()
    assert host.warning(1 << 60, on_gpu=False) is None
