"""Scores -> verdicts, and the threshold as a promise. Plain statistics; numpy only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from edge_inspector.results import Reason, Verdict


def judge(score: float, threshold: float) -> tuple[Verdict, Reason]:
    """A part fails above the threshold. A score that is not a finite number decides nothing."""
    if not math.isfinite(score):
        return Verdict.UNDECIDED, Reason.NOT_A_NUMBER
    if score > threshold:
        return Verdict.FAIL, Reason.ABOVE_THRESHOLD
    return Verdict.PASS, Reason.BELOW_THRESHOLD


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(at most k of n) when each happens with probability p."""
    if k >= n or p <= 0:
        return 1.0
    if k < 0 or p >= 1:
        return 0.0
    logs = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p) + (n - i) * math.log1p(-p)
        for i in range(k + 1)
    ]
    return min(1.0, math.fsum(math.exp(value) for value in logs))


def interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact two-sided confidence interval of a rate of which k of n were seen (Clopper and Pearson 1934)."""
    if n == 0:
        return 0.0, 1.0
    tail = (1 - confidence) / 2

    def solve(reached: int, target: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if binomial_cdf(reached, n, middle) > target else (low, middle)
        return (low + high) / 2

    return (0.0 if k == 0 else solve(k - 1, 1 - tail)), (1.0 if k == n else solve(k, tail))


def upper_bound(k: int, n: int, confidence: float) -> float:
    """The rate that is not exceeded, with this confidence, where k of n were seen (Clopper and Pearson 1934, one-sided)."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if binomial_cdf(k, n, middle) > 1 - confidence else (low, middle)
    return high


@dataclass(frozen=True)
class Wish:
    """How many good parts a person allows a threshold to reject."""

    rate: float
    sure: bool = False
    """False: `rate` is to be expected. True: it is exceeded with a probability of at most 1 - `confidence`."""
    confidence: float = 0.95

    def rank(self, n: int) -> int:
        """The threshold may be the r-th largest of n scores; 0 where n does not carry the wish.

        A fresh part lies above the r-th largest of n others with probability r / (n + 1) at most (Vovk et al. 2005). More
        than `rate` of all good parts lie above it with probability P(Binomial(n, rate) <= r - 1) (Wilks 1941).
        Both hold whatever the distribution.
        """
        if not self.sure:
            return min(n, math.floor(self.rate * (n + 1) + 1e-9))
        rank = 0
        while rank < n and binomial_cdf(rank, n, self.rate) <= 1 - self.confidence:
            rank += 1
        return rank

    @property
    def needed(self) -> int:
        """Good parts that carry the wish at least."""
        if not self.sure:
            return math.ceil(1 / self.rate - 1 - 1e-9)
        return math.ceil(math.log(1 - self.confidence) / math.log1p(-self.rate))

    def __str__(self) -> str:
        return f"{'at most' if self.sure else 'about'} {100 * self.rate:.3g} % of good parts rejected"


@dataclass(frozen=True)
class Promise:
    """A threshold, and both rates at which it rejects good parts: the one to expect, and the one that is sure."""

    threshold: float
    n: int
    """Good parts that it was chosen by."""
    wish: Wish
    kept: bool
    """Whether n good parts carry the wish. Where they do not the threshold is their largest score."""
    expected: float
    """Share of good parts that it rejects on average."""
    at_most: float
    """Share that it does not exceed, with the wish's confidence."""
    review: float
    """From here to the threshold another set of n pictures might have put the limit: passed, but worth a look."""

    @property
    def alpha(self) -> float:
        """The rate that is promised with the wish's confidence."""
        return self.wish.rate if self.wish.sure else self.at_most

    def __str__(self) -> str:
        said = both_rates(self.expected, self.at_most, self.wish.confidence, self.n)
        if self.kept:
            return said
        return f"{said}; {self.wish} was asked for: that needs {self.wish.needed - self.n} more good pictures"


