"""A taught term: one direction among the features in which shown defects lie, where good parts do not.

Fisher's direction, S^-1 (defect - good) (1936), with the good parts' mean at each place and their
covariance in each neighbourhood, halfway to that of all. What a place scores along it is the matched
filter of adaptive radar (Robey et al. 1992). All is closed form, so leaving one picture out costs next
to nothing, and only what that shows is trusted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_inspector.scoring import Promise
from edge_inspector.training.normals import Floats, Sums, at_places, blocks, ridged, spread_out
from edge_inspector.training.teaching.material import Tiles
from edge_inspector.training.teaching.network import Network, Term

WEIGHTS = (0.3, 0.6, 1.0, 1.5)
"""Of the taught term beside the others, each in spreads of good parts."""
_SHRINK, _PLACES, _ROUNDS = 0.5, 5, 2
"""How far covariances are drawn to their mean; places of each defect that count; how often these are chosen anew."""
_SLACK = 0.01
"""Share of drawn defects that teaching may lose."""
_MOST_LEFT_OUT = 20
Limit = Callable[[NDArray[np.float64]], Promise]
"""Scores of the good pictures -> what threshold keeps its word."""


@dataclass(frozen=True)
class _Local:
    """What good parts are at each place, all of them or those outside a fold."""

    mean: Floats
    """[C, h, w]"""
    inverse: Floats
    """[neighbourhoods, C, C]"""

    @staticmethod
    def of(sums: Sums) -> _Local:
        covariance = sums.covariance
        shrunk = (1 - _SHRINK) * covariance.mean(0) + _SHRINK * covariance
        return _Local(sums.mean, np.linalg.inv(ridged(shrunk)).astype(np.float32))

    def filtered(self, f: Floats) -> Floats:
        """S^-1 (f - mean) at each place, [n, C, h, w]."""
        h, w = f.shape[2:]
        return spread_out(blocks(f - self.mean) @ self.inverse, h, w)

    def length(self, directions: Floats) -> Floats:
        """sqrt(d S^-1 d) of directions [K, C] at each place, [K, h, w]."""
        h, w = self.mean.shape[1:]
        squared = ((directions @ self.inverse) * directions).sum(2)
        return np.sqrt(at_places(squared, h, w))


@dataclass(frozen=True)
class Choice:
    """What teaching with one weight would do."""

    weight: float
    threshold: float
    good: NDArray[np.float64]
    """Scores of good pictures."""
    drawn: NDArray[np.float64]
    """Scores of drawn defects."""
    taught: NDArray[np.float64]
    """Scores of shown pictures."""
    found: NDArray[np.bool_]
    """[shown pictures], each found by a lesson that leaves it out; by one with it where it is alone."""

    @property
    def share(self) -> float:
        """Of drawn defects, found."""
        return float((self.drawn > self.threshold).mean()) if len(self.drawn) else 0.0


@dataclass(frozen=True)
class Taught:
    """What was learned of shown defects."""

    without: Choice
    choices: tuple[Choice, ...]
    chosen: Choice
    """`without`, where nothing may be learned."""
    term: Term | None


def sums_of(network: Network, good: Tiles) -> dict[int, Sums]:
    """Sums over features of each fold's tiles."""
    depth = network.depth
    shape = depth, *good.judged.shape[1:]
    found = {}
    for fold in sorted(set(good.fold.tolist())):
        rows = np.flatnonzero(good.fold == fold)
        parts = (f for _, f in network.of_stored([tap[rows] for tap in good.taps], "features"))
        found[fold] = Sums.of(parts, shape)
    return found


