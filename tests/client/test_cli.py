"""The command ``lovasz`` in a process of its own: what it prints, and its exit status."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from support.scripted_server import serving, serving_nothing

from lovasz.client import cli
from lovasz.server.launch import ServerProcess
from lovasz.spec import LOSS_KINDS
from lovasz.v1 import loss_pb2 as pb
from lovasz.version import VERSION

HEALTHY = pb.GetServerInfoResponse(
    version="9.8.7",
    devices=[pb.Device(name="cuda:0", hardware="a GPU", healthy=True)],
    losses=["lovasz_softmax", "cross_entropy"],
    memory_budget_bytes=3 << 29,
    max_requests=12,
)


def lovasz(*arguments: str) -> tuple[int, str, str]:
    """The exit status, and what it said on stdout and stderr."""
    command = [sys.executable, "-W", "error", "-m", "lovasz.client.cli", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return ran.returncode, ran.stdout, ran.stderr


def test_the_command_is_installed() -> None:
    (command,) = entry_points(group="console_scripts", name="lovasz")
    assert command.load() is cli.main


def test_ping_of_a_real_server(server: ServerProcess) -> None:
    status, out, err = lovasz("ping", server.target, "--count", "3")
    assert (status, err) == (0, "")
    first, round_trip, device, losses, limits = out.splitlines()
    assert first == f"{server.target} answers: lovasz {VERSION}"
    ms = r"\d+\.\d\d ms"
    assert re.fullmatch(rf"  round trip  median {ms}, fastest {ms}, slowest {ms} \(3 calls\)", round_trip)
    assert re.fullmatch(r"  device      cpu \(.+\), healthy", device)
    assert losses == f"  losses      {', '.join(LOSS_KINDS)}"
    assert re.fullmatch(r"  limits      [\d.]+ GiB of tensors, \d+ requests at a time", limits)


def test_ping_tells_what_the_server_says() -> None:
    with serving() as server:
        server.info = HEALTHY
        status, out, err = lovasz("ping", server.target)
        assert (status, err) == (0, "")
        assert len(server.methods) == 6  # one to find it, five to time
    assert out.splitlines()[0] == f"{server.target} answers: lovasz 9.8.7"
    assert out.splitlines()[2:] == [
        "  device      cuda:0 (a GPU), healthy",
        "  losses      lovasz_softmax, cross_entropy",
        "  limits      1.5 GiB of tensors, 12 requests at a time",
    ]


def test_ping_fails_if_a_device_does_not_answer() -> None:
    with serving() as server:
        server.info = pb.GetServerInfoResponse(devices=[pb.Device(name="cuda:1", hardware="a GPU", healthy=False)])
        status, out, _ = lovasz("ping", server.target)
    assert status == 1
    assert "  device      cuda:1 (a GPU), NOT HEALTHY" in out.splitlines()


@pytest.mark.parametrize("wait", [(), ("--wait", "30")], ids=["once", "wait"])
def test_ping_keeps_trying_if_told_to(wait: tuple[str, ...]) -> None:
    with serving() as server:
        server.info, server.info_failures = HEALTHY, 2
        status, out, err = lovasz("ping", server.target, "--count", "1", *wait)
    if wait:
        assert (status, err) == (0, "")
        assert len(server.methods) == 4
    else:
        assert (status, out) == (1, "")
        assert err == f"lovasz: {server.target}: still starting (UNAVAILABLE)\n"


def test_ping_where_nobody_is() -> None:
    with socket.socket() as taken:  # taken, so that nobody else listens there
        taken.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{taken.getsockname()[1]}"
        status, out, err = lovasz("ping", target)
    assert (status, out) == (1, "")
    assert err.startswith(f"lovasz: {target}: no server answers there; is it running")
    assert err.count("\n") == 1


def test_ping_of_another_service() -> None:
    with serving_nothing() as target:
        status, out, err = lovasz("ping", target)
    assert (status, out) == (1, "")
    assert err.startswith(f"lovasz: {target}: ")
    assert "(UNIMPLEMENTED)" in err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("",), "lovasz: target: got ''; expected HOST:PORT, unix:/path or 'inprocess'\n"),
        (("localhost:notaport",), "lovasz: target: got 'localhost:notaport', without a port; expected HOST:PORT, "),
        (
            ("http://localhost:9095/metrics",),
            "lovasz: target: got 'http://localhost:9095/metrics'; expected HOST:PORT, ",
        ),
        (("unix:/nowhere/at/all",), "lovasz: unix:/nowhere/at/all: "),
        (("localhost:1", "--timeout", "0"), "lovasz: timeout: got 0.0; expected seconds > 0\n"),
    ],
)
def test_ping_of_what_cannot_be(arguments: tuple[str, ...], text: str) -> None:
    status, out, err = lovasz("ping", *arguments)
    assert (status, out) == (1, "")
    assert err.startswith(text)
    assert "Traceback" not in err


def test_help() -> None:
    status, out, _ = lovasz("--help")
    assert status == 0
    assert out.startswith("usage: lovasz ")
    assert "ping" in out
    assert "bench" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--version"], [f"lovasz {VERSION}\n"]),
        (["ping", "--help"], ["TARGET", "--count", "--timeout", "--wait"]),
        (["bench", "--help"], ["TARGET", "--shape", "--dtype", "--transport", "--concurrency", "--json", "--plot"]),
    ],
)
def test_what_it_says_of_itself(arguments: list[str], said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    assert all(text in out for text in said)


@pytest.mark.parametrize(("command", "loaded"), [("ping", False), ("bench", True)])
def test_the_load_is_imported_only_for_bench(command: str, loaded: bool) -> None:
    code = (
        "import sys\nfrom lovasz.client import cli\n"
        f"try:\n    cli.main(['{command}', '--help'])\n"
        "except SystemExit:\n    print('lovasz.client.bench' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.stdout.splitlines()[-1] == str(loaded)


@pytest.mark.parametrize(
    "arguments", [[], ["ping"], ["bench"], ["pong", "localhost:1"], ["ping", "localhost:1", "--count", "x"]]
)
def test_a_wrong_command_line_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.startswith("usage: lovasz ")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--count", "0", "got '0'; expected a whole number >= 1"),
        ("--count", "-1", "got '-1'; expected a whole number >= 1"),
        ("--wait", "nan", "got 'nan'; expected seconds >= 0"),
        ("--wait", "-1", "got '-1'; expected seconds >= 0"),
    ],
)
def test_a_number_that_cannot_be_is_named(
    option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--wait nan`` would try for ever."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["ping", "localhost:1", f"{option}={value}"])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
