"""What good parts are, as plain statistics of features and maps. Training and teaching fit the same; numpy only.

Features f: float32 [N, C, h, w], standardised per channel; h and w multiples of BLOCK. Maps: float32 [N, T, h, w].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK = 2
"""Side of a neighbourhood of the Gaussian, in feature places: 16 px of the input."""
_RIDGE = 0.05
"""Added to covariances, so that directions good parts never vary in do not decide alone."""
_SHARED = 100
"""Good tiles that the spread of all places together counts for, beside a place's own."""
_SKETCH = 64
_NEIGHBOURS = 9
_CLOSEST = 1.0
"""Prototypes that lie closer together than this, whitened, count as this far apart."""

Floats = NDArray[np.float32]


def blocks(f: Floats) -> Floats:
    """[N, C, h, w] -> [h w / BLOCK^2, N BLOCK^2, C]: the places of each neighbourhood together."""
    n, depth, h, w = f.shape
    rows, columns = h // BLOCK, w // BLOCK
    split = f.reshape(n, depth, rows, BLOCK, columns, BLOCK).transpose(2, 4, 0, 3, 5, 1)
    together: Floats = split.reshape(rows * columns, n * BLOCK * BLOCK, depth)
    return together


def spread_out(x: Floats, h: int, w: int) -> Floats:
    """What `blocks` made of features of h x w places -> [N, C, h, w]."""
    rows, columns, depth = h // BLOCK, w // BLOCK, x.shape[2]
    split = x.reshape(rows, columns, -1, BLOCK, BLOCK, depth).transpose(2, 5, 0, 3, 1, 4)
    apart: Floats = split.reshape(-1, depth, h, w)
    return apart


def at_places(values: Floats, h: int, w: int) -> Floats:
    """Values of each neighbourhood [neighbourhoods, K] -> at each of its places [K, h, w]."""
    found: Floats = spread_out(np.repeat(values[:, None, :], BLOCK * BLOCK, 1), h, w)[0]
    return found


@dataclass
class Sums:
    """Of features at each place, and of their products in each neighbourhood."""

    count: int
    total: Floats
    """[C, h, w]"""
    products: Floats
    """[neighbourhoods, C, C]"""

    @staticmethod
    def of(parts: Iterable[Floats], shape: tuple[int, int, int]) -> Sums:
        """Over features in pieces that fit into memory; shape: (C, h, w)."""
        depth, h, w = shape
        sums = Sums(0, np.zeros(shape, np.float32), np.zeros((h * w // BLOCK**2, depth, depth), np.float32))
        for f in parts:
            sums.count += len(f)
            sums.total += f.sum(0)
            x = blocks(f)
            sums.products += x.transpose(0, 2, 1) @ x
        return sums

    def __add__(self, other: Sums) -> Sums:
        """Over both."""
        return Sums(self.count + other.count, self.total + other.total, self.products + other.products)

    def without(self, other: Sums) -> Sums:
        """What is left where the others are taken away: exactly what a fit without them would have summed."""
        return Sums(self.count - other.count, self.total - other.total, self.products - other.products)

    @property
    def mean(self) -> Floats:
        """Of each place, [C, h, w]."""
        found: Floats = self.total / np.float32(self.count)
        return found

    @property
    def covariance(self) -> Floats:
        """Of each neighbourhood, [neighbourhoods, C, C]; without the ridge."""
        centre = blocks(self.mean[None])
        found: Floats = (self.products / self.count - centre.transpose(0, 2, 1) @ centre) / BLOCK**2
        return found


def ridged(covariance: NDArray[np.floating]) -> NDArray[np.float64]:
    """Covariances [..., C, C] that can be inverted."""
    regular: NDArray[np.float64] = covariance.astype(np.float64) + _RIDGE * np.eye(covariance.shape[-1])
    return regular


def whitening(covariance: NDArray[np.floating]) -> Floats:
    """W with W W^T = (covariance + ridge I)^-1, for each of many covariances [..., C, C]."""
    inverse = np.linalg.inv(np.linalg.cholesky(ridged(covariance)))
    found: Floats = np.ascontiguousarray(np.swapaxes(inverse, -1, -2), np.float32)
    return found


def centres(rows: Floats, count: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Greedy k-centre choice among rows [n, C], by distances in a random projection (Roth et al. 2022, section 3.2)."""
    sketch = rows @ (rng.standard_normal((rows.shape[1], _SKETCH), np.float32) / np.float32(_SKETCH**0.5))
    squared, distance = (sketch**2).sum(1), np.full(len(rows), np.inf, np.float32)
    chosen = [int(rng.integers(len(rows)))]
    for _ in range(min(count, len(rows)) - 1):
        last = sketch[chosen[-1]]
        np.minimum(distance, squared - 2 * (sketch @ last) + last @ last, out=distance)
        chosen.append(int(distance.argmax()))
    return np.array(chosen)


@dataclass(frozen=True)
class Prototypes:
    """Rows of features that stand for all, where every direction of the good parts' spread counts the same."""

    whitening: Floats
    """[C, C]"""
    mean: Floats
    """[C]"""
    whitened: Floats
    """[K, C]"""
    spacing: Floats
    """[K], how far apart they lie around each: what is far where good parts crowd is near where they are few."""

    @staticmethod
    def of(rows: Floats, count: int, rng: np.random.Generator) -> Prototypes:
        """At most `count` of rows [n, C]."""
        mean = rows.mean(0)
        away = rows - mean
        white = whitening(away.T @ away / len(rows))
        whitened = away @ white
        taken = whitened[centres(whitened, count, rng)]
        squares = (taken**2).sum(1)
        apart = np.sqrt(np.maximum(squares[:, None] + squares - 2 * taken @ taken.T, 0))
        nearest = np.sort(apart, 1)[:, 1 : 1 + _NEIGHBOURS]
        spacing = nearest.mean(1) if len(taken) > 1 else np.ones(1, np.float32)
        return Prototypes(white, mean, taken, np.maximum(spacing, np.float32(_CLOSEST)))

    def convolutions(self) -> dict[str, Floats]:
        """Two 1x1 convolutions: `whitening`, `shift` give y of features; `kernel`, `level` give, of y and the sum of its
        squares, the squared distance to each prototype in units of its spacing.
        """
        gain = self.spacing[:, None] ** -2
        kernel = np.concatenate([-2 * self.whitened * gain, gain], 1)
        return {
            "whitening": self.whitening.T[:, :, None, None], "shift": -self.mean @ self.whitening,
            "kernel": kernel[:, :, None, None], "level": (self.whitened**2).sum(1) * gain[:, 0],
        }  # fmt: skip


@dataclass(frozen=True)
class Usual:
    """What each term's smoothed map is over good tiles."""

    mean: Floats
    """[T, h, w]"""
    spread: Floats
    """[T, h, w]; where tiles are few it is nearly the same at every place."""

    @staticmethod
    def of(maps: Floats, judged: NDArray[np.bool_]) -> Usual:
        """By maps [N, T, h, w]; judged [N, h, w]."""
        mean = maps.mean(0)
        away = (maps - mean) ** 2
        shared = np.array([away[:, term][judged].mean() for term in range(maps.shape[1])], np.float32)
        variance = (away.sum(0) + _SHARED * shared[:, None, None]) / (len(maps) + _SHARED)
        return Usual(mean, np.sqrt(variance))
