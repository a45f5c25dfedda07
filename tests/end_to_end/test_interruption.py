"""An exception or Ctrl-C while calls are running ends them within a second, however long they would take."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fork_server import ForkedServer
from support.messages import tensors
from support.processes import hearing_ctrl_c, run_python
from support.scrape import metric
from support.waiting import eventually

from lovasz.client import CallCancelledError, Joint, LossClient, LovaszSoftmax
from lovasz.client import remote as client_remote
from lovasz.client.submission import CallThreads
from lovasz.server.launch import ServerProcess

END_SECONDS = 15.0
"""A second, and what a busy machine may add."""


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server on which a rank without its peers waits for as long as the tests take."""
    path = tmp_path_factory.mktemp("interrupted") / "s"
    arguments = ["--device", "cpu", "--listen", f"unix:{path}", "--shared-memory", "--joint-timeout", "100"]
    with ForkedServer(arguments) as server:
        yield server


@pytest.mark.parametrize("transport", ["unary", "stream", "shm"])
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_exception_ends_submitted_calls(
    sharing: ServerProcess, kind: type[BaseException], transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_remote, "UNARY_BYTES", 4 << 20 if transport == "unary" else 0)
    monkeypatch.setattr(client_remote, "SHARED_BYTES", 0)
    run = f"{transport}-{kind.__name__}"
    client = LossClient(sharing.target, transport="shm" if transport == "shm" else "grpc")
    with pytest.raises(kind), client:  # noqa: PT012 - the exception is raised inside.
        # More than there are threads: some have not begun.
        futures = [client.submit(*tensors(8), LovaszSoftmax(), joint=Joint(run, 0, 2, step=step)) for step in range(20)]
        assert eventually(lambda: metric(sharing, "lovasz_joint_ranks_waiting") == 16)
        began = time.monotonic()
        raise kind
    assert time.monotonic() - began < END_SECONDS
    for future in futures:
        with pytest.raises(CallCancelledError, match="the client was closed"):
            future.result(timeout=10)
    assert eventually(lambda: metric(sharing, "lovasz_joint_ranks_waiting") == 0)


def test_without_an_exception_submitted_calls_are_waited_for(server: ServerProcess) -> None:
    with LossClient(server.target) as client:
        futures = [client.submit(*tensors(64), LovaszSoftmax()) for _ in range(20)]
    assert all(future.done() for future in futures)
    assert len({future.result().loss for future in futures}) == 1


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from support.messages import tensors
from lovasz.client import Joint, LossClient, LovaszSoftmax

def call(client, way):
    joint = Joint({run!r}, 0, 2, step=0)
    if way == "compute":
        client.compute(*tensors(8), LovaszSoftmax(), joint=joint)
    future = client.submit(*tensors(8), LovaszSoftmax(), joint=joint)
    if way == "result":
        future.result()
    time.sleep(60)

if {managed}:
    with LossClient({target!r}) as client:
        call(client, {way!r})
else:
    call(LossClient({target!r}), {way!r})
"""


@pytest.mark.parametrize("managed", [True, False], ids=["with", "without a with"])
@pytest.mark.parametrize("way", ["compute", "result", "elsewhere"])
def test_ctrl_c_ends_the_process(sharing: ServerProcess, way: str, managed: bool) -> None:
    tests = str(Path(__file__).parents[1])
    script = SCRIPT.format(tests=tests, run=f"{way}-{managed}", managed=managed, target=sharing.target, way=way)
    with hearing_ctrl_c():
        process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert eventually(lambda: metric(sharing, "lovasz_joint_ranks_waiting") == 1)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - began < END_SECONDS
    assert process.returncode == -signal.SIGINT
    assert said.splitlines()[-1] == "KeyboardInterrupt"
    assert eventually(lambda: metric(sharing, "lovasz_joint_ranks_waiting") == 0)


# --- The threads --------------------------------------------------------------------------------------------------


def test_threads_are_started_as_needed_and_end_with_their_owner() -> None:
    threads = CallThreads(3)
    before = threading.active_count()
    assert [threads.submit(lambda: 1).result(timeout=10) for _ in range(20)] == [1] * 20
    assert threading.active_count() <= before + 3
    go_on = threading.Event()
    running = [threads.submit(go_on.wait) for _ in range(9)]
    assert threading.active_count() == before + 3
    go_on.set()
    assert all(future.result(timeout=10) for future in running)
    del threads
    assert eventually(lambda: threading.active_count() == before)


def test_what_raises_and_what_is_cancelled() -> None:
    threads, go_on = CallThreads(1), threading.Event()
    running = threads.submit(go_on.wait)
    cancelled = threads.submit(lambda: 1)
    failed = threads.submit(lambda: 1 // 0)
    assert cancelled.cancel()
    threads.close(timeout_seconds=0.01)
    assert not running.done()
    go_on.set()
    threads.close()
    assert running.done()
    assert isinstance(failed.exception(), ZeroDivisionError)
    with pytest.raises(RuntimeError):
        threads.submit(lambda: 1)


@pytest.mark.parametrize("count", [1, 3])
def test_callbacks_may_close_them(count: int) -> None:
    """Also all at once: none waits for another one that closes them."""
    threads, go_on, closed = CallThreads(count), threading.Event(), threading.Semaphore(0)
    together = threading.Barrier(count)

    def close(_: object) -> None:
        together.wait(timeout=10)
        threads.close()
        closed.release()

    for _ in range(count):
        threads.submit(go_on.wait).add_done_callback(close)
    go_on.set()
    assert all(closed.acquire(timeout=10) for _ in range(count))


def test_a_forked_process_has_threads_of_its_own() -> None:
    code = (
        "import os, warnings; warnings.simplefilter('ignore')  # Python warns of forks of processes with threads.\n"
        "from lovasz.client.submission import CallThreads\n"
        "threads = CallThreads(1)\n"
        "answer = lambda: threads.submit(os.getpid).result(timeout=10) == os.getpid()\n"
        "before, child = answer(), os.fork()\n"
        "if child == 0: os._exit(0 if answer() else 1)\n"
        "print(before, os.waitpid(child, 0)[1], answer())"
    )
    assert run_python(code) == "True 0 True"


def test_a_start_that_is_interrupted_leaves_no_process() -> None:
    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, interrupt)
    starting = ServerProcess(["--device", "cpu"])
    main = threading.get_ident()
    timer = threading.Timer(0.3, lambda: signal.pthread_kill(main, signal.SIGUSR1))
    try:
        timer.start()
        with pytest.raises(Interrupted):
            starting.__enter__()
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    assert not Path(f"/proc/{starting.pid}").exists()
