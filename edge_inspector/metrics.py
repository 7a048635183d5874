"""What Prometheus may scrape from this machine: http://127.0.0.1:PORT/metrics, where device.yaml asks for it.

Counters and gauges are read from their owners when somebody scrapes; only histograms cost the line anything, a few
microseconds a part. Names follow Prometheus's rules: base units, `_total`, one prefix.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from edge_inspector.config import MetricsConfig
from edge_inspector.messages import Cause, HealthMessage, StateMessage
from edge_inspector.results import Result
from edge_inspector.trends import Trends

log = logging.getLogger(__name__)

PREFIX = "edge_inspector"
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_RATIOS = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)
STAGES = ("capture", "preprocess", "infer", "decide", "total")


@dataclass(frozen=True)
class Reading:
    """What a line says of itself when it is scraped."""

    health: HealthMessage
    state: StateMessage
    trends: Mapping[str, Trends]
    """By station."""
    evidence_bytes: Mapping[str, int]
    """By kind of part."""
    evidence_dropped: int
    evidence_lost: int
    connected: bool
    reconnects: int
    disk_free_bytes: int
    silent_s: Mapping[str, float]
    """Seconds since each critical loop ticked."""


class Metrics(Collector):
    """What is counted of results, and what `read` tells when it is asked. Use as a context manager: serves meanwhile."""

    def __init__(self, config: MetricsConfig, read: Callable[[], Reading | None]) -> None:
        """`read` is called in the server's thread."""
        self._config, self._read = config, read
        self._fault = ""
        self.registry = CollectorRegistry(auto_describe=False)
        stations = ("station",)
        self._results = Counter(
            "results", "on disk, since the start", (*stations, "verdict", "reason"), namespace=PREFIX, registry=self.registry
        )
        self._last = Gauge(
            "last_result_timestamp_seconds", "when the last result was decided", stations, namespace=PREFIX,
            registry=self.registry,
        )  # fmt: skip
        self._stages = Histogram(
            "stage_seconds", "of a part, by stage; total: from trigger to decision", (*stations, "stage"), namespace=PREFIX,
            registry=self.registry, buckets=_SECONDS,
        )  # fmt: skip
        self._record = Histogram(
            "record_seconds", "from decision until the record is on disk", stations, namespace=PREFIX, registry=self.registry,
            buckets=_SECONDS,
        )  # fmt: skip
        self._ratios = Histogram(
            "score_ratio", "score of a region over its threshold", (*stations, "camera", "roi", "bundle"), namespace=PREFIX,
            registry=self.registry, buckets=_RATIOS,
        )  # fmt: skip
        self.registry.register(self)

    def __enter__(self) -> Metrics:
        """Serve. Where the port is taken the line goes on without: `causes` says so."""
        self._server = None
        try:
            self._server, self._thread = start_http_server(self._config.port, self._config.host, self.registry)
        except OSError as error:
            self._fault = f"{self._config.host}:{self._config.port}: {error.strerror}"
            log.error("metrics are not served: %s", self._fault)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Let go of the port."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join(2.0)

    def causes(self) -> list[Cause]:
        """What people should know."""
        if not self._fault:
            return []
        return [Cause(code="metrics_unserved", severity="maintenance_required", thing="metrics", text=self._fault)]

    def count(self, result: Result, stored_ms: float) -> None:
        """A result that is on disk; `stored_ms`: since its decision."""
        self._results.labels(result.station, result.verdict.value, result.reason.value).inc()
        self._last.labels(result.station).set(result.decided_at.timestamp())
        for stage in STAGES if result.state == "completed" else ():  # what was never begun took no time
            self._stages.labels(result.station, stage).observe(getattr(result.times_ms, stage) / 1e3)
        self._record.labels(result.station).observe(stored_ms / 1e3)
        for finding in result.findings:
            if finding.ratio is not None:
                self._ratios.labels(result.station, finding.camera, finding.roi, finding.bundle.name).observe(finding.ratio)

    def collect(self) -> Iterator[Metric]:
        """Everything that is read when it is asked for; nothing before the line stands."""
        reading = self._read()
        if reading is not None:
            for name, text, value in _values(reading):
                counts = name.endswith("_total")
                family = CounterMetricFamily if counts else GaugeMetricFamily
                yield family(f"{PREFIX}_{name.removesuffix('_total')}", text, value=value)
            yield from _labelled(reading)


