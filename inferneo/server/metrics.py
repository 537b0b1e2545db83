"""Metrics: what GET /metrics shows, in Prometheus' text format and under vLLM's names."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from inferneo.server.generation import Generation
from inferneo_core.outputs import EngineStats

FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0)
REQUEST_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """The figures of one server, in a registry of its own.

    Args:
        stats: a snapshot of the engine, taken at each scrape.
        num_requests: requests that are being answered, asked at each scrape.
        model_name: the label of every figure.
    """

    def __init__(self, stats: Callable[[], EngineStats], num_requests: Callable[[], int], model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(stats, num_requests, model_name))

        def histogram(name: str, help: str, buckets: Sequence[float]) -> Histogram:
            family = Histogram(
                f"inferneo:{name}_seconds", help, ["model_name"], registry=self._registry, buckets=buckets
            )
            return family.labels(model_name)

        self._requests = Counter(
            "inferneo:requests",
            "Requests by path and status; over a WebSocket the status is the one that HTTP would have.",
            ["model_name", "path", "status"],
            registry=self._registry,
        )
        self._finished = Counter(
            "inferneo:request_success",
            "Answers by the reason for their end.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._model_name = model_name
        self._queue_time = histogram(
            "request_queue_time", "From a request to its prompt's first step.", REQUEST_SECONDS
        )
        self._first_token = histogram("time_to_first_token", "From a request to its first token.", FIRST_TOKEN_SECONDS)
        self._output_token = histogram(
            "request_time_per_output_token", "An answer's mean time a token after the first.", TOKEN_SECONDS
        )
        self._request_time = histogram("e2e_request_latency", "From a request to its answer's end.", REQUEST_SECONDS)
        self._gap = histogram("inter_token_latency", "Between the tokens of a stream, as they are sent.", TOKEN_SECONDS)
        self.observe_gap = self._gap.observe

    @contextmanager
    def request(self, path: str) -> Iterator[RequestRecord]:
        """Time a request and count it when it is over, by the status in its record."""
        record = RequestRecord()
        started = time.perf_counter()
        try:
            yield record
        finally:
            self._requests.labels(self._model_name, path, str(record.status)).inc()
            if record.generation is not None:
                self._request_time.observe(time.perf_counter() - started)
                self._observe_choices(record.generation)

    def render(self) -> bytes:
        """The text of a scrape."""
        return generate_latest(self._registry)

    def _observe_choices(self, generation: Generation) -> None:
        for choice in generation.choices:
            self._finished.labels(self._model_name, choice.finish_reason or "abort").inc()
            if choice.timings is None:
                continue
            self._queue_time.observe(choice.timings.queued_ms / 1000)
            self._first_token.observe(choice.timings.ttft_ms / 1000)
            if choice.num_tokens > 1:
                self._output_token.observe(choice.timings.decode_ms / 1000 / (choice.num_tokens - 1))


class RequestRecord:
    """What became of one request. 499 is a client that left first, as nginx counts it."""

    def __init__(self) -> None:
        self.status = 499
        self.generation: Generation | None = None


class _EngineCollector(Collector):
    """Reads the engine when somebody asks, so that the engine's steps pay nothing for it."""

    def __init__(self, stats: Callable[[], EngineStats], num_requests: Callable[[], int], model_name: str) -> None:
        self._stats = stats
        self._num_requests = num_requests
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        used = stats.total_blocks - stats.free_blocks - stats.cached_blocks
        gauges = {
            "num_requests_open": (self._num_requests(), "Requests that are being answered."),
            "num_requests_running": (stats.running, "Sequences in the batch."),
            "num_requests_waiting": (stats.waiting, "Sequences that wait for a place in the batch, or are paused."),
            "kv_cache_usage_perc": (used / stats.total_blocks, "Share of the KV cache's blocks in use; 1 is all."),
            "generation_tokens_per_second": (stats.tokens_per_s, "Tokens generated a second over the latest steps."),
        }
        counters = {
            "prompt_tokens": (stats.prompt_tokens, "Prompt tokens received."),
            "generation_tokens": (stats.generated_tokens, "Tokens generated."),
            "prefix_cache_queries": (stats.prefix_query_tokens, "Prompt tokens looked up in the prefix cache."),
            "prefix_cache_hits": (stats.prefix_hit_tokens, "Prompt tokens found in the prefix cache."),
            "num_preemptions": (stats.preemptions, "Sequences that lost their blocks to others."),
            "request_aborts": (stats.aborts, "Sequences that were aborted."),
            "engine_steps": (stats.steps, "Steps of the engine."),
        }
        for name, (value, help) in gauges.items():
            gauge = GaugeMetricFamily(f"inferneo:{name}", help, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        for name, (value, help) in counters.items():
            counter = CounterMetricFamily(f"inferneo:{name}", help, labels=["model_name"])
            counter.add_metric([self._model_name], value)
            yield counter
