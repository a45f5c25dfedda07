"""What dashboards and alerts ask for is what a server has: asked of a real Prometheus that scrapes a real server."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import textwrap
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from support.fork_server import ForkedServer
from support.waiting import eventually

from lovasz import wire
from lovasz.client import InvalidInputError, Joint, LossClient, LovaszHinge, LovaszSoftmax
from lovasz.server.launch import ServerProcess
from lovasz.spec import weighted_sum
from lovasz.v1 import loss_pb2 as pb
from lovasz.v1 import loss_pb2_grpc

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="needs Prometheus and promtool (Debian: apt-get install prometheus)",
)


def alerts() -> dict[str, str]:
    """The expression of each alert, without the bound that it is compared with. (YAML, but of one plain form.)"""
    found = {}
    for block in ALERTS.read_text().split("- alert: ")[1:]:
        name, _, rest = block.partition("\n")
        folded = re.search(r"expr: (?:>-\n)?(.*?)\n +(?:for|labels):", rest, re.DOTALL)
        assert folded, name
        expression = " ".join(folded[1].split())
        compared = re.fullmatch(r"(.*) (?:==|>) [\d.]+", expression)
        assert compared, expression
        found[name] = compared[1]
    return found


def panels() -> Iterator[tuple[str, str]]:
    for file in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel.get("targets", ()):  # A heading has none.
                yield f"{file.stem}: {panel['title']}: {target['refId']}", target["expr"]


def test_every_alert_has_its_entry_in_the_runbook() -> None:
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    assert [heading for heading in headings if heading.startswith("Lovasz")] == list(alerts())
    anchors = re.findall(r"runbook: docs/operations.md#(\w+)", ALERTS.read_text())
    assert anchors == [name.lower() for name in alerts()]


def test_kubernetes_has_the_same_alerts() -> None:
    resource = (DEPLOY / "kubernetes" / "components" / "monitoring" / "prometheusrule.yaml").read_text()
    _, spec, groups = resource.partition("\nspec:\n")
    assert spec
    assert textwrap.dedent(groups) == "groups:\n" + ALERTS.read_text().partition("\ngroups:\n")[2]


@needs_prometheus
def test_the_configuration_for_compose_is_one_of_prometheus(tmp_path: Path) -> None:
    configuration = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
    (tmp_path / "prometheus.yml").write_text(configuration.replace("/etc/prometheus/alerts.yml", str(ALERTS)))
    subprocess.run(["promtool", "check", "config", str(tmp_path / "prometheus.yml")], check=True, capture_output=True)


@needs_prometheus
def test_alerts_fire_when_they_should() -> None:
    tests = ALERTS.with_name("alerts_test.yml")
    run = subprocess.run(["promtool", "test", "rules", str(tests)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(scope="module")
def scraped() -> Iterator[ServerProcess]:
    """A server for the tests of this file alone, as they ask for what is in its metrics and what is not."""
    with ForkedServer(["--device", "cpu"]) as server:
        yield server


@needs_prometheus
def test_the_metrics_are_well_formed(scraped: ServerProcess) -> None:
    load(scraped.target, rounds=1)
    with urllib.request.urlopen(scraped.metrics_url) as page:
        text = page.read()
    # Older rules of style that promtool knows would have no _created and no info metrics: errors alone count.
    run = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
    assert b"error" not in run.stderr.lower(), run.stderr


@needs_prometheus
def test_every_expression_of_dashboards_and_alerts_returns_data(scraped: ServerProcess, tmp_path: Path) -> None:
    with prometheus(tmp_path, scraped) as ask, LossClient(scraped.target) as client:

        def samples(expression: str) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = ask("query", query=expression)["result"]
            return found

        def without_data() -> list[str]:
            asked = {**alerts(), **dict(panels())}
            return [f"{name}: {text}" for name, text in asked.items() if not samples(as_grafana_asks(text))]

        def all_have_data() -> bool:
            load(scraped.target, rounds=3)
            return not without_data()

        waits = client.submit(LOGITS, LABELS, LovaszSoftmax(), joint=Joint("waits", 0, 2, 0))
        assert eventually(all_have_data), without_data()
        (missing,) = samples("lovasz_joint_step_first_missing_rank")
        assert (missing["metric"]["run"], missing["value"][1]) == ("waits", "1")
        client.compute(LOGITS, LABELS, LovaszSoftmax(), joint=Joint("waits", 1, 2, 0))
        assert waits.result().loss > 0
        assert {sample["metric"]["code"] for sample in samples("lovasz_requests_total")} >= {"OK", "INVALID_ARGUMENT"}


@needs_prometheus
def test_traced_requests_are_exemplars(scraped: ServerProcess, tmp_path: Path) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    with prometheus(tmp_path, scraped) as ask:
        logits, labels = (wire.TensorSpec(wire.dtype_named(a.dtype.name), a.shape) for a in (LOGITS, LABELS))
        header = wire.Request.checked(weighted_sum(LovaszSoftmax()), logits, labels, want_grad=True).to_proto()
        message = pb.ComputeRequest(header=header, logits=LOGITS.tobytes(), labels=LABELS.tobytes())
        with grpc.insecure_channel(scraped.target) as channel:
            stub = loss_pb2_grpc.LossServiceStub(channel)
            stub.Compute(message, metadata=(("traceparent", f"00-{trace}-00f067aa0ba902b7-01"),), timeout=30)

        def phases() -> set[str]:
            now = time.time()
            found = ask("query_exemplars", query="lovasz_phase_seconds_bucket", start=str(now - 300), end=str(now))
            assert all(one["labels"]["trace_id"] == trace for series in found for one in series["exemplars"])
            return {series["seriesLabels"]["phase"] for series in found}

        assert eventually(lambda: phases() == {"receive", "queue", "compute", "copy", "send"}), phases()


def as_grafana_asks(expression: str) -> str:
    """With values for its variables; for an alert on a backend, with whatever backend there is."""
    expression = expression.replace('backend="torch"', 'backend!=""')
    return expression.replace("$__rate_interval", "1m").replace("$run", ".*").replace("$instance", ".*")


RANDOM = np.random.RandomState(0)
LOGITS = RANDOM.randn(1, 3, 16, 16).astype(np.float32)
LABELS = RANDOM.randint(0, 3, (1, 16, 16))


def load(target: str, rounds: int) -> None:
    with LossClient(target) as client:
        for step in range(rounds):
            client.compute(LOGITS, LABELS, LovaszSoftmax())
            client.compute(LOGITS[:, 0], LABELS % 2, LovaszHinge(), want_grad=False)
            both = [client.submit(LOGITS, LABELS, LovaszSoftmax(), joint=Joint("load", r, 2, step)) for r in range(2)]
            assert all(future.result().loss > 0 for future in both)
            client.compute(LOGITS, LABELS, LovaszSoftmax(), want_grad=False, joint=Joint("load", 0, 1, step))
            with suppress(InvalidInputError):
                client.compute(LOGITS, LABELS + 3, LovaszSoftmax())


@contextmanager
def prometheus(folder: Path, server: ServerProcess) -> Iterator[Any]:
    """One that scrapes the server each second; yields a function that asks a method of its API for data."""
    target = urllib.parse.urlsplit(server.metrics_url).netloc
    (folder / "prometheus.yml").write_text(
        f"global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: [{ALERTS}]\n"
        f"scrape_configs: [{{job_name: lovasz, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command += ["--enable-feature=exemplar-storage"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)

    def ask(method: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"http://{address}/api/v1/{method}?{query}", timeout=10) as page:
            answer = json.load(page)
        assert answer["status"] == "success", parameters
        return answer["data"]

    def is_ready() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        with suppress(OSError):
            return bool(ask("query", query="up == 1")["result"])
        return False

    try:
        assert eventually(is_ready), (folder / "log").read_text()
        yield ask
    finally:
        process.terminate()
        process.wait(30)