def _values(reading: Reading) -> Iterator[tuple[str, str, float]]:
    outbox = reading.health.outbox
    yield "outbox_pending", "results that the broker has not acknowledged", outbox.pending
    yield "outbox_used_ratio", "share of its quota in use", outbox.used
    yield "outbox_dropped_total", "results dropped by the quota", outbox.dropped
    yield "outbox_dropped_unsent_total", "of these, before the broker had them", outbox.dropped_unsent
    yield "outbox_refused_total", "results that could not be written at first", outbox.refused
    yield "mqtt_connected", "1: the broker connection stands", reading.connected
    yield "mqtt_reconnects_total", "connections that ended", reading.reconnects
    yield "messages_dropped_total", "inbound messages refused or not taken in time", reading.health.dropped_messages
    yield "clock_synchronised", "1: times can be trusted", reading.health.clock.ok
    yield "disk_free_bytes", "of the disk with the state folder", reading.disk_free_bytes
    yield "evidence_dropped_total", "parts whose pictures were not kept, as their results say", reading.evidence_dropped
    yield "evidence_lost_total", "parts whose pictures were lost after their results said stored", reading.evidence_lost
    yield "configuration_version", "of line.yaml in force", reading.state.configuration_version or 0


def _gauge(name: str, text: str, labels: tuple[str, ...], values: Mapping[Any, float]) -> Metric:
    family = GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _labelled(reading: Reading) -> Iterator[Metric]:
    health = reading.health
    yield _gauge("health", "1: the NAMUR NE 107 status", ("status",), {(health.status,): 1})
    reasons = {(cause.severity, cause.code, cause.thing): 1.0 for cause in health.reasons}
    yield _gauge("health_reason", "1: what is wrong", ("severity", "code", "thing"), reasons)
    yield _gauge("evidence_bytes", "kept, by kind of part", ("kind",), {(k,): v for k, v in reading.evidence_bytes.items()})
    silent = {(name,): round(age, 3) for name, age in reading.silent_s.items()}
    yield _gauge("loop_silent_seconds", "since a critical loop ticked", ("loop",), silent)
    cameras = {tuple(name.split("/", 1)): facts for name, facts in health.cameras.items()}
    up = {key: float(facts.state == "streaming") for key, facts in cameras.items()}
    yield _gauge("camera_up", "1: it delivers", ("station", "camera"), up)
    for name in ("frames", "lost", "broken", "missing", "skipped", "reopened"):
        counted = CounterMetricFamily(f"{PREFIX}_camera_{name}", "see health", labels=("station", "camera"))
        for key, facts in cameras.items():
            counted.add_metric(key, getattr(facts, name))
        yield counted
    bundles = {
        (name, str(engine.release), engine.sha256, engine.runtime, engine.precision): 1.0
        for name, engine in reading.state.engines.items()
    }
    yield _gauge("bundle_info", "what judges", ("bundle", "release", "sha256", "runtime", "precision"), bundles)
    rates = {(name,): failed / parts for name, one in reading.trends.items() for failed, parts in (one.reject_rate,) if parts}
    yield _gauge("reject_ratio", "failed parts among the last ones that were judged", ("station",), rates)
    shifts = {(name, *key): drift.shift for name, one in reading.trends.items() for key, drift in one.drifts().items()}
    yield _gauge(
        "score_shift_quartiles", "median score less that of the calibration; 1: to its upper quartile",
        ("station", "camera", "roi", "bundle"), shifts,
    )  # fmt: skip
