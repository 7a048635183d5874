"""roi, recipes, results, scoring: pure rules."""

from __future__ import annotations

import math
from datetime import datetime, timezone
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_inspector import scoring
from edge_inspector.documents import SCHEMAS
from edge_inspector.recipes import Decision, decide
from edge_inspector.results import (
    MAX_RESULT_BYTES,
    BundleRef,
    EngineRef,
    Finding,
    Reason,
    Region,
    Result,
    Verdict,
    rfc3339,
)  # fmt: skip
from edge_inspector.roi import Rectangle, Roi
from edge_inspector.schema import json_schema
from edge_inspector.scoring import Wish

NOW = datetime(2026, 11, 23, 8, 15, 30, 100_000, tzinfo=timezone.utc)


def finding(verdict: Verdict, frame: int = 0, **more: Any) -> Finding:
    return Finding(
        camera="top", roi="rim", frame=frame, verdict=verdict, reason=Reason.NOT_A_NUMBER, score=1.0, threshold=1.2,
        ratio=0.8, bundle=BundleRef(name="b", release=1, sha256="ab"), engine=EngineRef(runtime="x", precision="fp32"), **more,
    )  # fmt: skip


def result(**more: Any) -> Result:
    values: dict[str, Any] = {
        "station": "s", "trigger_id": "T", "verdict": Verdict.PASS, "reason": Reason.BELOW_THRESHOLD,
        "triggered_at": NOW, "decided_at": NOW, "expires_at": NOW,
    }  # fmt: skip
    return Result(**{**values, **more})


P, F, U = Verdict.PASS, Verdict.FAIL, Verdict.UNDECIDED


@pytest.mark.parametrize(
    ("frames", "rule", "verdict"),
    [
        ([], (1, 1), U),
        ([[P, P]], (1, 1), P),
        ([[P, F]], (1, 1), F),
        ([[U, P]], (1, 1), U),
        ([[U, F]], (1, 1), F),
        ([[F], [P], [P]], (3, 2), P),
        ([[F], [F], [P]], (3, 2), F),
        ([[F], [U], [P]], (3, 2), U),
        ([[F], [P]], (3, 2), U),
        ([[P], [P]], (3, 2), P),
    ],
)
def test_findings_become_a_verdict(frames: list[list[Verdict]], rule: tuple[int, int], verdict: Verdict) -> None:
    findings = [finding(v, number) for number, frame in enumerate(frames) for v in frame]
    assert decide(findings, Decision(frames=rule[0], failing_frames=rule[1]))[0] is verdict


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_decides_nothing(score: float) -> None:
    assert scoring.judge(score, 1.0) == (Verdict.UNDECIDED, Reason.NOT_A_NUMBER)


def true_rate(threshold: float) -> float:
    """Share of a lognormal population above a threshold."""
    return 1 - 0.5 * (1 + math.erf(math.log(threshold) / math.sqrt(2)))


def test_the_sure_rate_is_exceeded_on_fresh_good_parts_as_seldom_as_it_says() -> None:
    """Over 400 draws in at most 5 % (with the binomial's own slack)."""
    rng = np.random.default_rng(7)
    wish = Wish(0.05, sure=True)
    broken = 0
    for _ in range(400):
        made = scoring.promise(rng.lognormal(size=120).tolist(), wish)
        assert made.at_most <= wish.rate
        broken += true_rate(made.threshold) > made.at_most
    assert scoring.binomial_cdf(broken - 1, 400, 0.05) < 0.999
    assert broken > 0, "a threshold that never breaks it is needlessly high"


@pytest.mark.parametrize("rate", [0.02, 0.05, 0.1])
def test_the_expected_rate_is_that_of_fresh_good_parts_on_average(rate: float) -> None:
    rng = np.random.default_rng(8)
    rates = []
    for _ in range(400):
        made = scoring.promise(rng.lognormal(size=119).tolist(), Wish(rate))
        assert made.expected <= rate
        rates.append(true_rate(made.threshold))
    slack = 4 * np.std(rates) / len(rates) ** 0.5
    assert abs(np.mean(rates) - made.expected) < slack


@given(
    st.lists(st.floats(0.1, 10), min_size=1, max_size=80),
    st.floats(0.001, 0.5),
    st.floats(0.001, 0.5),
    st.booleans(),
)
def test_who_allows_more_rejects_gets_no_higher_threshold(scores: list[float], one: float, other: float, sure: bool) -> None:
    low, high = sorted((one, other))
    strict, lax = (scoring.promise(scores, Wish(rate, sure=sure)) for rate in (low, high))
    assert strict.threshold >= lax.threshold
    assert strict.threshold in scores, "no fitted tail decides"


@pytest.mark.parametrize(
    ("wish", "needed", "at_most"),
    [(Wish(0.05, sure=True), 59, 1 - 0.05 ** (1 / 3)), (Wish(0.05), 19, 1 - 0.05 ** (1 / 3))],
)
def test_too_few_pictures_give_the_largest_score_and_say_how_many_are_missing(wish: Wish, needed: int, at_most: float) -> None:
    made = scoring.promise([1.0, 3.0, 2.0], wish)
    assert (made.threshold, made.kept, made.expected) == (3.0, False, 0.25)
    assert made.at_most == pytest.approx(at_most)
    assert f"needs {needed - 3} more good pictures" in str(made)
    assert not scoring.promise(list(range(1, needed)), wish).kept
    assert scoring.promise(list(range(1, needed + 1)), wish).kept


