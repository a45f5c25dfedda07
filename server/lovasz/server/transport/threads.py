"""The threads of calls: each call takes one, and a call that would find none is refused at once."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
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
_REFUSAL_SECONDS = 0.005
"""How long each takes for a refusal, at least: callers that ask again at once would keep the interpreter busy."""


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
    """Threads for so many calls of gRPC. gRPC's own limit would count the calls of the health service, too.

    A call that finds none is run all the same, in one of a few other threads, where :attr:`refuses_here` says so to its
    method: gRPC has no other way to end it.
    """

    def __init__(self, most: int, lanes: Lanes, most_of_connection: int | None = None) -> None:
        """No calls.

        Args:
            lanes: which calls go on. A call that waits for its turn takes no thread.
            most_of_connection: how many of the calls may be of one connection; None: all.
        """
        self._threads, self._most, self._lanes = WarmThreads(most, "call"), most, lanes
        self._most_of_connection = most if most_of_connection is None else most_of_connection
        self._here = threading.local()
        self._refusing = ThreadPoolExecutor(_REFUSING_THREADS, "refusal", initializer=self._refuse_here)
        self._lock = threading.Lock()
        self._calls = 0
        self._calls_of: Counter[str] = Counter()

    def start_all(self) -> None:
        """Starts all threads.

        Raises:
            RuntimeError: the system refuses one.
        """
        self._threads.start_all()
        start_all(self._refusing, _REFUSING_THREADS)

    @property
    def is_full(self) -> bool:
        """Whether there is a call for each thread."""
        return self._calls >= self._most

    @property
    def refuses_here(self) -> bool:
        """Whether the call that this thread serves has to be refused."""
        return getattr(self._here, "refuses", False)

    def submit(self, call: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        connection = _connection(arguments)
        if not self._begin(connection):
            return self._refusing.submit(call, *arguments, **options)
        future: Future[Any] = Future()
        place = Place(connection)

        def work() -> None:
            with self._lanes.served(place):
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(call(*arguments, **options))
                    except BaseException as error:
                        future.set_exception(error)
            self._end(connection)

        self._lanes.begin(place, lambda: self._threads.put(work))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the threads. gRPC has ended all calls before."""
        self._threads.stop(wait=wait)
        self._refusing.shutdown(wait=wait, cancel_futures=cancel_futures)

    def _refuse_here(self) -> None:
        self._here.refuses = True

    def _begin(self, connection: str) -> bool:
        """Counts a call if there is a thread for it."""
        with self._lock:
            if self._calls >= self._most or self._calls_of[connection] >= self._most_of_connection:
                return False
            self._calls += 1
            self._calls_of[connection] += 1
            return True

    def _end(self, connection: str) -> None:
        with self._lock:
            self._calls -= 1
            self._calls_of[connection] -= 1
            if not self._calls_of[connection]:
                del self._calls_of[connection]


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


class LimitedHandler(grpc.GenericRpcHandler):
    """The methods of a service, each with a stream of requests. Calls without a thread are refused."""

    def __init__(self, service: grpc.GenericRpcHandler, threads: CallThreads, metrics: Metrics) -> None:
        self._service, self._threads, self._metrics = service, threads, metrics
        self._limited: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        self._log = Sparingly(logging.getLogger(__name__))

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = handler_call_details.method
        if method not in self._limited:
            handler = self._service.service(handler_call_details)
            if handler is None:
                return None
            self._limited[method] = self._with_limit(handler, method.rpartition("/")[2])
        return self._limited[method]

    def _with_limit(self, handler: grpc.RpcMethodHandler[Any, Any], method: str) -> grpc.RpcMethodHandler[Any, Any]:
        answers = handler.stream_stream is not None
        behavior: Any = handler.stream_stream or handler.stream_unary

        def answer(messages: Iterator[Any], context: grpc.ServicerContext) -> Any:
            if self._threads.refuses_here:
                self._refuse(method, context)
            return behavior(messages, context)

        make = grpc.stream_stream_rpc_method_handler if answers else grpc.stream_unary_rpc_method_handler
        return make(answer, handler.request_deserializer, handler.response_serializer)

    def _refuse(self, method: str, context: grpc.ServicerContext) -> NoReturn:
        time.sleep(_REFUSAL_SECONDS)
        error = too_many_calls()
        status = status_of(error)
        assert status.rejection is not None
        self._metrics.count_unread(method, status.code.name, status.rejection, CALLER_NAME.get())
        self._log.warning(TOO_MANY_CALLS, peer=context.peer())
        context.set_trailing_metadata(((PUSHBACK_KEY, str(error.retry_after_milliseconds)),))
        context.abort(status.code, str(error))