def both_rates(expected: float, at_most: float, confidence: float, n: int) -> str:
    """The rates of good parts that a threshold rejects, in words, so that none is taken for the other."""
    return (
        f"{100 * expected:.3g} % of good parts will be rejected; with {100 * confidence:.3g} % confidence "
        f"at most {100 * at_most:.3g} %; from {n} good parts"
    )


NEXT_TO_NOTHING = 0.1
"""A bundle that finds a smaller share of drawn defects is no good, whatever it promises of good parts."""


@dataclass(frozen=True)
class Found:
    """What a threshold costs: shares of drawn defects that lie above it, and above those of half and twice its wish."""

    here: float
    at_half: float | None
    """None: there are too few good parts to reject half as many."""
    at_twice: float

    def __str__(self) -> str:
        twice = f"{self.at_twice:.0%} with twice as many"
        if self.at_half is None:
            return f"{self.here:.0%} of drawn defects are found; {twice} good parts rejected"
        half = f"{self.at_half:.0%} with half as many good parts rejected"
        return f"{self.here:.0%} of drawn defects are found; {half}, {twice}"


def found(
    drawn: Sequence[float], good: Sequence[float], wish: Wish, keeping: Callable[[Sequence[float], Wish], Promise]
) -> Found:
    """Shares of drawn defects that are found, by their scores and those of good parts; `keeping`: `promise`, or as it."""

    def above(made: Promise) -> float:
        return float((np.asarray(drawn) > made.threshold).mean())

    half = keeping(good, replace(wish, rate=wish.rate / 2))
    twice = keeping(good, replace(wish, rate=min(1.0, 2 * wish.rate)))
    return Found(above(keeping(good, wish)), above(half) if half.kept else None, above(twice))


def promise(scores: Sequence[float], wish: Wish, at_least: float = 0.0, rejected: int = 0) -> Promise:
    """The lowest threshold that keeps a wish, from scores of good parts by networks not fitted to them.

    Where n does not carry the wish it is the largest score, with the rates that this one has. `at_least`: a threshold
    that some of the parts need for themselves. `rejected`: good parts beside these that are rejected whatever they score.
    """
    ordered = sorted(scores, reverse=True)
    n = len(ordered) + rejected
    if not ordered or not all(math.isfinite(score) for score in ordered):
        raise ValueError(f"{len(ordered)} scores, all finite ones are needed")
    allowed = wish.rank(n)
    rank = max(1, allowed - rejected)
    threshold = ordered[rank - 1]
    if at_least > threshold:
        threshold, rank = at_least, 1 + sum(score > at_least for score in ordered)
    above = rank + rejected
    at_most = upper_bound(above - 1, n, wish.confidence)
    lower = next((r for r in range(n) if binomial_cdf(r, n, at_most) >= wish.confidence), n - 1)
    review = min(threshold, ordered[max(0, lower - rejected)])
    return Promise(threshold, n, wish, allowed >= above, above / (n + 1), at_most, review)


def clearly_above(scores: Sequence[float], others: Sequence[float], confidence: float = 0.95) -> bool:
    """Whether scores tend to lie above others, by more than chance (Mann and Whitney 1947, normal approximation, one-sided)."""
    n, m = len(scores), len(others)
    if not (n and m):
        return False
    z = (auroc(others, scores) - 0.5) / math.sqrt((n + m + 1) / (12 * n * m))
    return z > NormalDist().inv_cdf(confidence)


def auroc(normal: ArrayLike, anomalous: ArrayLike) -> float:
    """Probability that an anomalous part scores higher than a normal one; ties count half (Mann and Whitney 1947)."""
    a, b = np.sort(np.asarray(normal, float)), np.asarray(anomalous, float)
    below = np.searchsorted(a, b, "left") + np.searchsorted(a, b, "right")
    return float(below.mean() / (2 * len(a)))
