"""Service: what every route of one server shares."""

from __future__ import annotations

import time
from dataclasses import dataclass

from inferneo.server.lifecycle import Lifecycle
from inferneo.server.metrics import Metrics
from inferneo.server.settings import ServerSettings
from inferneo_core import AsyncEngine


@dataclass(frozen=True)
class Service:
    """One server's parts.

    Attributes:
        engine: generates. It stays its owner's.
        settings: names, doors and limits.
        lifecycle: the requests that run.
        metrics: what GET /metrics shows.
        started_at: when it was made, in seconds since 1970.
    """

    engine: AsyncEngine
    settings: ServerSettings
    lifecycle: Lifecycle
    metrics: Metrics
    started_at: int


def make_service(engine: AsyncEngine, settings: ServerSettings) -> Service:
    """The parts of a new server over an engine."""
    lifecycle = Lifecycle(engine.config.max_num_seqs + settings.max_queued)
    metrics = Metrics(engine.stats, lambda: lifecycle.num_requests, settings.model_name)
    return Service(engine, settings, lifecycle, metrics, started_at=int(time.time()))