class Lesson:
    """Good, drawn and shown pictures, seen by one network; `base`: the weighted sum of its terms, [n, h, w] of each group."""

    def __init__(
        self, network: Network, groups: tuple[Tiles, Tiles, Tiles], base: tuple[Floats, Floats, Floats],
        marked: NDArray[np.bool_], limit: Limit, tick: Callable[[int, int], None],
    ) -> None:  # fmt: skip
        self._network, self._groups, self._base = network, groups, base
        self._marked, self._limit, self._tick, self._unit = marked, limit, tick, network.unit

    def nothing(self) -> Taught:
        """Where no defect is shown."""
        maps = [np.zeros((1, *base.shape), np.float32) for base in self._base]
        without = self._choice(0.0, maps, np.zeros(0, np.intp))
        return Taught(without, (), without, None)

    def learned(self) -> Taught:
        """Learn, and choose how much of it counts: by pictures left out, and by drawn defects, which must not be lost."""
        good, drawn, taught = self._groups
        everything, folds = self._locals()
        features = np.concatenate([f for _, f in self._network.of_stored(taught.taps, "features")])
        groups = self._left_out(taught.pictures)
        directions, seen = self._directions(everything, features, groups)
        length = everything.length(directions)
        maps = [self._along(tiles, folds, directions, length) for tiles in (good, drawn)]
        maps.append(self._blurred(np.einsum("kc,nchw->knhw", directions, seen, optimize=True) / length[:, None]))
        judged = good.judged
        level = np.array([along[judged].mean() for along in maps[0]], np.float32)[:, None, None, None]
        spread = np.array([along[judged].std() for along in maps[0]], np.float32)[:, None, None, None]
        maps = [(along - level) / spread for along in maps]
        without = self._choice(0.0, maps, groups)
        choices = tuple(self._choice(weight, maps, groups) for weight in WEIGHTS)
        chosen = _preferred(without, choices, taught.pictures)
        term = None
        if chosen.weight:
            gain = np.float32(chosen.weight) / spread[0, 0, 0, 0]
            weight = at_places(directions[0] @ everything.inverse, *judged.shape[1:]) / length[0] * gain
            weight = weight.astype(np.float16).astype(np.float32)  # as the graph holds it
            term = Term(weight, -(weight * everything.mean).sum(0), float(-gain * level[0, 0, 0, 0]))
        return Taught(without, choices, chosen, term)

    def _locals(self) -> tuple[_Local, dict[int, _Local]]:
        """Of all good parts, and of those outside each fold."""
        good = self._groups[0]
        own = sums_of(self._network, good)
        every = reduce(add, own.values())
        return _Local.of(every), {fold: _Local.of(every.without(sums)) for fold, sums in own.items()}

    @staticmethod
    def _left_out(pictures: int) -> NDArray[np.intp]:
        """Of each picture, the number of the direction that leaves it out: its own, or one that it shares with others."""
        return 1 + np.arange(pictures) % min(pictures, _MOST_LEFT_OUT)

    def _directions(self, everything: _Local, features: Floats, groups: NDArray[np.intp]) -> tuple[Floats, Floats]:
        """That of all pictures, then those that leave some out, [K, C]; and the filtered features of the tiles.

        Which places of a picture are the defect is not known. First they are those where the network
        sees most; then those where what the other pictures have in common shows, too.
        """
        taught, base = self._groups[2], self._base[2]
        seen = everything.filtered(features)
        away = features - everything.mean
        places = [self._oddest(base, picture) for picture in range(taught.pictures)]
        for _ in range(_ROUNDS if taught.pictures > 1 else 0):
            directions = self._means(away, places, groups)
            length = everything.length(directions)
            along = self._blurred(np.einsum("kc,nchw->knhw", directions, seen, optimize=True) / length[:, None])
            places = [self._oddest(base + along[groups[picture]].clip(min=0), picture) for picture in range(taught.pictures)]
        return self._means(away, places, groups), seen

    def _means(self, away: Floats, places: list[tuple[NDArray[np.intp], ...]], groups: NDArray[np.intp]) -> Floats:
        each = np.stack([away[tile, :, y, x].mean(0) for tile, y, x in places])
        out = [each.mean(0)]
        for number in range(1, int(groups.max()) + 1):
            others = each[groups != number]
            out.append(others.mean(0) if len(others) else each.mean(0))
        return np.stack(out).astype(np.float32)

    def _oddest(self, maps: Floats, picture: int) -> tuple[NDArray[np.intp], ...]:
        """Tile, row and column of the places where a picture's map is highest, within its mask."""
        tiles = np.flatnonzero(self._groups[2].picture == picture)
        level = np.where(self._marked[tiles], maps[tiles], -np.inf)
        best = np.argsort(level, axis=None)[: -_PLACES - 1 : -1]
        best = best[np.isfinite(level.flat[best])]
        tile, y, x = np.unravel_index(best, level.shape)
        return tiles[tile], y, x

    def _along(self, tiles: Tiles, folds: dict[int, _Local], directions: Floats, length: Floats) -> Floats:
        """What tiles show along directions by good parts outside their fold, blurred: [K, n, h, w]."""
        found = np.empty((len(directions), len(tiles), *tiles.judged.shape[1:]), np.float32)
        for done, (fold, local) in enumerate(folds.items(), 1):
            rows = np.flatnonzero(tiles.fold == fold)
            for part, f in self._network.of_stored([tap[rows] for tap in tiles.taps], "features"):
                filtered = np.einsum("kc,nchw->knhw", directions, local.filtered(f), optimize=True)
                found[:, rows[part]] = self._blurred(filtered / length[:, None])
            self._tick(done, len(folds))
        return found

    def _blurred(self, maps: Floats) -> Floats:
        """As the graph blurs its maps, [K, n, h, w]."""
        kernel = self._network.kernel
        flat = maps.reshape(-1, *maps.shape[2:])
        done = [cv2.filter2D(each, -1, kernel, borderType=cv2.BORDER_CONSTANT) for each in flat]
        return np.stack(done).reshape(maps.shape).astype(np.float32)

    def _choice(self, weight: float, maps: list[Floats], groups: NDArray[np.intp]) -> Choice:
        """Scores with a weight, in the network's units, and what they find at the threshold that keeps the wish."""
        scores = []
        for tiles, base, along in zip(self._groups, self._base, maps, strict=True):
            each = [tiles.scores(base + np.float32(weight) * one.clip(min=0)) for one in along]
            scores.append(np.stack(each) / self._unit)
        good, drawn, taught = scores
        limits = np.array([self._limit(one).threshold for one in good])
        own = taught[groups, np.arange(len(groups))]
        return Choice(weight, float(limits[0]), good[0], drawn[0], taught[0], own > limits[groups])


def _preferred(without: Choice, choices: tuple[Choice, ...], pictures: int) -> Choice:
    """The weight that finds most of the pictures left out, then most drawn defects, if it loses neither.

    Where no picture is gained nothing was learned of them, whatever becomes of drawn defects.

    One picture alone cannot be left out: the smallest weight, if it is found only then, and drawn defects do not suffer.
    """
    if pictures == 1:
        smallest = choices[0]
        gains = smallest.found.all() and not without.found.all()
        return smallest if gains and smallest.share >= without.share else without
    sound = [one for one in choices if one.share >= without.share - _SLACK and one.found.sum() >= without.found.sum()]
    best = max(sound, key=lambda one: (one.found.sum(), one.share, -one.weight), default=without)
    return best if best.found.sum() > without.found.sum() else without
