"""Parts judged a second time, by what may come next: for comparison only, never for a verdict."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edge_inspector.errors import InspectorError
from edge_inspector.evidence import EvidenceStore
from edge_inspector.frames import Frame, Trigger
from edge_inspector.inspector import Inspection, Inspectors
from edge_inspector.messages import Disagreement, PhaseFacts, ShadowFacts
from edge_inspector.remote.rollout import Rollout, Wanted
from edge_inspector.results import Verdict

KEPT = 8
"""Disagreements that are reported."""
_TIMES = 512
_NOISE_MS = 2.0
"""A difference that says nothing, whatever the ratio."""


@dataclass
class ShadowCounts:
    """What came out so far."""

    parts: int = 0
    disagreements: int = 0


class Shadow:
    """The second opinion of one station. Used from the station's thread."""

    def __init__(self, inspectors: Inspectors, evidence: EvidenceStore) -> None:
        """Pictures of parts that are judged differently go to `evidence`."""
        self.inspectors, self._evidence = inspectors, evidence
        self.counts = ShadowCounts()
        self.kept: deque[Disagreement] = deque(maxlen=KEPT)
        """The latest."""
        self._times_ms: deque[tuple[float, float]] = deque(maxlen=_TIMES)

    def judge(self, trigger: Trigger, recipe_id: str, frames: Mapping[str, Sequence[Frame]], told: Inspection) -> None:
        """Judge the frames of a part again, of which `told` was told."""
        if told.verdict is Verdict.UNDECIDED or recipe_id not in self.inspectors.by_recipe:
            return  # nothing to compare with
        second = self.inspectors.by_recipe[recipe_id][0].inspect(frames)
        if second.lost is not None:
            raise second.lost
        self.counts.parts += 1
        self._times_ms.append((told.times_ms.infer, second.times_ms.infer))
        if second.verdict is told.verdict:
            return
        self.counts.disagreements += 1
        kept = self._evidence.keep(
            "failed", hashlib.sha256(f"shadow/{trigger.trigger_id}/{trigger.triggered_at}".encode()).hexdigest(), frames,
            (*told.views, *second.views),
            f"{trigger.part_id or trigger.trigger_id}  {told.verdict.value}, then {second.verdict.value}",
        )  # fmt: skip
        self.kept.append(
            Disagreement(
                trigger_id=trigger.trigger_id,
                part_id=trigger.part_id,
                old=told.verdict,
                new=second.verdict,
                old_ratio=_ratio(told),
                new_ratio=_ratio(second),
                evidence=kept,
            )  # fmt: skip
        )

    def times_ms(self) -> tuple[float, float]:
        """Median time of the networks for one part: of those in force, and of these."""
        times = list(self._times_ms)
        return (statistics.median(old for old, _ in times), statistics.median(new for _, new in times)) if times else (0.0, 0.0)


def _ratio(inspection: Inspection) -> float | None:
    return max((f.ratio for f in inspection.findings if f.ratio is not None), default=None)


class Comparison:
    """A wanted release beside the one in force, on all stations that judge with it."""

    def __init__(self, rollout: Rollout, wanted: Wanted, shadows: Mapping[str, Shadow]) -> None:
        """Begins now."""
        self.rollout, self.wanted = rollout, wanted
        self._shadows = shadows
        self._end_s = time.monotonic() + wanted.order.shadow_s

    @property
    def parts(self) -> int:
        """Judged by both."""
        return sum(shadow.counts.parts for shadow in self._shadows.values())

    @property
    def is_over(self) -> bool:
        """Whether enough parts came, or their time is over."""
        return self.parts >= self.wanted.order.shadow_parts or time.monotonic() > self._end_s

    def phase(self) -> PhaseFacts:
        """How far it is."""
        return PhaseFacts(name="shadow", done=self.parts, total=self.wanted.order.shadow_parts)

    def facts(self) -> ShadowFacts:
        """What came out so far."""
        times = [shadow.times_ms() for shadow in self._shadows.values() if shadow.counts.parts]
        latest = [one for shadow in self._shadows.values() for one in shadow.kept]
        return ShadowFacts(
            parts=self.parts, disagreements=sum(shadow.counts.disagreements for shadow in self._shadows.values()),
            old_ms=round(max((old for old, _ in times), default=0.0), 2),
            new_ms=round(max((new for _, new in times), default=0.0), 2), latest=tuple(latest[-KEPT:]),
        )  # fmt: skip

    def fault(self) -> InspectorError | None:
        """Why it must not come into force; None: it may."""
        order, facts = self.wanted.order, self.facts()
        if facts.parts < order.shadow_parts:
            return InspectorError(
                f"{facts.parts} of {order.shadow_parts} parts came within {order.shadow_s} s to compare it with"
            )
        if facts.disagreements > order.max_disagreements * facts.parts:
            return InspectorError(
                f"{facts.disagreements} of {facts.parts} parts are judged differently, {order.max_disagreements:.0%} may be"
            )
        if facts.new_ms > order.max_slower * facts.old_ms + _NOISE_MS:
            return InspectorError(
                f"its networks take {facts.new_ms:.1f} ms for a part, those in force {facts.old_ms:.1f} ms; "
                f"{order.max_slower:g} times as long may be"
            )
        return None
