"""The tokens file: what a line may be, whose a token is, and what happens when the file changes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from lovasz.server.access.limits import Limits
from lovasz.server.access.tokens import MAX_NAMES, Tokens, bearer
from lovasz.server.settings import ConfigError

ALICE, BOB = "alice-" + "a" * 20, "bob/+=~._" + "b" * 20


def tokens_of(folder: Path, text: str) -> Tokens:
    file = folder / "tokens"
    file.write_text(text)
    return Tokens("--tokens", str(file))


def test_whose_a_token_is(tmp_path: Path) -> None:
    hashed = hashlib.sha256(BOB.encode()).hexdigest()
    tokens = tokens_of(tmp_path, f"# trainers\n\nalice:{ALICE}\n  bob.2:sha256:{hashed.upper()}  \n")
    assert tokens.names == {"alice", "bob.2"}
    assert (tokens.name_of(ALICE), tokens.name_of(BOB)) == ("alice", "bob.2")
    for unknown in ("", "alice", ALICE[:-1], ALICE + "a", hashed, f"sha256:{hashed}", "\udcff" * 20, "ä" * 20):
        assert tokens.name_of(unknown) is None


def test_a_name_may_have_several_tokens_and_a_token_only_one_name(tmp_path: Path) -> None:
    tokens = tokens_of(tmp_path, f"alice:{ALICE}\nalice:{BOB}\nalice:{BOB}\n")
    assert (tokens.name_of(ALICE), tokens.name_of(BOB)) == ("alice", "alice")
    with pytest.raises(ConfigError, match="line 2: the token of bob is that of another name, too"):
        tokens_of(tmp_path, f"alice:{ALICE}\nbob:{ALICE}\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("alice\n", "line 1: expected name:token or name:sha256:HASH"),
        ("# x\nal ice:" + ALICE, "line 2: expected name:token or name:sha256:HASH, with a name of 1 to 64 letters"),
        (":" + ALICE, "line 1: expected"),
        ("a" * 65 + ":" + ALICE, "line 1: expected"),
        ("alice:too-short", "line 1: expected name:token or name:sha256:HASH, with a token of 16 to 512 letters"),
        ("alice:sha256:" + "0" * 63, "line 1: expected"),
        ("alice:white space in it", "line 1: expected"),
        ("# nothing\n\n", "no token; expected name:token or name:sha256:HASH in each line"),
        ("", "no token"),
        ("".join(f"n{i}:{'t' * 20}{i}\n" for i in range(MAX_NAMES + 1)), "257 different names; expected at most 256"),
    ],
)
def test_a_line_that_is_wrong_is_named_without_its_token(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        tokens_of(tmp_path, text)
    assert str(refused.value).startswith(f"--tokens {tmp_path / 'tokens'}: {said}")
    assert not any(secret in str(refused.value) for secret in (ALICE, "too-short", "white space", "0" * 63))


def test_a_file_that_is_no_text_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_bytes(b"alice:\xff\xfe")
    with pytest.raises(ConfigError, match="not a text in UTF-8"):
        Tokens("--tokens", str(tmp_path / "tokens"))
    with pytest.raises(ConfigError, match=r"--tokens .*/absent: No such file or directory"):
        Tokens("--tokens", str(tmp_path / "absent"))


def test_what_the_file_said_before_holds_while_it_is_wrong(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    tokens = tokens_of(tmp_path, f"alice:{ALICE}\n")
    file = tmp_path / "tokens"
    for wrong in (f"alice:{ALICE}\nbob:", "", None):
        if wrong is None:
            file.unlink()
        else:
            file.write_text(wrong)
        caplog.clear()
        for _ in range(3):
            tokens.check()
        (said,) = caplog.records
        assert said.getMessage() == "files changed and cannot be used: the old contents stay in use"
        assert ALICE not in str(vars(said))
        assert tokens.name_of(ALICE) == "alice"
        assert not tokens.is_valid
    caplog.clear()
    file.write_text(f"bob:{BOB}\n")
    tokens.check()
    tokens.check()
    assert [record.getMessage() for record in caplog.records] == ["files were read again"]
    assert (tokens.name_of(ALICE), tokens.name_of(BOB), tokens.names) == (None, "bob", {"bob"})
    assert tokens.is_valid


def test_a_pipe_is_read_once(caplog: pytest.LogCaptureFixture) -> None:
    """As that of ``--tokens <(command)``."""
    reader, writer = os.pipe()
    os.write(writer, f"alice:{ALICE}".encode())
    os.close(writer)
    tokens = Tokens("--tokens", f"/dev/fd/{reader}")
    tokens.check()
    os.close(reader)
    assert tokens.is_valid
    assert tokens.name_of(ALICE) == "alice"
    assert not caplog.records


@pytest.mark.timeout(20)
def test_a_file_that_becomes_a_named_pipe_holds_up_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens = tokens_of(tmp_path, f"alice:{ALICE}")
    (tmp_path / "tokens").unlink()
    os.mkfifo(tmp_path / "tokens")
    for _ in range(2):
        tokens.check()
    assert not tokens.is_valid
    assert tokens.name_of(ALICE) == "alice"
    assert [vars(said)["reason"] for said in caplog.records] == ["not a regular file any more"]


def test_a_file_that_becomes_wrong_again_is_told_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    right, file = f"alice:{ALICE}\n", tmp_path / "tokens"
    tokens = tokens_of(tmp_path, right)
    for text in ("", right, ""):
        file.write_text(text)
        tokens.check()
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]


@pytest.mark.parametrize(
    ("value", "token"),
    [
        ("Bearer abc", "abc"),
        ("bearer   abc ", "abc"),
        ("Basic abc", None),
        ("abc", None),
        ("Bearer", None),
        ("Bearer ", None),
        ("", None),
    ],
)
def test_the_token_in_an_authorization_header(value: str, token: str | None) -> None:
    assert bearer(value) == token


# --- Limits -------------------------------------------------------------------------------------------------------


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
