"""``lovasz bench``: its table, JSON, plot and live line, its errors, and Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.processes import hearing_ctrl_c
from support.scripted_server import Answer, abort, always, good_answer, serving, until_gone
from support.waiting import eventually

from lovasz.client import cli
from lovasz.server.launch import ServerProcess
from lovasz.v1 import loss_pb2 as pb

SHORT = ("--duration", "0.3", "--warmup", "0.1")
WORKLOAD = ["shape", "dtype", "transport", "way", "concurrency"]
FIGURES = ["requests", "errors", "requests/s", "MiB/s", "p50", "p90", "p99", "max"]
HEADINGS = [*WORKLOAD, *FIGURES, "receive", "queue", "compute", "copy", "other", "batch"]


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """The exit status of the command in this process, and what it said on stdout and stderr."""
    status = cli.main(["bench", *arguments])
    return status, *capsys.readouterr()


def rows(out: str) -> list[dict[str, str]]:
    """The table's rows, by heading."""
    lines = out.splitlines()
    head = next(number for number, line in enumerate(lines) if line.split() == HEADINGS)
    cells = [line.split() for line in lines[head + 1 :] if not line.startswith("  ")]
    return [dict(zip(HEADINGS, row, strict=True)) for row in cells]


def test_a_table_of_every_combination(
    server: ServerProcess, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "figures.json"
    shapes = ("1x3x16x16", "2x4x32")
    status, out, err = bench(
        capsys,
        server.target,
        "--shape",
        *shapes,
        "--concurrency",
        "1",
        "--concurrency",
        "2",
        *SHORT,
        "--json",
        str(file),
    )
    assert status == 0
    names = [f"{shape} float32 auto, {clients}" for shape in shapes for clients in ("1 client", "2 clients")]
    assert err.splitlines() == [f"{number}/4 {name}" for number, name in enumerate(names, 1)]
    about, asked, groups = out.splitlines()[:3]
    assert about.startswith(f"{server.target}: lovasz ")
    assert asked == "lovasz_softmax and its gradient; 0.3 s each, after 0.1 s to warm up"
    assert "- latency, ms -" in groups

    figures = json.loads(file.read_text())
    assert figures["target"] == server.target
    assert (figures["loss"], figures["want_grad"], figures["complete"]) == ("lovasz_softmax", True, True)
    assert figures["server"]["devices"][0]["name"] == "cpu"
    table = rows(out)
    assert [(row["shape"], row["concurrency"]) for row in table] == [(s, c) for s in shapes for c in ("1", "2")]
    for row, found in zip(table, figures["combinations"], strict=True):
        assert_says(row, found)
        assert (row["dtype"], row["transport"], row["errors"]) == ("float32", "auto", "0")
        assert row["way"] == found["way"] == "grpc"
        assert found["requests"] > 0
        assert found["warmup_requests"] > 0
        assert found["elapsed_seconds"] > 0.2
        latency, split = found["latency_ms"], found["split_ms"]
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]
        assert sum(split.values()) == pytest.approx(latency["p50"])


def assert_says(row: dict[str, str], found: dict[str, Any]) -> None:
    """That a row of the table and a combination in JSON are one."""
    assert row["shape"] == "x".join(str(size) for size in found["shape"])
    assert row["concurrency"] == str(found["concurrency"])
    assert row["requests"] == str(found["requests"])
    assert row["errors"] == str(sum(found["errors"].values()))
    numbers = {"requests/s": found["requests_per_second"], "MiB/s": found["mib_per_second"]}
    numbers |= {"batch": found["mean_batch_requests"], **found["latency_ms"], **found["split_ms"]}
    for heading, number in numbers.items():
        assert float(row[heading]) == pytest.approx(number, rel=0.01, abs=0.051), heading


