"""TLS and tokens of a client: what it refuses, what it keeps to itself, and the commands' options for them."""

from __future__ import annotations

import argparse
import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from support.waiting import eventually

from lovasz.client import TLS, LossClient, LovaszSoftmax, TLSError, cli
from lovasz.client.access import Access
from lovasz.client.access_arguments import access_of, add_access_arguments
from lovasz.client.torch import RemoteLoss

TOKEN = "secret-" + "t" * 20


@pytest.mark.parametrize(
    "target",
    ["127.0.0.1:1", "[::1]:1", "localhost:1", "unix:/tmp/x", "ipv4:127.0.0.1:1,127.0.0.2:2", "dns:///localhost:1"],
)
def test_a_token_may_stay_on_this_host_without_tls(target: str) -> None:
    LossClient(target, token=TOKEN).close()


@pytest.mark.parametrize(
    "target",
    [
        "gpu7:1",
        "10.0.0.7:1",
        "ipv4:127.0.0.1:1,10.0.0.7:1",
        "dns://10.0.0.1/localhost:1",
        "xds:server",
        "a.localhost:1",
    ],
)
def test_a_token_goes_to_no_other_host_in_plain_text(target: str) -> None:
    for make in (lambda **options: LossClient(target, **options), lambda **options: _module(target, **options)):
        with pytest.raises(ValueError, match=r"token: it would go to .* in plain text") as refused:
            make(token=TOKEN)
        assert TOKEN not in str(refused.value)
    LossClient(target, token=TOKEN, allow_token_without_tls=True).close()
    LossClient(target, token=TOKEN, tls=TLS()).close()
    LossClient(target).close()


def _module(target: str, **options: Any) -> LossClient:
    return RemoteLoss(target, LovaszSoftmax(), **options).client


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    for options, said in (
        ({"token": "short"}, "token: got an invalid token"),
        ({"token": "white space in the token"}, "token: got an invalid token"),
        ({"token": TOKEN, "token_file": "x"}, "token_file: got a file and token, too; expected only one of them"),
        ({"token_file": tmp_path / "absent"}, "token_file: got '.*absent', which cannot be read: No such file"),
        ({"allow_token_without_tls": "false"}, "allow_token_without_tls: got 'false'; expected True or False"),
        ({"tls": True}, "tls: got bool; expected lovasz.client.TLS or None"),
        ({"tls": TLS(ca=tmp_path / "absent")}, "tls.ca: got '.*absent', which cannot be read: No such file"),
    ):
        with pytest.raises(ValueError, match=said):
            LossClient("127.0.0.1:1", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tls.key: got None with tls.cert; expected both or none of them"):
        TLS(cert="client.pem")
    with pytest.raises(ValueError, match=r"tls.cert: got None with tls.key"):
        TLS(key="client.key")


def test_a_token_is_neither_printed_nor_kept_in_pickles(tmp_path: Path) -> None:
    criterion = RemoteLoss("127.0.0.1:1", LovaszSoftmax(), token=TOKEN)
    assert TOKEN not in repr(criterion.client.options)
    assert TOKEN.encode() not in pickle.dumps(criterion)
    copied = copy.deepcopy(criterion)
    assert copied.client.options.access.authorization("127.0.0.1:1").metadata()[0][1] == f"Bearer {TOKEN}"
    with pytest.raises(ValueError, match="token: it is not kept in pickles; expected token_file="):
        _ = pickle.loads(pickle.dumps(criterion)).client
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    by_file = RemoteLoss("127.0.0.1:1", LovaszSoftmax(), token_file=tmp_path / "token")
    pickle.loads(pickle.dumps(by_file)).client.close()


def test_an_error_keeps_its_check_in_pickles() -> None:
    error = pickle.loads(pickle.dumps(TLSError("gpu7:1: expired", "expired")))
    assert (str(error), error.check) == ("gpu7:1: expired", "expired")


def test_a_token_file_is_read_again_and_what_it_held_counts_while_it_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    authorization = Access.parsed(None, None, file, False).authorization("127.0.0.1:1")
    assert authorization.metadata() == (("authorization", f"Bearer {TOKEN}"),)
    file.write_text("")
    authorization._read_at = -1e9
    assert authorization.metadata() == (("authorization", f"Bearer {TOKEN}"),)
    file.write_text("u" * 20)
    assert eventually(lambda: authorization.metadata() == (("authorization", "Bearer " + "u" * 20),))


def test_options_win_over_variables(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_access_arguments(parser)

    def access(*words: str, **variables: str) -> Access:
        return access_of(parser.parse_args(words), {f"LOVASZ_{name}": value for name, value in variables.items()})

    assert access() == Access()
    assert access("--tls").tls == TLS()
    assert access(TLS_CA="ca.pem").tls == TLS(ca="ca.pem")
    assert access("--tls-ca", "own.pem", TLS_CA="ca.pem", TLS_SERVER_NAME="gpu7").tls == TLS(
        ca="own.pem", server_name="gpu7"
    )
    assert access(TLS_CLIENT_CERT="a", TLS_CLIENT_KEY="b").tls == TLS(cert="a", key="b")
    by_variable = access(TOKEN=TOKEN, TOKEN_FILE="file")
    assert by_variable.token is not None
    assert (by_variable.token.reveal(), by_variable.token_file) == (TOKEN, None)
    by_option = access("--token-file", "own", TOKEN=TOKEN)
    assert (by_option.token, by_option.token_file) == (None, "own")
    assert access(TOKEN_FILE="file", TOKEN="").token_file == "file"
    assert access("--allow-token-without-tls").allow_token_without_tls


def test_the_command_makes_a_token_and_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tokens"
    tokens = []
    for name in ("alice", "bob"):
        assert cli.main(["token", name, "--tokens", str(file)]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        tokens.append(out.strip())
    assert file.stat().st_mode & 0o777 == 0o600
    assert [line.split(":")[0] for line in file.read_text().splitlines()] == ["alice", "bob"]
    assert not any(token in file.read_text() for token in tokens)
    file.write_text("carol:" + "c" * 20)  # An editor that writes no end of line.
    assert cli.main(["token", "dave", "--tokens", str(file)]) == 0
    assert [line.split(":")[0] for line in file.read_text().splitlines()] == ["carol", "dave"]
    assert cli.main(["token", "erin"]) == 0
    assert capsys.readouterr().err.startswith("erin:sha256:")
    with pytest.raises(SystemExit):
        cli.main(["token", "a b"])


def test_a_further_token_of_a_name_gets_its_limits(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("# alice: weight=9\nalice:sha256:old budget=0.5 weight=2\nalicia:sha256:other weight=3")
    assert cli.main(["token", "alice", "--tokens", str(file)]) == 0
    assert cli.main(["token", "bob", "--tokens", str(file)]) == 0
    *_, alice, bob = file.read_text().splitlines()
    assert alice.startswith("alice:sha256:")
    assert alice.split(" ")[1:] == ["budget=0.5", "weight=2"]
    assert bob.split(" ")[1:] == []
