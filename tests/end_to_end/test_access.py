"""TLS and tokens on a real server: who comes in, who does not, and what changes while it serves."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from support.certificates import DAY, NOW, Authority, Pair
from support.fork_server import ForkedServer
from support.waiting import eventually

from lovasz.client import TLS, AuthenticationError, Joint, LossClient, LovaszSoftmax, ServerUnavailableError, TLSError
from lovasz.server.launch import ServerProcess

ALICE, BOB, CAROL = (name + "-" + name[0] * 20 for name in ("alice", "bob", "carol"))
SOFTMAX = LovaszSoftmax()
RNG = np.random.default_rng(3)
LOGITS = RNG.standard_normal((1, 3, 8, 8)).astype(np.float32)
LABELS = RNG.integers(0, 3, (1, 8, 8))


@dataclass
class Secure:
    """A server with TLS, client certificates and tokens, and the files that it reads.

    Attributes:
        pair: the files of its certificate; the one that they hold at the start is ``original``.
    """

    server: ServerProcess
    folder: Path
    ca: Authority
    pair: Pair
    original: Pair
    client: Pair

    @property
    def tls(self) -> TLS:
        return TLS(self.ca.path, self.client.cert, self.client.key)

    def connect(self, token: str | None = ALICE, tls: TLS | None = None, **options: Any) -> LossClient:
        return LossClient(self.server.target, timeout=30, tls=tls or self.tls, token=token, **options)

    def logged(self, event: str) -> int:
        return sum(line["event"] == event for line in self.server.log)

    def write_tokens(self, **tokens: str) -> None:
        """Replaces the tokens file, and waits until the server has read it."""
        before = self.logged("files were read again")
        new = self.folder / "tokens.new"
        new.write_text("".join(f"{name}:{token}\n" for name, token in tokens.items()))
        new.replace(self.folder / "tokens")
        assert eventually(lambda: self.logged("files were read again") > before)

    def rotate(self, to: Pair) -> None:
        """Replaces the server's certificate and key, and waits until the server has read both."""
        to.move_to(self.pair)
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        wanted = ssl.PEM_cert_to_DER_cert(to.cert.read_text())

        def shown() -> bool:
            with (
                socket.create_connection(address(self.server.target)) as connection,
                context.wrap_socket(connection) as secured,
            ):
                return secured.getpeercert(binary_form=True) == wanted

        assert eventually(shown)


def address(target: str) -> tuple[str, int]:
    host, _, port = target.rpartition(":")
    return host, int(port)


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    folder = tmp_path_factory.mktemp("access")
    ca = Authority(folder, "ca")
    original, pair, client = ca.sign("original"), Pair(folder / "live.pem", folder / "live.key"), ca.sign("client")
    original.move_to(pair)
    tokens = folder / "tokens"
    tokens.write_text(f"alice:{ALICE}\nbob:{BOB}\n")
    arguments = ["--device", "cpu", "--listen", f"127.0.0.1:0,unix:{folder}/socket", "--tokens", str(tokens)]
    arguments += ["--tls-cert", str(pair.cert), "--tls-key", str(pair.key), "--tls-client-ca", str(ca.path)]
    arguments += ["--metrics-tls", "--metrics-tokens", str(tokens), "--reflection"]
    with ForkedServer(arguments) as server:
        yield Secure(server, folder, ca, pair, original, client)


@pytest.fixture(autouse=True)
def _as_before(secure: Secure) -> Iterator[None]:
    """Puts the server's files back."""
    tokens = (secure.folder / "tokens").read_text()
    yield
    if secure.pair.cert.read_bytes() != secure.original.cert.read_bytes():
        secure.rotate(secure.original)
    if (secure.folder / "tokens").read_text() != tokens:
        secure.write_tokens(alice=ALICE, bob=BOB)


def test_the_answers_are_those_of_a_server_without_tls(secure: Secure, server: ServerProcess) -> None:
    large = RNG.standard_normal((1, 5, 400, 400)).astype(np.float32), RNG.integers(0, 5, (1, 400, 400))
    with secure.connect() as client, LossClient(server.target) as plain:
        for logits, labels in ((LOGITS, LABELS), large):  # In one message, and in a stream.
            found, expected = (one.compute(logits, labels, SOFTMAX) for one in (client, plain))
            assert found.loss == expected.loss
            assert np.array_equal(found.grad, expected.grad)