@pytest.mark.parametrize(
    ("loss", "shape"), [("lovasz_softmax", "1x3x16x16"), ("lovasz_hinge", "4x1x16"), ("cross_entropy", "64x5")]
)
def test_in_process(loss: str, shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = bench(capsys, "inprocess", "--shape", shape, "--loss", loss, "--no-grad", *SHORT)
    assert status == 0
    assert f"{loss}; 0.3 s each" in out
    (row,) = rows(out)
    assert int(row["requests"]) > 0
    assert (row["way"], row["receive"], row["queue"], row["batch"]) == ("-", "0.00", "0.00", "1.0")


def test_dtypes_and_transports(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = bench(
        capsys,
        server.target,
        "--shape",
        "1x3x16x16",
        *SHORT,
        "--dtype",
        "float32",
        "bfloat16",
        "--transport",
        "auto",
        "grpc",
    )
    assert status == 0
    made = [(row["dtype"], row["transport"]) for row in rows(out)]
    assert made == [(dtype, transport) for dtype in ("float32", "bfloat16") for transport in ("auto", "grpc")]


def test_errors_are_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    with serving(always(grpc.StatusCode.INTERNAL, "no, never")) as server:
        status, out, _ = bench(
            capsys,
            server.target,
            "--shape",
            "2x3x8x8",
            *SHORT,
            "--json",
            str(file),
            "--plot",
            str(tmp_path / "none.png"),
        )
    assert status == 0
    (row,) = rows(out)
    assert (row["requests"], row["requests/s"], row["p50"], row["other"], row["batch"]) == ("0", "0.0", "-", "-", "-")
    said = f"  {row['errors']} x ServerFaultError, the first: {server.target}: no, never (INTERNAL)"
    assert out.splitlines()[-1] == said
    (found,) = json.loads(file.read_text())["combinations"]
    assert found["errors"] == {"ServerFaultError": int(row["errors"])}
    assert found["latency_ms"] == {"p50": None, "p90": None, "p99": None, "max": None}
    assert not (tmp_path / "none.png").exists()  # There is nothing to draw.


def test_what_cannot_be_computed_ends_it_but_keeps_the_others(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def script(call: int, header: pb.RequestHeader, context: grpc.ServicerContext) -> Answer:
        if header.logits.shape[0] == 2:
            abort(context, grpc.StatusCode.INVALID_ARGUMENT, "logits: got two; expected one")
        return good_answer(header)

    file = tmp_path / "figures.json"
    with serving(script) as server:
        status, out, err = bench(
            capsys, server.target, "--shape", "1x3x8", "2x3x8", "3x3x8", *SHORT, "--json", str(file)
        )
    assert status == 1
    assert err.splitlines()[-1] == "lovasz: logits: got two; expected one"
    assert [row["shape"] for row in rows(out)] == ["1x3x8"]
    figures = json.loads(file.read_text())
    assert figures["complete"] is False
    assert [found["shape"] for found in figures["combinations"]] == [[1, 3, 8]]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("localhost:notaport",), "lovasz: target: got 'localhost:notaport', without a port"),
        (("",), "lovasz: target: got ''; expected HOST:PORT, unix:/path or 'inprocess'\n"),
        (("localhost:1", "--shape", "1x1x8"), "lovasz: logits: got shape (1, 1, 8) with a single class"),
        (
            ("localhost:1", "--shape", "4x8", "--plot", "out.bmp2"),
            "lovasz: --plot: got 'out.bmp2'; expected a name that ends in .png, .pdf or .svg\n",
        ),
        (
            ("inprocess", "--shape", "4x8", "--device", "moon"),
            "1/1 4x8 float32 auto, 1 client\nlovasz: device: got 'moon'; expected one that torch has here (",
        ),
        (
            ("inprocess", "--shape", "1x2x1000000x1000000"),
            "1/1 1x2x1000000x1000000 float32 auto, 1 client\n"
            "lovasz: --shape: got 1x2x1000000x1000000, which there is not enough memory for; expected a smaller one\n",
        ),
    ],
)
def test_what_cannot_be(arguments: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = bench(capsys, *arguments)
    assert status == 1
    assert err.startswith(text)
    assert rows(out) == [] if out else True


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--shape", "5x"], "--shape: got '5x'; expected N x C x sizes such as 1x19x512x1024"),
        (["--shape", "1x19", "7"], "--shape: got '7'; expected N x C x sizes"),
        (["--shape", "1x0x4"], "--shape: got '1x0x4'; expected N x C x sizes"),
        (["--shape", "1x-2x4"], "--shape: got '1x-2x4'; expected N x C x sizes"),
        (["--dtype", "float64"], "--dtype: got 'float64'; expected float32, float16 or bfloat16"),
        (["--transport", "tcp"], "--transport: got 'tcp'; expected auto, grpc or shm"),
        (["--concurrency", "0"], "--concurrency: got '0'; expected a whole number in [1, 1024]"),
        (["--concurrency", "two"], "--concurrency: got 'two'; expected a whole number"),
        (["--duration", "0"], "--duration: got '0'; expected seconds > 0"),
        (["--duration", "inf"], "--duration: got 'inf'; expected seconds > 0"),
        (["--warmup", "long"], "--warmup: got 'long'; expected seconds >= 0"),
        (["--timeout", "nan"], "--timeout: got 'nan'; expected seconds > 0"),
        (
            ["--loss", "l2"],
            "--loss: got 'l2'; expected lovasz_softmax, lovasz_hinge, cross_entropy, lovasz_sigmoid or "
            "binary_cross_entropy",
        ),
        (["--json", "/no/where/x"], "--json: got '/no/where/x'; expected a file in a directory that exists"),
        (["--plot", "/"], "--plot: got '/'; expected a file in a directory that exists"),
    ],
)
def test_a_wrong_argument_is_named(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "localhost:1", *arguments])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert text in err


