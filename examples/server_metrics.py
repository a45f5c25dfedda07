"""A server's metrics, as its Prometheus endpoint shows them."""

from __future__ import annotations

import urllib.request
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Metrics:
    """The value of each sample, by its name and its sorted labels."""

    samples: dict[tuple[str, tuple[tuple[str, str], ...]], float]

    @classmethod
    def scrape(cls, url: str) -> Metrics:
        with urllib.request.urlopen(url, timeout=10) as response:
            families = text_string_to_metric_families(response.read().decode())
            samples = [sample for family in families for sample in family.samples]
        return cls({(s.name, tuple(sorted(s.labels.items()))): s.value for s in samples})

    def since(self, earlier: Metrics) -> Metrics:
        return Metrics({key: value - earlier.samples.get(key, 0.0) for key, value in self.samples.items()})

    def labelled(self, name: str) -> list[tuple[dict[str, str], float]]:
        """The labels and the value of each sample of this name, without those that are 0."""
        return [(dict(labels), value) for (n, labels), value in self.samples.items() if n == name and value]

    def total(self, name: str, **labels: str) -> float:
        return sum(value for found, value in self.labelled(name) if labels.items() <= found.items())


def print_metrics(metrics: Metrics) -> None:
    print("\nWhat the server counted")
    for labels, requests in metrics.labelled("lovasz_requests_total"):
        print(f"  requests    {requests:,.0f} x {labels['method']} of {labels['loss']}: {labels['code']}")
    errors = metrics.total("lovasz_requests_total") - metrics.total("lovasz_requests_total", code="OK")
    print(f"  errors      {errors:,.0f}")
    batches, joined = metrics.total("lovasz_batch_requests_count"), metrics.total("lovasz_batch_requests_sum")
    print(f"  batches     {batches:,.0f}, with {joined / max(batches, 1):.2f} requests on average")
    print(f"  elements    {metrics.total('lovasz_elements_total'):,.0f} logits")
    phases = [f"{phase} {mean_milliseconds(metrics, phase):.2f}" for phase in ("receive", "queue", "compute", "send")]
    print(f"  a request   {', '.join(phases)} ms on average")


def mean_milliseconds(metrics: Metrics, phase: str) -> float:
    seconds = metrics.total("lovasz_phase_seconds_sum", phase=phase)
    return 1000 * seconds / max(metrics.total("lovasz_phase_seconds_count", phase=phase), 1)