def test_every_call_carries_the_token(secure: Secure) -> None:
    with secure.connect() as client:
        place = Joint("tokens", rank=0, world_size=2, step=0)
        assert client.server_info().version
        assert client.abort(place, "no data")
        client.leave(place, 0)


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (None, "a token is missing; expected metadata 'authorization: Bearer TOKEN' (UNAUTHENTICATED)"),
        (CAROL, "the token is not known (UNAUTHENTICATED)"),
    ],
)
def test_a_call_without_a_known_token_is_refused(secure: Secure, token: str | None, said: str) -> None:
    with secure.connect(token) as client:
        place = Joint("tokens", rank=0, world_size=2, step=0)
        for call in (
            client.server_info,
            lambda: client.compute(LOGITS, LABELS, SOFTMAX),
            lambda: client.leave(place, 0),
        ):
            with pytest.raises(AuthenticationError) as refused:
                call()
            assert str(refused.value) == f"{secure.server.target}: {said}"
        assert not client.abort(place, "no data")


def test_health_needs_no_token_and_reflection_does(secure: Secure) -> None:
    with grpc_channel(secure) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        with pytest.raises(grpc.RpcError) as refused:
            next(reflection(iter([b""]), timeout=30))
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_unix_socket_needs_neither(secure: Secure) -> None:
    with LossClient(secure.server.targets[1]) as client:
        assert client.compute(LOGITS, LABELS, SOFTMAX).loss > 0
    with LossClient(secure.server.targets[1], tls=secure.tls, token=CAROL) as client:
        assert client.compute(LOGITS, LABELS, SOFTMAX).loss > 0


def test_tokens_change_while_the_server_serves(secure: Secure) -> None:
    token_file = secure.folder / "alice.token"
    token_file.write_text(ALICE)
    with secure.connect() as alice, secure.connect(BOB) as bob, secure.connect(None, token_file=token_file) as by_file:
        for client in (alice, bob, by_file):
            client.server_info()
        secure.write_tokens(alice=CAROL)
        for client in (alice, bob):
            with pytest.raises(AuthenticationError, match="the token is not known"):
                client.server_info()
        token_file.write_text(CAROL)

        def is_let_in() -> bool:
            try:
                return bool(by_file.server_info())
            except AuthenticationError:
                return False

        assert eventually(is_let_in)
        assert eventually(lambda: "bob" not in callers(secure, CAROL))


def test_log_and_metrics_have_the_name_and_never_the_token(secure: Secure) -> None:
    with secure.connect(BOB) as client:
        client.compute(LOGITS, LABELS, SOFTMAX)
        with pytest.raises(AuthenticationError):
            secure.connect(CAROL).server_info()

    def is_logged() -> bool:
        """A refusal is, but not within a second after another one."""
        with grpc_channel(secure) as channel, pytest.raises(grpc.RpcError):
            channel.unary_unary("/lovasz.v1.LossService/Compute")(b"\xff", timeout=30, metadata=bearer(BOB))
        refused = [line for line in secure.server.log if line["event"] == "a request was refused"]
        return "bob" in {line.get("caller") for line in refused}

    assert eventually(is_logged)
    text = str(secure.server.log) + scraped(secure)
    assert not any(token in text for token in (ALICE, BOB, CAROL))
    assert callers(secure)["bob"] >= 2
    assert 'lovasz_rejections_total{reason="unauthenticated"}' in scraped(secure)


def test_an_old_connection_goes_on_and_a_new_one_gets_the_new_certificate(secure: Secure) -> None:
    other = Authority(secure.folder, "other-ca")
    renewed = other.sign("renewed")
    with secure.connect() as old:
        old.server_info()
        errors = secure.logged("files changed and cannot be used: the old contents stay in use")
        secure.pair.cert.write_bytes(renewed.cert.read_bytes())
        assert eventually(
            lambda: secure.logged("files changed and cannot be used: the old contents stay in use") > errors
        )
        with secure.connect() as client:
            client.server_info()  # The pair is half written: the old one is shown.
        secure.rotate(renewed)
        old.compute(LOGITS, LABELS, SOFTMAX)  # On a connection of before: a new one would not be trusted.
        with secure.connect(tls=TLS(other.path, secure.client.cert, secure.client.key)) as client:
            client.compute(LOGITS, LABELS, SOFTMAX)
        assert_refused(secure, secure.tls, "unknown CA", "no CA that this client knows")


