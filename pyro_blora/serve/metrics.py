"""What Prometheus is told of a server, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server. waiting: how many texts wait, asked when they are read."""

    def __init__(self, *, model: str, task: str | None, form: str, waiting: Callable[[], int]):
        self.registry = own = CollectorRegistry()
        self._requests = Counter("pyro_blora_requests", "Requests answered.", ("path", "code"), registry=own)
        self._latency = Histogram("pyro_blora_request_seconds", "From a request to its answer.", ("path",),
                                  buckets=_SECONDS, registry=own)  # fmt: skip
        self._texts = Counter("pyro_blora_texts", "Texts answered.", registry=own)
        self._abstained = Counter("pyro_blora_texts_abstained", "Of these, below the threshold.", registry=own)
        self._batch = Histogram("pyro_blora_batch_texts", "Texts of a forward pass.", buckets=_TEXTS, registry=own)
        self._forward = Histogram("pyro_blora_batch_seconds", "A forward pass.", buckets=_SECONDS, registry=own)
        Gauge("pyro_blora_waiting_texts", "Texts that wait.", registry=own).set_function(waiting)
        about = Gauge("pyro_blora_model", "Always 1.", ("model", "task", "form"), registry=own)
        about.labels(model, task or "", form).set(1)

    def request(self, path: str, code: int, seconds: float) -> None:
        self._requests.labels(path, str(code)).inc()
        self._latency.labels(path).observe(seconds)

    def batch(self, texts: int, seconds: float) -> None:
        self._batch.observe(texts)
        self._forward.observe(seconds)

    def texts(self, count: int, abstained: int) -> None:
        self._texts.inc(count)
        self._abstained.inc(abstained)

    def text(self) -> bytes:
        return generate_latest(self.registry)
