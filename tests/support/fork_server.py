"""Starts Python programs as forks of a process that has imported what they need: 0.6 s of CPU instead of 2.5 s.

They are real processes: each has its own memory, streams, environment, signals and exit status, and is a child of the
test's process. Tests of a start itself, of its cache, or of memory use the real command.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lovasz.server.launch import ServerProcess

READ_LATE = ("LOVASZ_", "GLOO_", "GRPC_EXPERIMENTAL_", "PYTEST_", "TORCHINDUCTOR_", "_TORCHINDUCTOR_")
"""Variables that have their effect after the imports, or none (PyTorch's compiler sets its own in the test's process).
If others differ, a program is started as usual."""

_TESTS = str(Path(__file__).parents[1])
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_starting = threading.Lock()


class Forked(subprocess.Popen[Any]):
    """``Popen`` of ``[sys.executable, "-m", module, ...]``, also with ``"-c", code`` or a script."""

    def _execute_child(self, *arguments: Any) -> None:
        """Starts the process. Popen itself calls this, with the same first 16 arguments in all versions of Python."""
        command, folder, environment, pipes = arguments[0], arguments[5], arguments[6], arguments[10:16]
        environment = dict(os.environ if environment is None else environment)
        with _starting:
            control, imported_with = _fork_server()
        differing = {name for name, _ in environment.items() ^ imported_with.items()}
        if control is None or not all(name.startswith(READ_LATE) for name in differing):
            super()._execute_child(*arguments)
            return
        streams = [pipe if pipe >= 0 else own for own, pipe in enumerate((pipes[0], pipes[3], pipes[5]))]
        program = json.dumps([command[1:], str(folder or os.getcwd()), environment])
        with _starting:
            _adopt_orphans(True)  # The program's parent ends at once; then the program becomes our child.
            try:
                socket.send_fds(control, [program.encode()], streams)
                self.pid = int(control.recv(64))
            except BaseException:  # The test's timeout, for one: what comes next would be the answer to this.
                _fork_server.cache_clear()
                raise
            finally:
                _adopt_orphans(False)
        self._child_created = True
        self._close_pipe_fds(*pipes)


class ForkedServer(ServerProcess):
    """A server that starts fast."""

    _popen = Forked


@cache
def _fork_server() -> tuple[socket.socket | None, dict[str, str]]:
    """The connection to this process's fork server, if there can be one, and the environment that it imported with."""
    environment = dict(os.environ)
    if sys.platform != "linux":
        return None, environment
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    number = theirs.fileno()
    process = subprocess.Popen(
        [sys.executable, __file__, str(number)],
        stdin=subprocess.DEVNULL,
        pass_fds=[number],
        # OpenBLAS would start threads, which a fork does not have. gRPC reads its variable when it is imported, before
        # the server's command could set it.
        env={"GRPC_VERBOSITY": "ERROR", **environment, "OPENBLAS_NUM_THREADS": "1"},
    )
    theirs.close()
    atexit.register(process.wait)
    atexit.register(ours.close)  # Ends it. Is called first.
    return (ours if ours.recv(64) else None), environment  # If it cannot fork, it has said why and ended.


def _adopt_orphans(adopts: bool) -> None:
    assert ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopts), 0, 0, 0) == 0


def _import_all() -> None:
    for module in ("lovasz.client.torch", "lovasz.server.server"):
        import_module(module)
    if find_spec("numba") is not None:
        import_module("lovasz.core.backends.numba.compute")
        cpu_target = import_module("numba.core.registry").cpu_target
        cpu_target.typing_context.refresh()  # Else the first compiled function that is loaded does it.
        cpu_target.target_context.refresh()
    assert len(os.listdir("/proc/self/task")) == 1, "a library has started threads; a fork would not have them"
    gc.freeze()


def _serve(control: socket.socket) -> tuple[list[str], str, dict[str, str]]:
    """Forks for each request. Returns in the new process alone: its command, folder and environment."""
    control.send(b"ready")
    while True:
        message, streams, _, _ = socket.recv_fds(control, 1 << 18, 3)
        if not message:
            sys.exit()
        reader, writer = os.pipe()
        if (parent := os.fork()) == 0:
            if (program := os.fork()) == 0:
                break
            os.write(writer, str(program).encode())
            os._exit(0)
        os.waitpid(parent, 0)
        control.send(os.read(reader, 64))
        for descriptor in (reader, writer, *streams):
            os.close(descriptor)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for descriptor in (reader, writer, *streams):
        os.close(descriptor)
    control.close()
    return tuple(json.loads(message))


if __name__ == "__main__":
    sys.path[0] = _TESTS
    _import_all()
    command, folder, environment = _serve(socket.socket(fileno=int(sys.argv[1])))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if command[0] == "-m":
        sys.argv[1:] = command[2:]
        sys.path.insert(0, folder)
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        sys.argv[:] = ["-c", *command[2:]]
        exec(command[1], {"__name__": "__main__"})
    else:
        sys.argv[:] = command
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")
