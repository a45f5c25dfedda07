"""The threads of calls: each call takes one, and a call that would find none is refused at once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NoReturn

import grpc

from lovasz.server.errors import NoRequestsLeftError
from lovasz.server.observe.logs import Sparingly
from lovasz.server.observe.metrics import Metrics
from lovasz.server.transport.identity import CALLER_NAME, Identity
from lovasz.server.transport.lanes import Lanes, Place
from lovasz.server.transport.status import status_of
from lovasz.server.transport.warm_threads import WarmThreads
from lovasz.wire import PUSHBACK_KEY

TOO_MANY_CALLS = "too many calls at a time"
"""What the log says."""
_RETRY_SECONDS = 1.0
"""How long a caller that is refused is told to wait."""
_REFUSING_THREADS = 2


def too_many_calls() -> NoRequestsLeftError:
    """What callers are told for whom no thread is free."""
    return NoRequestsLeftError(f"{TOO_MANY_CALLS} (--max-requests)", _RETRY_SECONDS)


def start_all(pool: ThreadPoolExecutor, most: int) -> None:
    """Starts all threads of a pool, which by itself starts each when it is needed, and may fail then.

    Raises:
        RuntimeError: the system refuses one.
    """
    go_on = threading.Event()
    try:
        for _ in range(most):
            ThreadPoolExecutor.submit(pool, go_on.wait)
    finally:
        go_on.set()


class OwnThreads:
    """A part of the server with threads of its own, so that it answers whatever other threads are busy with."""

    def __init__(self, most: int, name: str) -> None:
        self._own_threads = ThreadPoolExecutor(most, thread_name_prefix=name)
        self._most_threads = most

    def start_threads(self) -> None:
        """Starts all threads.

        Raises:
            RuntimeError: the system refuses one.
        """
        start_all(self._own_threads, self._most_threads)

    def end_threads(self, *, wait: bool) -> None:
        """Ends the threads; waits for them if ``wait``."""
        self._own_threads.shutdown(wait=wait, cancel_futures=True)

    def run_here(self, method: Any) -> None:
        """Has gRPC run a method in these threads."""
        method.experimental_thread_pool = self._own_threads


class CallThreads(Executor):
    """Threads for so many calls of gRPC. gRPC's own limit would count the calls of the health service, too."""

    def __init__(self, most: int, lanes: Lanes) -> None:
        """No calls.

        Args:
            lanes: which calls go on. A call that waits for its turn takes no thread.
        """
        self._threads, self._most, self._lanes = WarmThreads(most, "call"), most, lanes
        self._lock = threading.Lock()
        self._calls = 0

    def start_all(self) -> None:
        """Starts all threads.

        Raises:
            RuntimeError: the system refuses one.
        """
        self._threads.start_all()

    @property
    def is_full(self) -> bool:
        """Whether there is a call for each thread."""
        return self._calls >= self._most

    def submit(self, call: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        place = Place(_connection(arguments))

        def work() -> None:
            with self._lanes.served(place):
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(call(*arguments, **options))
                    except BaseException as error:
                        future.set_exception(error)
            self._count(-1)

        self._count(1)
        self._lanes.begin(place, lambda: self._threads.put(work))
        return future

    def _count(self, change: int) -> None:
        with self._lock:
            self._calls += change

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the threads. gRPC has ended all calls before."""
        self._threads.stop(wait=wait)


def _connection(arguments: Iterable[Any]) -> str:
    """Names the connection of a call, before it has a thread; empty if it cannot be told.

    Args:
        arguments: what gRPC submits, among them its event. What that has is not documented, but a context has nothing
            else. If a later gRPC has something else there, all its calls count as those of one connection.
    """
    event: Any = next((argument for argument in arguments if hasattr(argument, "invocation_metadata")), None)
    try:
        return Identity.at(event.call.peer().decode(), event.invocation_metadata)
    except (AttributeError, TypeError, ValueError):
        return ""


class LimitedHandler(OwnThreads, grpc.GenericRpcHandler):
    """The methods of a service while a thread is free; else a refusal, from threads of its own."""

    def __init__(self, service: grpc.GenericRpcHandler, threads: CallThreads, metrics: Metrics) -> None:
        super().__init__(_REFUSING_THREADS, "refusal")
        self._service, self._threads, self._metrics = service, threads, metrics
        self._log = Sparingly(logging.getLogger(__name__))

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = self._service.service(handler_call_details)
        if handler is None or not self._threads.is_full:
            return handler
        refuse = partial(self._refuse, handler_call_details.method.rpartition("/")[2])
        self.run_here(refuse)
        return grpc.stream_unary_rpc_method_handler(refuse)

    def _refuse(self, method: str, _: object, context: grpc.ServicerContext) -> NoReturn:
        error = too_many_calls()
        status = status_of(error)
        assert status.rejection is not None
        self._metrics.count_unread(method, status.code.name, status.rejection, CALLER_NAME.get())
        self._log.warning(TOO_MANY_CALLS, peer=context.peer())
        context.set_trailing_metadata(((PUSHBACK_KEY, str(error.retry_after_milliseconds)),))
        context.abort(status.code, str(error))
