"""What a line of the file of tokens says about limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from lovasz.server.access.limits import Limits
from lovasz.server.access.tokens import Tokens
from lovasz.server.settings import ConfigError

ALICE, BOB = "alice-" + "a" * 20, "bob-" + "b" * 20


def tokens_of(folder: Path, text: str) -> Tokens:
    file = folder / "tokens"
    file.write_text(text)
    return Tokens("--tokens", str(file))


def test_limits_stand_after_one_of_the_tokens_of_a_name(tmp_path: Path) -> None:
    tokens = tokens_of(tmp_path, f"alice:{ALICE}  weight=2\tbudget=0.5\nalice:{BOB}\nbob:{'c' * 20}\n")
    assert tokens.name_of(ALICE) == tokens.name_of(BOB) == "alice"
    assert tokens.limits_of("alice") == Limits(budget=0.5, weight=2.0)
    assert tokens.limits_of("bob") == tokens.limits_of("nobody") == Limits()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("budget=0", "line 2: budget: got 0; expected a number > 0 and <= 1"),
        ("budget=1.5", "line 2: budget: got 1.5; expected"),
        ("budget=nan", "line 2: budget: got nan; expected"),
        ("budget=half", "line 2: budget: got 'half'; expected"),
        ("weight=0", "line 2: weight: got 0; expected a number from 0.01 to 100"),
        ("weight=101", "line 2: weight: got 101; expected"),
        ("weight", "line 2: weight: got ''; expected"),
        ("wait=2", "line 2: expected budget=SHARE and weight=NUMBER after the token"),
        ("weight=2 weight=2", "line 2: expected budget=SHARE and weight=NUMBER after the token, each at most once"),
    ],
)
def test_a_wrong_limit_is_named_with_its_line(tmp_path: Path, words: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        tokens_of(tmp_path, f"# trainers\nalice:{ALICE} {words}\n")
    assert f": {said}" in str(refused.value)
    assert ALICE not in str(refused.value)


def test_lines_of_one_name_do_not_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 2: another line of alice has other limits; expected the same"):
        tokens_of(tmp_path, f"alice:{ALICE} weight=2\nalice:{BOB} weight=3\n")
    assert tokens_of(tmp_path, f"alice:{ALICE} weight=2\nalice:{BOB} weight=2.0\n").limits_of("alice").weight == 2


def test_limits_are_read_again_and_stay_while_the_file_is_wrong(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = tokens_of(tmp_path, f"alice:{ALICE} weight=2\n")
    for text, weight in (("weight=many", 2), ("weight=3", 3), ("", 1)):
        (tmp_path / "tokens").write_text(f"alice:{ALICE} {text}\n")
        tokens.check()
        assert tokens.limits_of("alice").weight == weight
    (said,) = caplog.records
    assert "line 1: weight: got 'many'" in vars(said)["reason"]
