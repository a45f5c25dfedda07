"""``lovasz-server``: reads the configuration, serves until SIGTERM, SIGINT or SIGHUP, drains, exits."""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import NoReturn

from lovasz.server.config import ServerConfig, unknown_variables
from lovasz.server.errors import DeviceError
from lovasz.server.memory.allocator import keep_freed_memory
from lovasz.server.observe import logs
from lovasz.server.settings import ConfigError
from lovasz.version import VERSION

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
_MOST_DESCRIPTORS = 1 << 16
_STOP_SECONDS = 30.0
"""How long a stop may take beyond --drain-seconds."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a server until it is told to stop.

    Returns:
        The exit status: 0 after a complete drain, or if it was told to stop while it started; 1 if requests were cut
        off; 2 for an invalid setting, or an address or a device that cannot be used, or threads that cannot start; 3 if
        its device or its gRPC no longer answered.
    """
    _hold_standard_descriptors()
    try:
        config = ServerConfig.load(sys.argv[1:] if arguments is None else arguments, os.environ)
    except ConfigError as error:
        print(f"lovasz-server: {error}", file=sys.stderr)
        return 2
    logs.configure(config.log_level, config.log_format)
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # Else each failed handshake of a stranger is a line on stderr.
    keep_freed_memory()
    _raise_descriptor_limit()
    if unknown := unknown_variables(os.environ):
        _log.warning("variables that are not settings", extra={"variables": unknown})
    _on_signals(lambda: _exit_at_once(0))  # Nothing listens yet.
    _log.info("starting", extra={"version": VERSION, "device": config.device})
    stopping = _Stopping()
    # Not earlier: it takes seconds to import torch, and an invalid flag should be reported at once.
    try:
        with _imports_that_stay():
            from lovasz.server.server import Server
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("lovasz."):
            raise
        _log.error(f"the server needs {error.name}: pip install 'lovasz[server,cpu]'")
        return 2

    _on_signals(stopping.set_by_signal)
    try:
        server = Server(config, stopping)
        ready = server.start()
    except (ConfigError, DeviceError, OSError) as error:
        _log.error(str(error))
        return 2
    if not ready:
        server.abandon()
        _log.info("stopped while it started")
        _exit_at_once(0)  # A compilation cannot be interrupted.
    stopping.wait_here()
    if server.failure:
        _end_in(_STOP_SECONDS)
        server.abandon()
        _exit_at_once(3)
    _end_in(config.drain_seconds + _STOP_SECONDS)
    finished = server.stop()
    # Not by returning: if it did not finish, threads are stuck in requests; if it did, nothing is left to do, and the
    # interpreter would spend half a second to take torch apart.
    _exit_at_once(0 if finished else 1)


@contextmanager
def _imports_that_stay() -> Iterator[None]:
    """Lets the garbage collector pass over what is imported: half a million objects, which are never garbage.

    To look at them again and again while more is imported takes a fifth of a start.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _hold_standard_descriptors() -> None:
    """Opens those of standard input, output and error that are closed.

    Else a caller's connection could get the number of one, and what libraries print would be sent to it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # Takes the lowest number that is free.


def _raise_descriptor_limit() -> None:
    """Lets the process have as many file descriptors as the system allows it.

    The soft limit is often 1024, for programs that use select(2). All clients together would have 128 regions of shared
    memory then.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class _Stopping(threading.Event):
    """Set by signals, too. Their handler may interrupt code that holds an event's lock: it must not take that."""

    def __init__(self) -> None:
        super().__init__()
        self._signals: SimpleQueue[None] = SimpleQueue()  # Whose ``put`` may interrupt its other methods.
        self._by_signal = False

    def set_by_signal(self) -> None:
        self._by_signal = True
        self._signals.put(None)

    def is_set(self) -> bool:
        return self._by_signal or super().is_set()

    def wait_here(self) -> None:
        """Waits in the thread that signals interrupt. Not for one of them, as others set the event, too."""
        while not self.is_set():
            with suppress(Empty):
                self._signals.get(timeout=_LOOK_SECONDS)


def _on_signals(act: Callable[[], object]) -> None:
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signum is signal.SIGHUP and signal.getsignal(signum) is signal.SIG_IGN:
            continue  # By nohup.
        signal.signal(signum, lambda *_: act())


def _end_in(seconds: float) -> None:
    """Lets the process end after this time, whatever its threads do then.

    The first process of a container ignores SIGALRM, and a full pipe could hold up the other way, which writes where
    threads are: a hundred, the youngest first. So the main thread's place is written before that.
    """
    with suppress(RuntimeError, ValueError, OSError):  # There is no standard error, or no more threads can start.
        faulthandler.dump_traceback_later(seconds + 1, exit=True)
        teller = threading.Timer(seconds, _tell_where_it_hangs, (threading.main_thread().ident,))
        teller.daemon = True
        teller.start()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds + 2)


def _tell_where_it_hangs(thread: int) -> None:
    stack = "".join(traceback.format_stack(sys._current_frames()[thread]))
    print(f"lovasz-server: the stop hangs in\n{stack}", file=sys.stderr, flush=True)


def _exit_at_once(status: int) -> NoReturn:
    """Ends the process without waiting for its threads."""
    logging.shutdown()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
