"""What the parts of a station say together: whether scores have left their calibration, whether too many parts are rejected."""

from __future__ import annotations

import math
import statistics
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edge_inspector.config import LimitsConfig
from edge_inspector.messages import Cause
from edge_inspector.results import Finding, Verdict

FEWEST = 20
"""Scores at calibration, at least, for its quartiles to mean something."""
_SURE = 3.0
"""Standard deviations of a normal: a rate is above its limit with 99.87 % confidence."""
_CLEAR = 0.8


def surely_above(failed: int, parts: int) -> float:
    """The rate that the true one is above with 99.87 % confidence (Wilson 1927, lower bound)."""
    if not parts:
        return 0.0
    rate, square = failed / parts, _SURE**2
    spread = _SURE * math.sqrt(rate * (1 - rate) / parts + square / (4 * parts**2))
    return max(0.0, (rate + square / (2 * parts) - spread) / (1 + square / parts))


@dataclass(frozen=True)
class Drift:
    """Where the scores of one region are, beside those of its calibration."""

    median: float
    quartiles: tuple[float, float, float]
    """Of the good parts at calibration."""
    parts: int
    calibrated: int

    @property
    def shift(self) -> float:
        """How far the median has moved: 0 not at all, 1 to the quartile above, -1 to the quartile below."""
        low, middle, high = self.quartiles
        side = high - middle if self.median >= middle else middle - low
        return (self.median - middle) / side if side > 0 else 0.0 if self.median == middle else math.inf


class Trends:
    """The last parts of one station. `add` from its thread, the rest from any."""

    def __init__(self, station: str, limits: LimitsConfig) -> None:
        """Knows no calibration yet."""
        self._station, self._limits = station, limits
        self._failed: deque[bool] = deque(maxlen=limits.parts)
        self._scores: dict[tuple[str, str, str], deque[float]] = {}
        self._quartiles: dict[str, tuple[int, tuple[float, float, float]]] = {}
        self._lock = threading.Lock()
        self._told: set[object] = set()

    def begin(self, calibrations: Mapping[str, Sequence[float]]) -> None:
        """Forget everything: from now on parts are judged by these bundles. Bundle name -> scores of good parts."""
        with self._lock:
            self._failed.clear()
            self._scores.clear()
            self._quartiles = {
                name: (len(scores), (q[0], q[1], q[2]))
                for name, scores in calibrations.items()
                if len(scores) >= FEWEST and (q := statistics.quantiles(scores, n=4, method="inclusive"))
            }

    def add(self, verdict: Verdict, findings: Sequence[Finding]) -> None:
        """One part; what is undecided says nothing."""
        if verdict is Verdict.UNDECIDED:
            return
        with self._lock:
            self._failed.append(verdict is Verdict.FAIL)
            for finding in findings:
                if finding.score is not None:
                    key = (finding.camera, finding.roi, finding.bundle.name)
                    if key not in self._scores:
                        self._scores[key] = deque(maxlen=self._limits.parts)
                    self._scores[key].append(finding.score)

    def drifts(self) -> dict[tuple[str, str, str], Drift]:
        """By camera, region and bundle, once enough parts came."""
        with self._lock:
            full = {key: list(scores) for key, scores in self._scores.items() if len(scores) == self._limits.parts}
            quartiles = self._quartiles
        return {
            key: Drift(statistics.median(scores), quartiles[key[2]][1], len(scores), quartiles[key[2]][0])
            for key, scores in full.items()
            if key[2] in quartiles
        }

    @property
    def reject_rate(self) -> tuple[int, int]:
        """Failed ones, of so many."""
        with self._lock:
            return sum(self._failed), len(self._failed)

    def causes(self) -> list[Cause]:
        """What people should look at, with its evidence. From one thread."""
        causes = []
        failed, parts = self.reject_rate
        limit = self._limits.max_reject_rate
        if self._is_beyond("rejects", surely_above(failed, parts) / limit):
            text = (
                f"{failed} of the last {parts} parts failed ({failed / parts:.1%}; surely more than "
                f"{surely_above(failed, parts):.1%}), at most {limit:.1%} may: look at parts, camera and light"
            )
            causes.append(Cause(code="reject_rate_high", severity="off_spec", thing=self._station, text=text))
        for (camera, roi, bundle), drift in self.drifts().items() if self._limits.drift else ():
            if not self._is_beyond((camera, roi, bundle), abs(drift.shift)):
                continue
            side = drift.quartiles[2 if drift.shift > 0 else 0]
            text = (
                f"{camera}, {roi}, bundle {bundle}: the median score of the last {drift.parts} parts is {drift.median:.3g}; of "
                f"{drift.calibrated} good parts at calibration it was {drift.quartiles[1]:.3g}, and a quarter "
                f"{'above' if drift.shift > 0 else 'below'} {side:.3g}: light, focus or parts have changed. "
                "Where the parts are good all the same: edge-inspector teach BUNDLE --good PICTURES"
            )
            causes.append(Cause(code="score_drift", severity="off_spec", thing=f"{self._station}/{camera}", text=text))
        return causes

    def _is_beyond(self, what: object, share: float) -> bool:
        """Whether a limit is exceeded; once it was, only clearly below does it count as kept: at the limit nothing flickers."""
        limit = _CLEAR if what in self._told else 1.0
        if share > limit:
            self._told.add(what)
        else:
            self._told.discard(what)
        return share > limit