def test_the_server_s_certificate_is_checked(secure: Secure) -> None:
    other = Authority(secure.folder, "unknown-ca")
    cert, key = secure.client.cert, secure.client.key
    assert_refused(secure, TLS(other.path, cert, key), "unknown CA", "no CA that this client knows (tls.ca) has signed")
    assert_refused(secure, TLS(None, cert, key), "unknown CA", "no CA that this client knows")
    elsewhere = TLS(secure.ca.path, cert, key, "elsewhere.example")
    assert_refused(secure, elsewhere, "wrong host", "the server's certificate is not for elsewhere.example")
    secure.rotate(secure.ca.sign("elsewhere", "gpu7.example.org"))
    with secure.connect(tls=TLS(secure.ca.path, cert, key, "gpu7.example.org")) as client:
        client.server_info()
    assert_refused(secure, secure.tls, "wrong host", "the server's certificate is not for 127.0.0.1")
    secure.rotate(secure.ca.sign("old", since=NOW - 2 * DAY, until=NOW - DAY))
    assert_refused(secure, secure.tls, "expired", "the server's certificate has expired")
    secure.rotate(secure.ca.sign("young", since=NOW + DAY, until=NOW + 2 * DAY))
    assert_refused(secure, secure.tls, "not yet valid", "the server's certificate is not valid yet")


def test_the_client_s_certificate_is_checked(secure: Secure) -> None:
    ca = secure.ca.path
    assert_refused(secure, TLS(ca), "client certificate missing", "it asks for a client certificate; expected tls.cert")
    foreign = Authority(secure.folder, "foreign-ca").sign("foreign")
    said = "it refuses this client's certificate (tls.cert)"
    assert_refused(secure, TLS(ca, foreign.cert, foreign.key), "client certificate refused", said)
    old = secure.ca.sign("old-client", since=NOW - 2 * DAY, until=NOW - DAY)
    assert_refused(secure, TLS(ca, old.cert, old.key), "client certificate refused", "(tls.cert) has expired")
    assert_refused(secure, TLS(ca, old.cert, foreign.key), "files", "the files of tls cannot be used")


def test_a_client_without_tls_and_a_server_without(secure: Secure, server: ServerProcess) -> None:
    with LossClient(secure.server.target) as client, pytest.raises(TLSError, match="the server speaks TLS") as needed:
        client.compute(LOGITS, LABELS, SOFTMAX)
    assert needed.value.check == "TLS needed"
    with LossClient(server.target, tls=secure.tls) as client, pytest.raises(TLSError, match="no TLS there") as absent:
        client.compute(LOGITS, LABELS, SOFTMAX)
    assert absent.value.check == "no TLS"


def test_a_server_that_is_not_there_is_no_matter_of_tls(secure: Secure) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with LossClient(f"127.0.0.1:{port}", tls=secure.tls) as client, pytest.raises(ServerUnavailableError):
        client.server_info(timeout=5)


@pytest.mark.skipif(grpc.__version__.startswith("1.63."), reason="this gRPC logs them as errors")
def test_failed_handshakes_write_no_log(secure: Secure) -> None:
    before = len(secure.server.log)
    for _ in range(20):
        with socket.create_connection(address(secure.server.target)) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            connection.recv(100)

    def is_logged() -> bool:
        """A refusal is, but not within a second after another one."""
        with secure.connect(CAROL) as client, pytest.raises(AuthenticationError):
            client.server_info()
        return len(secure.server.log) > before

    assert eventually(is_logged)
    assert len(secure.server.log) - before <= 2


@pytest.mark.parametrize(("port", "said"), [("gRPC", "EOF|reset"), ("metrics", "PROTOCOL_VERSION")])
def test_tls_is_1_2_at_least(secure: Secure, port: str, said: str) -> None:
    target = secure.server.target if port == "gRPC" else secure.server.metrics_url.split("/")[2]
    for version, may in ((ssl.TLSVersion.TLSv1_2, True), (ssl.TLSVersion.TLSv1_1, False)):
        context = client_context(secure)
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Of TLS 1.1.
            context.minimum_version = context.maximum_version = version
        with socket.create_connection(address(target)) as connection:
            if may:
                with context.wrap_socket(connection, server_hostname="localhost") as secured:
                    assert secured.version() == "TLSv1.2"
            else:
                with pytest.raises(OSError, match=said):
                    context.wrap_socket(connection, server_hostname="localhost")


