"""What is wrong, in the terms of NAMUR NE 107: failure, check function, out of specification, maintenance required."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from edge_inspector.frames import utc_now
from edge_inspector.messages import CameraFacts, Cause, ClockFacts, HealthMessage, OutboxFacts
from edge_inspector.mqtt import Connection
from edge_inspector.outbox import Counts

Severity = Literal["failure", "check_function", "off_spec", "maintenance_required"]
_ORDER = ("failure", "check_function", "off_spec", "maintenance_required")
_TIME_ERROR = 5
_TIMEX_BYTES = 256
_DISK_HIGH = 0.9


def clock() -> ClockFacts:
    """Whether the kernel's clock is synchronised (adjtimex(2))."""
    state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    synchronised = 0 <= state < _TIME_ERROR
    return ClockFacts(ok=synchronised, source="kernel" if synchronised else "unsynchronised")


def storage_causes(outbox: Counts, state: Path) -> list[Cause]:
    """What is wrong with the disk and the outbox."""
    causes = []
    if outbox.failing:
        text = f"results cannot be written: {outbox.failing}"
        causes.append(Cause(code="outbox_failing", severity="failure", thing="outbox", text=text))
    if outbox.dropped_unsent:
        text = f"{outbox.dropped_unsent} results dropped by the quota before the broker had them, since start"
        causes.append(Cause(code="outbox_dropped", severity="maintenance_required", thing="outbox", text=text))
    if outbox.damaged is not None and outbox.damaged.exists():
        text = f"the file of results was damaged and lies in {outbox.damaged}: look at the disk, then delete it"
        text += f"; {outbox.salvaged}, in new streams" * bool(outbox.salvaged)
        causes.append(Cause(code="outbox_damaged", severity="maintenance_required", thing="outbox", text=text))
    usage = shutil.disk_usage(state)
    if usage.used / usage.total > _DISK_HIGH:
        text = f"{usage.used / usage.total:.0%} of the disk used"
        causes.append(Cause(code="disk_high", severity="maintenance_required", thing="disk", text=text))
    return causes


_SEVERITIES: dict[str, Severity] = {
    "session_taken_over": "failure",
    "subscription_refused": "failure",
    "publication_refused": "failure",
    "verdict_refused": "failure",
    "verdict_too_large": "failure",
    "connection_ended": "maintenance_required",
}


def broker_causes(connection: Connection, thing: str) -> list[Cause]:
    """What is, or lately was, wrong between a connection and its broker."""
    return [
        Cause(code=trouble.code, severity=_SEVERITIES.get(trouble.code, "off_spec"), thing=thing, text=trouble.text)
        for trouble in connection.troubles()
    ]


def assess(
    causes: Iterable[Cause], outbox: Counts, clock_facts: ClockFacts, dropped_messages: int, cameras: dict[str, CameraFacts]
) -> HealthMessage:
    """The status is that of the gravest cause."""
    reasons = sorted(causes, key=lambda cause: _ORDER.index(cause.severity))
    return HealthMessage(
        at=utc_now(),
        status=reasons[0].severity if reasons else "normal",
        reasons=tuple(reasons[:16]),
        outbox=OutboxFacts(
            pending=outbox.pending,
            used=round(outbox.used, 3),
            dropped=outbox.dropped,
            dropped_unsent=outbox.dropped_unsent,
            refused=outbox.refused,
        ),
        clock=clock_facts,
        dropped_messages=dropped_messages,
        cameras=cameras,
    )
