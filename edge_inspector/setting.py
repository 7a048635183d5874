"""What a station shares with the rest of the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edge_inspector.cameras import Source
from edge_inspector.evidence import EvidenceStore
from edge_inspector.inspector import Inspectors
from edge_inspector.metrics import Metrics
from edge_inspector.outbox import Outbox
from edge_inspector.outputs import Outputs
from edge_inspector.results import ConfigurationRef
from edge_inspector.standing import Orders


@dataclass(frozen=True)
class Setting:
    """Given to a station when it is made."""

    outbox: Outbox
    evidence: EvidenceStore
    configuration: ConfigurationRef
    session: str
    make_source: Callable[[str], Source]
    """Camera name -> fresh source."""
    inspectors: Callable[[Callable[[str, str, int, int], None]], Inspectors]
    """Opens what judges; tells of a build (bundle, phase, step, steps). Raises InspectorError."""
    clock_ok: Callable[[], bool]
    watch: Callable[[str], Callable[[], None]]
    """Loop name -> its tick."""
    forget: Callable[[str], None]
    orders: Orders
    """What people ordered of its stations; it was read before any of them begins."""
    numbers_stay: Callable[[], bool] = lambda: True
    """Whether the number that a result gets now is its last one."""
    hindrance: Callable[[], str] = lambda: ""
    """Why the device cannot let this station judge a part now; empty: it can. Asked for each part: it must not wait."""
    output: Outputs | None = None
    """Its wires to the line."""
    metrics: Metrics | None = None
    """What is counted for Prometheus, where it is asked for."""