def test_metrics_need_a_client_certificate_a_token_and_a_known_name(secure: Secure) -> None:
    assert "lovasz_requests_total" in scraped(secure)
    with pytest.raises(urllib.error.HTTPError, match="401") as unknown:
        scraped(secure, token=CAROL)
    unknown.value.close()
    with pytest.raises(urllib.error.HTTPError, match="403") as rebound:
        scraped(secure, Host="rebound.example.com")
    rebound.value.close()
    with pytest.raises(OSError) as closed:  # noqa: PT011 # By an alert, or by the end of the connection.
        scraped(secure, context=ssl.create_default_context(cafile=str(secure.ca.path)))
    assert not isinstance(closed.value, urllib.error.HTTPError)
    plain = secure.server.metrics_url.replace("https:", "http:")
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        urllib.request.urlopen(plain, timeout=30)
    assert "lovasz_requests_total" in scraped(secure)


def test_the_commands_read_their_variables(secure: Secure) -> None:
    variables = {
        "LOVASZ_TLS_CA": str(secure.ca.path),
        "LOVASZ_TLS_CLIENT_CERT": str(secure.client.cert),
        "LOVASZ_TLS_CLIENT_KEY": str(secure.client.key),
        "LOVASZ_TOKEN": ALICE,
    }

    def lovasz(*words: str, **changes: str) -> tuple[int, str]:
        command = [sys.executable, "-W", "error", "-m", "lovasz.client.cli", words[0], secure.server.target, *words[1:]]
        environment = {**os.environ, **variables, **changes}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        return ran.returncode, ran.stdout if ran.returncode == 0 else ran.stderr

    status, said = lovasz("ping", "--count", "1")
    assert (status, "answers: lovasz" in said) == (0, True)
    quick = ("--shape", "1x3x8x8", "--duration", "0.1", "--warmup", "0")
    status, said = lovasz("bench", *quick)
    assert (status, "1x3x8x8" in said) == (0, True)
    assert lovasz("ping", LOVASZ_TOKEN=CAROL) == (
        1,
        f"lovasz: {secure.server.target}: the token is not known (UNAUTHENTICATED)\n",
    )
    status, said = lovasz("bench", *quick, "--tls-server-name", "elsewhere.example")
    assert (status, "is not for elsewhere.example" in said) == (1, True)


def test_a_file_that_cannot_be_used_ends_the_start(secure: Secure) -> None:
    command = [sys.executable, "-m", "lovasz.server", "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]
    ran = subprocess.run([*command, "--tokens", str(secure.ca.path)], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    assert f"--tokens {secure.ca.path}: line 1: expected name:token" in ran.stderr


def assert_refused(secure: Secure, tls: TLS, check: str, said: str) -> None:
    """Every call fails with the check's name, and is not tried again."""
    with secure.connect(tls=tls) as client:
        for call in (client.server_info, lambda: client.compute(LOGITS, LABELS, SOFTMAX)):
            with pytest.raises(TLSError) as refused:
                call()
            assert refused.value.check == check
            assert said in str(refused.value)
            assert str(refused.value).startswith(f"{secure.server.target}: ")


def grpc_channel(secure: Secure) -> grpc.Channel:
    files = (secure.ca.path, secure.client.key, secure.client.cert)
    credentials = grpc.ssl_channel_credentials(*(file.read_bytes() for file in files))
    return grpc.secure_channel(secure.server.target, credentials)


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def client_context(secure: Secure) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(secure.ca.path))
    context.load_cert_chain(secure.client.cert, secure.client.key)
    return context


def scraped(secure: Secure, token: str = ALICE, context: ssl.SSLContext | None = None, **headers: str) -> str:
    request = urllib.request.Request(secure.server.metrics_url, headers={"Authorization": f"Bearer {token}", **headers})
    with urllib.request.urlopen(request, timeout=30, context=context or client_context(secure)) as page:
        return str(page.read().decode())


def callers(secure: Secure, token: str = ALICE) -> dict[str, float]:
    """Requests by the name of their caller's token."""
    families = text_string_to_metric_families(scraped(secure, token))
    counts: dict[str, float] = {}
    for sample in (one for family in families for one in family.samples):
        if sample.name == "lovasz_caller_requests_total":
            counts[sample.labels["caller"]] = counts.get(sample.labels["caller"], 0) + sample.value
    return counts
