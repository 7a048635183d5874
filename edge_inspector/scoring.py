"""Scores -> verdicts, and the threshold as a promise. Plain statistics; numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Promise:
    """A threshold and what may be said of it: at most `alpha` of good parts are rejected, with that confidence."""

    threshold: float
    n: int
    alpha: float
    confidence: float
    kept: bool
    needed: int
    """Good pictures that would support the promise; n when it is kept."""
    supported: float
    """The smallest share that n good pictures support at this confidence: with the largest score as threshold."""
    fitted: float
    """Where a Gumbel tail puts the threshold for `alpha`, without confidence. Without promise it is the threshold."""
    review: float
    """From here to the threshold another set of n pictures might have put the limit: passed, but worth a look."""

    def __str__(self) -> str:
        wanted = f"at most {self.alpha:.3g} of good parts rejected, with confidence {self.confidence:.2g}"
        if self.kept:
            return f"{wanted}, from {self.n} good parts"
        more = f"{self.needed - self.n} more good pictures would support it; {self.n} support {self.supported:.2g}"
        return f"not supported: {wanted}: {more}"


def promise(scores: Sequence[float], alpha: float, confidence: float) -> Promise:
    """The lowest threshold that keeps the promise, from scores of good parts by networks not fitted to them.

    The r-th largest of n scores is exceeded by more than alpha of all good parts with probability
    P(Binomial(n, alpha) <= r - 1), whatever the distribution (Wilks 1941). Where even the largest does not suffice the
    threshold is the fitted tail's, a goal and not a promise, and `kept` says so.
    """
    ordered = sorted(scores, reverse=True)
    n = len(ordered)
    if n == 0 or not all(math.isfinite(score) for score in ordered):
        raise ValueError(f"{n} scores, all finite ones are needed")
    rank = 0
    while rank < n and binomial_cdf(rank, n, alpha) <= 1 - confidence:
        rank += 1
    fitted = gumbel_quantile(ordered, alpha)
    threshold = ordered[rank - 1] if rank else fitted
    needed = n if rank else math.ceil(math.log(1 - confidence) / math.log1p(-alpha))
    lower = next((r for r in range(n) if binomial_cdf(r, n, alpha) >= confidence), n - 1)
    supported = 1 - (1 - confidence) ** (1 / n)
    review = min(threshold, ordered[lower])
    return Promise(threshold, n, alpha, confidence, rank > 0, needed, supported, fitted, review)


def gumbel_quantile(scores: Sequence[float], alpha: float) -> float:
    """The value exceeded with probability alpha under a Gumbel distribution fitted by maximum likelihood.

    A part's score is the largest of many; such maxima tend to this form (Gumbel 1958).
    """
    x = np.asarray(scores, float)
    if np.ptp(x) == 0:
        return float(x[0])
    centred = x - x.mean()

    def slack(scale: float) -> float:
        weight = np.exp(-(centred - centred.min()) / scale)
        return float(scale + (centred * weight).sum() / weight.sum())

    low, high = 1e-3 * float(x.std()), 10 * float(x.std())  # the likelihood's only root lies within
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slack(middle) < 0 else (low, middle)
    least = float(centred.min())  # taken out, so that no exponential overflows
    location = float(x.mean()) + least - low * math.log(float(np.exp(-(centred - least) / low).mean()))
    return location - low * math.log(-math.log1p(-alpha))


def auroc(normal: ArrayLike, anomalous: ArrayLike) -> float:
    """Probability that an anomalous part scores higher than a normal one; ties count half (Mann and Whitney 1947)."""
    a, b = np.sort(np.asarray(normal, float)), np.asarray(anomalous, float)
    below = np.searchsorted(a, b, "left") + np.searchsorted(a, b, "right")
    return float(below.mean() / (2 * len(a)))