def test_both_rates_are_told_apart() -> None:
    made = scoring.promise(list(range(200)), Wish(0.03))
    assert str(made) == ("2.99 % of good parts will be rejected; with 95 % confidence at most 5.18 %; from 200 good parts")


def test_what_a_threshold_costs_is_told_for_half_and_twice_as_many_rejects() -> None:
    good = [float(n) for n in range(1, 100)]
    drawn = [94.5, 96.5, 97.5, 98.5]
    cost = scoring.found(drawn, good, Wish(0.04), scoring.promise)
    assert (cost.here, cost.at_half, cost.at_twice) == (0.75, 0.25, 1.0)
    assert str(cost) == ("75% of drawn defects are found; 25% with half as many good parts rejected, 100% with twice as many")
    few = scoring.found(drawn, good[-30:], Wish(0.04), scoring.promise)
    assert (few.at_half, str(few)) == (
        None,
        "0% of drawn defects are found; 25% with twice as many good parts rejected",
    )


def test_intervals_are_clopper_and_pearsons() -> None:
    assert scoring.interval(0, 10) == pytest.approx((0.0, 0.30850), abs=1e-5)
    assert scoring.interval(3, 10) == pytest.approx((0.06674, 0.65245), abs=1e-5)
    assert scoring.interval(10, 10) == pytest.approx((0.69150, 1.0), abs=1e-5)
    assert scoring.interval(0, 0) == (0.0, 1.0)


@given(st.lists(st.integers(0, 9), min_size=1), st.lists(st.integers(0, 9), min_size=1))
def test_auroc_counts_pairs(normal: list[int], bad: list[int]) -> None:
    pairs = [(b > a) + 0.5 * (b == a) for a in normal for b in bad]
    assert scoring.auroc(normal, bad) == pytest.approx(sum(pairs) / len(pairs))


def test_scores_lie_clearly_above_others_as_seldom_by_chance_as_is_said() -> None:
    rng = np.random.default_rng(0)
    chance = [scoring.clearly_above(rng.gamma(3, size=25).tolist(), rng.gamma(3, size=200).tolist()) for _ in range(2000)]
    assert 0.03 < np.mean(chance) < 0.07
    real = [scoring.clearly_above((rng.gamma(3, size=25) + 2).tolist(), rng.gamma(3, size=200).tolist()) for _ in range(200)]
    assert np.mean(real) > 0.95
    assert not scoring.clearly_above([], [1.0])
    assert not scoring.clearly_above([1.0], [])


def test_a_polygon_covers_the_pixels_inside_it() -> None:
    roi = Roi(polygon=((2, 2), (10, 2), (10, 10), (2, 10)))
    box = roi.box(20, 20)
    assert box == (2, 2, 9, 9)
    mask = roi.mask(box)
    assert mask is not None
    assert mask.all()
    triangle = Roi(polygon=((0, 0), (9, 0), (0, 9))).mask((0, 0, 10, 10))
    assert triangle is not None
    assert triangle[0, 0]
    assert not triangle[9, 9]


def test_a_region_outside_the_frame_has_no_box() -> None:
    assert Roi(rectangle=Rectangle(x_px=90, y_px=0, w_px=20, h_px=20)).box(100, 100) is None
    assert Roi().box(100, 50) == (0, 0, 50, 100)


def test_a_result_never_exceeds_four_kilobytes_and_counts_what_it_leaves_out() -> None:
    region = Region(x_px=1, y_px=2, w_px=3, h_px=4, area_px=12, peak=1.23456)
    large = result(findings=tuple(finding(F, regions=(region,) * 16) for _ in range(30)), detail="x" * 256)
    payload = large.payload()
    assert len(payload) <= MAX_RESULT_BYTES
    read = Result.model_validate_json(payload)
    assert read.findings_omitted + len(read.findings) == 30
    assert all(f.regions_omitted + len(f.regions) == 16 for f in read.findings)
    jsonschema.validate(__import__("json").loads(payload), json_schema(SCHEMAS["result"]))


def test_times_are_utc_with_milliseconds_and_z() -> None:
    assert rfc3339(NOW) == "2026-11-23T08:15:30.100Z"
    assert b'"triggered_at":"2026-11-23T08:15:30.100Z"' in result().payload()


def test_a_threshold_that_some_parts_need_has_the_rates_that_it_has_among_all() -> None:
    scores = [float(n) for n in range(1, 200)]
    usual, higher = scoring.promise(scores, Wish(0.05)), scoring.promise(scores, Wish(0.05), 197.5)
    assert (higher.threshold, higher.expected) == (197.5, 3 / 200)
    assert higher.at_most < usual.at_most
    assert scoring.promise(scores, Wish(0.05), 3.0) == usual


@pytest.mark.parametrize("sure", [False, True])
@given(st.lists(st.floats(0.1, 10), min_size=30, max_size=90, unique=True), st.integers(0, 6))
def test_parts_that_are_left_out_count_as_rejected_ones(sure: bool, scores: list[float], count: int) -> None:
    """As if they had scored higher than all others; only where the threshold would be one of theirs is it the largest left."""
    wish = Wish(0.1, sure=sure)
    said, whole = (
        scoring.promise(scores, wish, rejected=count),
        scoring.promise([*scores, *(100.0 + n for n in range(count))], wish),
    )
    assert said.n == whole.n
    if whole.threshold < 100:
        assert said == whole
    else:
        assert said.threshold == max(scores)
        assert said.expected == pytest.approx((count + 1) / (said.n + 1))
        assert not said.kept
