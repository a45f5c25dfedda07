"""The limit of calls at a time."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from lovasz.server.transport.call_limit import CallLimit


def test_as_many_calls_as_the_limit_go_on_and_no_more() -> None:
    limit = CallLimit(2)
    assert [limit.take() for _ in range(4)] == [True, True, False, False]
    limit.give_back()
    assert [limit.take() for _ in range(2)] == [True, False]


def test_a_call_that_ends_twice_is_a_fault() -> None:
    limit = CallLimit(1)
    assert limit.take()
    limit.give_back()
    with pytest.raises(ValueError, match="twice"):
        limit.give_back()


def test_calls_of_many_threads_are_all_counted() -> None:
    limit = CallLimit(3)

    def take_and_give_back(_: int) -> None:
        for _ in range(sum(limit.take() for _ in range(2))):
            limit.give_back()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(take_and_give_back, range(2000)))
    assert [limit.take() for _ in range(4)] == [True, True, True, False]
