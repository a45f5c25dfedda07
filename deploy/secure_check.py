"""Checks a running project that was started with docker-compose.secure.yml: who comes in, and who does not."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

import numpy as np
from checking import CheckFailed, ok, wait_for
from compose_check import (
    SCRAPE_SECONDS,
    Project,
    ask_prometheus,
    check_answers,
    check_confinement,
    check_health,
    check_scraping,
)

from lovasz.client import TLS, AuthenticationError, LossClient, LovaszSoftmax, TLSError
from lovasz.client.access import Access

TARGET = "127.0.0.1:50051"
RUN = "a-training-with-a-long-name"
READ_AGAIN_SECONDS = 30


class Secrets:
    """The files that docker-compose.secure.yml mounts, and those of a client."""

    def __init__(self, folder: Path) -> None:
        from support.certificates import Authority

        folder.mkdir(mode=0o700)
        self.folder = folder
        self.authority = Authority(folder, "ca")
        self.client = self.authority.sign("client")
        self.authority.sign("server")
        self.tokens = {name: secrets.token_urlsafe(32) for name in ("trainer", "stranger", "prometheus")}
        self.let_in("trainer")
        (folder / "prometheus.token").write_text(self.tokens["prometheus"] + "\n")
        for file in folder.iterdir():
            file.chmod(0o644)

    def let_in(self, name: str) -> None:
        """Writes the server's tokens: of Prometheus, and of one other. In place, as containers see the file itself."""
        (self.folder / "tokens").write_text("".join(f"{one}:{self.tokens[one]}\n" for one in ("prometheus", name)))

    def tls(self) -> TLS:
        return TLS(self.folder / "ca.pem", self.client.cert, self.client.key)

    def access(self, name: str) -> Access:
        return Access.parsed(self.tls(), self.tokens[name], None, False)


def check_secure(project: Project, files: Secrets, prometheus: str) -> None:
    """All checks; they replace the tokens."""
    check_health(project)
    check_confinement(project)
    check_answers(TARGET, files.access("trainer"))
    check_scraping(prometheus)
    _check_names_of_runs(files, prometheus)
    _refused(lambda: LossClient(TARGET), TLSError, "plain text")
    no_certificate = TLS(files.folder / "ca.pem")
    token = files.tokens["trainer"]
    _refused(lambda: LossClient(TARGET, tls=no_certificate, token=token), TLSError, "a client without a certificate")
    _refused(lambda: LossClient(TARGET, tls=files.tls()), AuthenticationError, "a client without a token")
    stranger = files.tokens["stranger"]
    _refused(lambda: LossClient(TARGET, tls=files.tls(), token=stranger), AuthenticationError, "an unknown token")
    files.let_in("stranger")

    def is_let_in() -> bool:
        with LossClient(TARGET, tls=files.tls(), token=stranger) as client:
            try:
                return bool(client.server_info())
            except AuthenticationError:
                return False

    wait_for(is_let_in, "a new token is known", READ_AGAIN_SECONDS)
    _refused(lambda: LossClient(TARGET, tls=files.tls(), token=token), AuthenticationError, "a token that was removed")
    ok("tokens change while the server runs")


def _check_names_of_runs(files: Secrets, prometheus: str) -> None:
    """Prometheus comes with a token, so it sees the name of a run in full."""
    access = files.access("trainer")
    with LossClient(TARGET, tls=access.tls, token=files.tokens["trainer"], run=RUN) as client:
        client.compute(np.zeros((1, 2, 4, 4), np.float32), np.zeros((1, 4, 4), np.uint8), LovaszSoftmax())

    def is_seen() -> bool:
        return bool(ask_prometheus(prometheus, "query", query=f'lovasz_run_loss{{run="{RUN}"}}')["result"])

    wait_for(is_seen, "Prometheus has the name of the run", SCRAPE_SECONDS)
    ok("Prometheus sees the names of runs in full")


def _refused(client: Callable[[], LossClient], error: type[Exception], what: str) -> None:
    with client() as one:
        try:
            one.server_info()
        except error as refused:
            ok(f"{what} is refused: {str(refused).partition(': ')[2]}")
        else:
            raise CheckFailed(f"{what} is let in")
