"""What /metrics shows, in Prometheus's text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets=_SECONDS, labels=()) -> Histogram:
            return Histogram(f"soundwave_{name}", text, labels, buckets=buckets, registry=registry)

        def counter(name: str, text: str, labels=()) -> Counter:
            return Counter(f"soundwave_{name}", text, labels, registry=registry)

        self.requests = counter("requests", "Requests answered", ("route", "status"))
        self.request_seconds = histogram("request_seconds", "From request to last byte", labels=("route",))
        self.queue_seconds = histogram("queue_seconds", "Time of a job in the queue")
        self.batch_rows = histogram("batch_rows", "Jobs of a batch", (1, 2, 4, 8, 16, 32, 64))
        self.padded_seconds = counter("padded_audio_seconds", "Audio computed, padding included")
        self.audio_seconds = counter("audio_seconds", "Audio of requests that were accepted")
        self.tokens = counter("generated_tokens", "Tokens of answers")
        self.waiting = Gauge("soundwave_waiting_jobs", "Jobs in the queue", registry=registry)
        self.running = Gauge("soundwave_running_jobs", "Jobs of the running batch", registry=registry)
        self.open = Gauge("soundwave_open_requests", "Requests that are being answered", registry=registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)
