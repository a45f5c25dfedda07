"""The log's lines: what callers wrote cannot steer the terminal of whoever reads them."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import pytest

from lovasz.server.observe.logs import JsonFormatter, Sparingly, TextFormatter


def record(event: str, **fields: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"msg": event, "levelno": logging.INFO, "levelname": "INFO", "name": "lovasz"})
    vars(made).update(fields)
    return made


@pytest.mark.parametrize("run", ["\x1b[2J", "a\x07b", "\x9b31m", "a\x7f", "x\u202ey", "two\nlines"])
def test_control_characters_are_escaped(run: str) -> None:
    line = TextFormatter().format(record(f"broken {run}", run=run))
    assert line.isprintable()
    assert json.dumps(run) in line
    assert json.loads(JsonFormatter().format(record("broken", run=run)))["run"] == run
    assert JsonFormatter().format(record("broken", run=run)).isprintable()


def test_other_texts_are_shown_as_they_are() -> None:
    line = TextFormatter().format(record("broken", run="cityscapes-7", rank=3, note="of Lovász", none=""))
    assert line.endswith(' INFO broken run=cityscapes-7 rank=3 note="of Lov\\u00e1sz" none=""')


def test_of_many_events_one_a_second_is_logged_at_its_level(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("sparingly")
    sparingly = Sparingly(logger)
    with caplog.at_level(logging.WARNING, "sparingly"):
        sparingly.warning("full", peer="a")
        sparingly.warning("full", peer="b")
        Sparingly(logger).info("quiet")
    assert [(one.levelname, one.getMessage()) for one in caplog.records] == [("WARNING", "full")]


def test_of_many_events_a_few_a_second_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    sparingly = Sparingly(logging.getLogger("sparingly"), most=3)
    with caplog.at_level(logging.INFO, "sparingly"):
        for number in range(100):
            sparingly.info("full", number=number)
        sparingly._last.append(-math.inf)  # Two seconds later.
        sparingly._last.rotate(1)
        sparingly.info("full", number=100)
    logged: list[Any] = caplog.records
    assert [(one.number, one.unlogged) for one in logged] == [(0, 0), (1, 0), (2, 0), (100, 97)]
