"""Scores beside their calibration, rejects beside their limit: told when something has changed, quiet when nothing has."""

from __future__ import annotations

import numpy as np
import pytest

from edge_inspector.config import LimitsConfig
from edge_inspector.results import BundleRef, EngineRef, Finding, Reason, Verdict
from edge_inspector.trends import Trends, surely_above

RNG = np.random.default_rng(5)
CALIBRATION = tuple(float(score) for score in RNG.gamma(9, 0.05, 300))


def finding(score: float, verdict: Verdict = Verdict.PASS) -> Finding:
    return Finding(
        camera="top", roi="rim", verdict=verdict, reason=Reason.BELOW_THRESHOLD, score=score, threshold=1.0, ratio=score,
        bundle=BundleRef(name="lid", release=7, sha256="ab"), engine=EngineRef(runtime="x", precision="fp32"),
    )  # fmt: skip


def judged(scores: list[float], failed: int = 0, **limits: object) -> Trends:
    trends = Trends("press-1", LimitsConfig.model_validate(limits))
    trends.begin({"lid": CALIBRATION})
    for number, score in enumerate(scores):
        verdict = Verdict.FAIL if number < failed else Verdict.PASS
        trends.add(verdict, [finding(score, verdict)])
    return trends


def codes(trends: Trends) -> list[str]:
    return [cause.code for cause in trends.causes()]


def test_parts_as_at_calibration_tell_nothing_however_often_they_are_looked_at() -> None:
    for _ in range(200):
        assert codes(judged([float(score) for score in RNG.gamma(9, 0.05, 200)])) == []


@pytest.mark.parametrize(("factor", "side"), [(1.35, "above"), (0.65, "below")])
def test_scores_that_have_left_the_calibrations_middle_half_are_told_with_their_evidence(factor: float, side: str) -> None:
    trends = judged([float(score) * factor for score in RNG.gamma(9, 0.05, 200)])
    (cause,) = trends.causes()
    assert (cause.code, cause.severity, cause.thing) == ("score_drift", "off_spec", "press-1/top")
    assert "bundle lid" in cause.text
    assert "of 300 good parts" in cause.text
    assert side in cause.text
    assert codes(judged([float(score) * factor for score in RNG.gamma(9, 0.05, 200)], drift=False)) == []


def test_too_few_parts_or_pictures_tell_nothing_and_other_bundles_begin_anew() -> None:
    trends = judged([9.0] * 199)
    assert codes(trends) == []
    trends.add(Verdict.UNDECIDED, [finding(9.0)])
    assert codes(trends) == [], "what is undecided says nothing"
    trends.add(Verdict.PASS, [finding(9.0)])
    assert codes(trends) == ["score_drift"]
    trends.begin({"lid": CALIBRATION[:19]})
    for _ in range(200):
        trends.add(Verdict.PASS, [finding(9.0)])
    assert codes(trends) == []


def test_rejects_above_their_limit_are_told_only_when_chance_does_not_explain_them() -> None:
    assert codes(judged([0.4] * 200, failed=50)) == [], "25 % of 200: chance could do that at 20 %"
    trends = judged([0.4] * 200, failed=70)
    (cause,) = [cause for cause in trends.causes() if cause.code == "reject_rate_high"]
    assert "70 of the last 200 parts failed (35.0%" in cause.text
    assert codes(judged([0.4] * 200, failed=50, max_reject_rate=0.1)) == ["reject_rate_high"]


def test_at_the_limit_nothing_flickers() -> None:
    trends = judged([float(np.quantile(CALIBRATION, 0.76))] * 200)
    assert codes(trends) == ["score_drift"]
    for share, told in ((0.74, ["score_drift"]), (0.6, []), (0.74, [])):
        for _ in range(200):
            trends.add(Verdict.PASS, [finding(float(np.quantile(CALIBRATION, share)))])
        assert codes(trends) == told, share


def test_the_bound_is_wilsons_and_is_kept_by_chance() -> None:
    assert surely_above(0, 0) == 0.0
    assert surely_above(0, 200) == 0.0
    assert surely_above(50, 200) == pytest.approx(0.17027, abs=1e-5)
    above = sum(surely_above(int(RNG.binomial(200, 0.2)), 200) > 0.2 for _ in range(5000))
    assert above / 5000 < 0.004, "told wrongly in one of 740 windows by a normal, a little more of so few parts"
