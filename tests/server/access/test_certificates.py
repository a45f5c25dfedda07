"""The files of a TLS server: pairs that fit, pairs that are being replaced, and files that are none."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support.certificates import Authority, Pair

from lovasz.server.access.certificates import certificate_files
from lovasz.server.access.watched_files import WatchedFiles
from lovasz.server.access_settings import AccessSettings
from lovasz.server.settings import ConfigError


def settings_of(pair: Pair, client_ca: Path | None = None) -> AccessSettings:
    return AccessSettings(str(pair.cert), str(pair.key), "" if client_ca is None else str(client_ca))


def test_without_tls_there_are_no_files() -> None:
    assert certificate_files(AccessSettings()) is None


def test_a_pair_of_which_only_one_half_is_new_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    ca = Authority(tmp_path, "ca")
    served, renewed = ca.sign("served"), ca.sign("renewed")
    files = certificate_files(settings_of(served, ca.path))
    assert files is not None
    before = files.value
    served.cert.write_bytes(renewed.cert.read_bytes())
    for _ in range(3):
        files.check()
    assert files.value is before
    (said,) = caplog.records
    assert "the key is not that of the certificate (if both are being replaced: not yet)" in vars(said)["reason"]
    served.key.write_bytes(renewed.key.read_bytes())
    files.check()
    assert files.value.chain == renewed.cert.read_bytes()
    assert files.value.key == renewed.key.read_bytes()
    assert files.value.client_ca == ca.path.read_bytes()
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    ca = Authority(tmp_path, "ca")
    pair, other = ca.sign("server"), ca.sign("other")
    empty, locked = tmp_path / "empty", tmp_path / "locked.key"
    empty.write_bytes(b"")
    command = ["openssl", "pkey", "-in", pair.key, "-aes256", "-passout", "pass:secret", "-out", locked]
    subprocess.run(command, check=True, capture_output=True)
    for settings, said in {
        settings_of(Pair(pair.cert, other.key)): "the key is not that of the certificate",
        settings_of(Pair(pair.cert, locked)): "the key has a password; expected one without",
        settings_of(Pair(empty, pair.key)): "PEM",
        settings_of(Pair(pair.cert, empty)): "PEM",
        settings_of(pair, empty): "Empty certificate data",
        settings_of(Pair(pair.cert, tmp_path / "absent")): "No such file or directory",
    }.items():
        with pytest.raises(ConfigError) as refused:
            certificate_files(settings)
        text = str(refused.value)
        assert text.startswith(f"--tls-cert {settings.tls_cert_file}, --tls-key {settings.tls_key_file}")
        assert said in text


def test_a_key_is_not_printed(tmp_path: Path) -> None:
    pair = Authority(tmp_path, "ca").sign("server")
    files = certificate_files(settings_of(pair))
    assert isinstance(files, WatchedFiles)
    assert "PRIVATE KEY" not in repr(files.value)