def test_a_plot(server: ServerProcess, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "latencies.png"
    status, _, _ = bench(capsys, server.target, "--shape", "1x3x8x8", "1x8x256x256", *SHORT, "--plot", str(picture))
    assert status == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_no_plot_without_matplotlib(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with serving() as server:
        status, out, err = bench(capsys, server.target, "--shape", "1x3x8", "--plot", "out.png")
        assert server.methods == []  # It is said before the load begins.
        assert (status, out) == (1, "")
        assert err == "lovasz: --plot: matplotlib, which draws it, is not installed: pip install matplotlib\n"
        status, out, _ = bench(capsys, server.target, "--shape", "1x3x8", *SHORT)
    assert status == 0
    assert len(rows(out)) == 1


# --- On a terminal, and Ctrl-C ----------------------------------------------------------------------------------------


@contextmanager
def started(*arguments: str, stderr: int = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    """The command in its own process, which does not outlive a test that fails."""
    command = [sys.executable, "-W", "error", "-m", "lovasz.client.cli", "bench", *arguments]
    with hearing_ctrl_c():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_a_terminal_shows_progress_on_one_line(server: ServerProcess) -> None:
    ours, theirs = pty.openpty()
    with started(server.target, "--shape", "1x3x16x16", "1x3x8x8", *SHORT, stderr=theirs) as process:
        os.close(theirs)
        said = b""
        try:
            while more := os.read(ours, 1 << 16):
                said += more
        except OSError:  # What Linux says when the other end was closed.
            pass
        finally:
            os.close(ours)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert len(rows(out)) == 2
    assert b"\n" not in said
    shown = [line for line in said.decode().replace("\x1b[K", "").split("\r") if line]
    assert shown[0] == "1/2 first request  (1x3x16x16 float32 auto, 1 client)"
    figures = r"2/2 measuring \d\.\d s, \d+ requests, \d+\.\d/s, p50 (-|[\d.]+) ms  \(1x3x8x8 float32 auto.*"
    assert any(re.fullmatch(figures, line) for line in shown)
    assert max(map(len, shown)) < 80  # A terminal that does not say how wide it is.
    assert said.endswith(b"\r\x1b[K")


@pytest.mark.parametrize(
    ("answered", "calls"),
    [(1 << 30, 30), (20, 22), (1, 2)],
    ids=["in a request that is answered", "in one that is not", "in the first"],
)
def test_ctrl_c_ends_it_with_the_figures_so_far(answered: int, calls: int, tmp_path: Path) -> None:
    """The first ``answered`` calls get an answer; call 0 is server_info. Ctrl-C comes after ``calls`` calls."""

    def script(call: int, header: pb.RequestHeader, context: grpc.ServicerContext) -> Answer:
        if call >= answered:
            until_gone(context)
        return good_answer(header)

    file, picture = tmp_path / "figures.json", tmp_path / "latencies.png"
    with serving(script) as server:
        arguments = (server.target, "--shape", "1x3x8x8", "1x4x8x8", "--warmup", "0", "--concurrency", "2")
        outputs = ("--json", str(file), "--plot", str(picture))
        with started(*arguments, "--duration", "500", "--timeout", "500", *outputs) as process:
            assert eventually(lambda: len(server.methods) >= calls)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines() == ["1/2 1x3x8x8 float32 auto, 2 clients", "lovasz: interrupted"]
    figures = json.loads(file.read_text())
    assert figures["complete"] is False
    if answered == 1:
        assert (rows(out), figures["combinations"], picture.exists()) == ([], [], False)
        return
    (row,), (found,) = rows(out), figures["combinations"]
    assert_says(row, found)
    assert found["interrupted"] is True
    assert found["errors"] == {}
    assert found["requests"] + found["warmup_requests"] == min(len(server.received_bytes), answered - 1)
    assert picture.read_bytes().startswith(b"\x89PNG")
