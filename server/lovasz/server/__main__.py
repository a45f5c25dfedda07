"""``lovasz-server``: reads the configuration, serves until SIGTERM or SIGINT, drains, exits."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence

from lovasz.server.config import ConfigError, ServerConfig, unknown_variables
from lovasz.server.errors import DeviceError
from lovasz.server.memory.allocator import keep_freed_memory
from lovasz.server.observe import logs


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a server until it is told to stop.

    Returns:
        The exit status: 0 after a complete drain, 1 if requests were cut off, 2 for an invalid setting, or an address
        or a device that cannot be used.
    """
    try:
        config = ServerConfig.load(sys.argv[1:] if arguments is None else arguments, os.environ)
    except ConfigError as error:
        print(f"lovasz-server: {error}", file=sys.stderr)
        return 2
    logs.configure(config.log_level, config.log_format)
    keep_freed_memory()
    if unknown := unknown_variables(os.environ):
        logging.getLogger(__name__).warning("variables that set nothing", extra={"variables": unknown})
    stopping = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stopping.set())
    # Not earlier: it takes seconds to import torch, and an invalid flag should be reported at once.
    from lovasz.server.server import Server

    try:
        server = Server(config)
        server.start()
    except (DeviceError, OSError) as error:
        logging.getLogger(__name__).error(str(error))
        return 2
    stopping.wait()
    if server.stop():
        return 0
    # Threads that are stuck in requests that were cut off would keep the interpreter from exiting.
    logging.shutdown()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
