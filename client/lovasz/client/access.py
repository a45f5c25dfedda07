"""What a client shows a server, and whom it trusts: TLS and tokens."""

from __future__ import annotations

import contextlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import grpc

from lovasz.client.target import addresses_of, is_loopback
from lovasz.spec.checks import flag
from lovasz.wire import socket_path

FilePath = str | os.PathLike[str]

_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{16,512}")
_AUTHORIZATION = "authorization"
_READ_AGAIN_SECONDS = 1.0


@dataclass(frozen=True)
class TLS:
    """An encrypted connection to a server that proves who it is. ::

        LossClient("gpu7.example.org:50051", tls=TLS(ca="ca.pem", cert="trainer.pem", key="trainer.key"))

    The files are read when a client connects for the first time. No effect in process and on a Unix socket.

    Args:
        ca: file with the CAs (PEM) of which one has signed the server's certificate; None: the public CAs that gRPC
            brings.
        cert: file with this client's own certificate and its chain (PEM), if the server asks for one.
        key: file with its private key (PEM, without a password).
        server_name: the host name that the server's certificate must have, if it is not that of the target.

    Raises:
        ValueError: ``cert`` comes without ``key``, or ``key`` without ``cert``.
    """

    ca: FilePath | None = None
    cert: FilePath | None = None
    key: FilePath | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            got, missing = ("cert", "key") if self.key is None else ("key", "cert")
            raise ValueError(f"tls.{missing}: got None with tls.{got}; expected both or none of them")


class Secret:
    """A token that is in memory alone: it is not shown when printed, and not kept in pickles, such as checkpoints."""

    def __init__(self, text: str | None) -> None:
        self._text = text

    def reveal(self) -> str:
        """The token.

        Raises:
            ValueError: it came out of a pickle.
        """
        if self._text is None:
            raise ValueError("token: it is not kept in pickles; expected token_file=, whose path is kept")
        return self._text

    def __repr__(self) -> str:
        return "Secret(...)"

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: object) -> Secret:
        return self

    def __reduce__(self) -> tuple[type[Secret], tuple[None]]:
        return Secret, (None,)


@dataclass(frozen=True)
class Access:
    """TLS and token of a client.

    Attributes:
        tls: None: plain text.
        token: the token itself; None: it is in ``token_file``, or there is none.
        token_file: a file that holds the token alone.
        allow_token_without_tls: whether the token may go in plain text to another host.

    Raises:
        ValueError: both a token and a file are given, or the token is invalid.
    """

    tls: TLS | None = None
    token: Secret | None = None
    token_file: FilePath | None = None
    allow_token_without_tls: bool = False

    def __post_init__(self) -> None:
        if self.tls is not None and not isinstance(self.tls, TLS):
            raise ValueError(f"tls: got {type(self.tls).__name__}; expected lovasz.client.TLS or None")
        name = "allow_token_without_tls"
        object.__setattr__(self, name, flag(name, self.allow_token_without_tls))
        if self.token is not None and self.token_file is not None:
            raise ValueError("token_file: got a file and token, too; expected only one of them")

    @classmethod
    def parsed(
        cls,
        tls: TLS | None,
        token: str | None,
        token_file: FilePath | None,
        allow_token_without_tls: bool,
    ) -> Access:
        """From the arguments of :class:`LossClient`.

        Raises:
            ValueError: an argument is invalid.
        """
        secret = None if token is None else Secret(_checked("token", token))
        return cls(tls, secret, token_file, allow_token_without_tls)

    def channel(self, target: str, options: tuple[tuple[str, str | int], ...]) -> grpc.Channel:
        """A channel of gRPC with these options.

        Raises:
            ValueError: a file of ``tls`` cannot be read.
        """
        if self.tls is None or socket_path(target) is not None:
            return grpc.insecure_channel(target, options=options)
        if self.tls.server_name is not None:
            options = (*options, ("grpc.ssl_target_name_override", self.tls.server_name))
        return grpc.secure_channel(target, _credentials(self.tls), options=options)

    def authorization(self, target: str) -> Authorization:
        """What shows the token to a server.

        Raises:
            ValueError: the token would go to another host in plain text, or its file cannot be used.
        """
        if self.token is None and self.token_file is None:
            return Authorization(None, None)
        if self.tls is None and not self.allow_token_without_tls and not _is_on_this_host(target):
            raise ValueError(
                f"token: it would go to {target} in plain text, where others can read it; expected tls=, or "
                "allow_token_without_tls=True"
            )
        return Authorization(None if self.token is None else self.token.reveal(), self.token_file)


class Authorization:
    """The metadata that shows a token. A file is read again when it changes, within a second."""

    def __init__(self, token: str | None, file: FilePath | None) -> None:
        """Reads the file if there is one.

        Raises:
            ValueError: it cannot be read, or holds no token.
        """
        self._file = file
        self._metadata = () if token is None else _metadata(token)
        self._read_at = time.monotonic()
        if file is not None:
            self._metadata = _metadata(_read_token(file))

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """gRPC's metadata of a call. While the file holds no token, what it held before counts."""
        if self._file is not None and time.monotonic() - self._read_at > _READ_AGAIN_SECONDS:
            self._read_at = time.monotonic()
            with contextlib.suppress(ValueError):
                self._metadata = _metadata(_read_token(self._file))
        return self._metadata


def _credentials(tls: TLS) -> grpc.ChannelCredentials:
    """The same for gRPC.

    Raises:
        ValueError: a file cannot be read.
    """
    return grpc.ssl_channel_credentials(
        *(_contents(f"tls.{name}", getattr(tls, name)) for name in ("ca", "key", "cert"))
    )


def _metadata(token: str) -> tuple[tuple[str, str], ...]:
    return ((_AUTHORIZATION, f"Bearer {token}"),)


def _read_token(file: FilePath) -> str:
    contents = _contents("token_file", file)
    assert contents is not None
    return _checked("token_file", contents.decode("utf-8", errors="replace").strip())


def _checked(name: str, token: str) -> str:
    """The token. An error has nothing of it in its text."""
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise ValueError(
            f"{name}: got an invalid token; expected only 16 to 512 letters, digits and the characters - . _ ~ + / ="
        )
    return token


def _contents(name: str, file: FilePath | None) -> bytes | None:
    if file is None:
        return None
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"{name}: got {os.fspath(file)!r}, which cannot be read: {error.strerror}") from None


def _is_on_this_host(target: str) -> bool:
    """Whether every address of a target is certainly one of this host."""
    if target.startswith("dns://") and not target.startswith("dns:///"):
        return False  # Another resolver is asked, and may say anything.
    addresses = addresses_of(target)
    return bool(addresses) and all(map(is_loopback, addresses))
