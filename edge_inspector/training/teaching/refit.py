"""New good parts: what good parts are, fitted anew to old and new ones together; each is judged without its own fold.

Generator and discriminator stay as they were trained. What they said of old parts was said without their fold, and the new
parts they never saw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
from numpy.typing import NDArray

from edge_inspector.training.normals import Floats, Prototypes, Sums, Usual, whitening
from edge_inspector.training.teaching.defects import sums_of
from edge_inspector.training.teaching.material import Material, Tiles
from edge_inspector.training.teaching.network import Network, Residuals

_CORESET_ROWS = 20_000
_FITTED = ("gaussian", "bank")


@dataclass(frozen=True)
class Weighed:
    """Weighted sums of maps, [n, h, w], each by what is usual outside its fold; and what is usual for all."""

    good: Floats
    drawn: Floats
    taught: Floats
    usual: Usual


def weighed(material: Material) -> Weighed:
    """What the network's terms say together of each tile. A part's own map must not decide what is usual where it lies."""
    good, weights = material.good, np.array(material.about.weights, np.float32)[:, None, None]
    usual = Usual.of(good.maps, good.judged)

    def sum_of(tiles: Tiles, by: Usual) -> Floats:
        found: Floats = ((tiles.maps - by.mean) / by.spread * weights).sum(1)
        return found

    sums = sum_of(good, usual), sum_of(material.drawn, usual)
    for fold in sorted(set(good.fold.tolist())):
        others = good.fold != fold
        without = Usual.of(good.maps[others], good.judged[others])
        for tiles, out in zip((good, material.drawn), sums, strict=True):
            rows = np.flatnonzero(tiles.fold == fold)
            if len(rows):
                out[rows] = sum_of(tiles.some(rows), without)
    return Weighed(*sums, sum_of(material.taught, usual), usual)


def refitted(network: Network, material: Material, tick: Callable[[int, int], None]) -> tuple[Network, Material]:
    """Fit to all good tiles of `material`; its good and drawn maps are replaced, but for what a discriminator said."""
    own = sums_of(network, material.good)
    every, held = reduce(add, own.values()), network.residuals
    maps = {"good": material.good.maps.copy(), "drawn": material.drawn.maps.copy()}
    rows_all, of_fold = _sampled(network, material.good)
    columns = [number for number, term in enumerate(material.about.terms) if term in _FITTED]
    for done, (fold, sums) in enumerate(own.items(), 1):
        without = network.with_residuals(_fitted(held, every.without(sums), rows_all[of_fold != fold]))
        for name, out in maps.items():
            tiles: Tiles = getattr(material, name)
            rows = np.flatnonzero(tiles.fold == fold)
            for part, found in without.of_stored([tap[rows] for tap in tiles.taps], "maps"):
                out[rows[part][:, None], columns] = found[:, columns]
        tick(done, len(own))
    changed = network.with_residuals(_fitted(held, every, rows_all))
    taught = material.taught.maps.copy()
    for part, found in changed.of_stored(material.taught.taps, "maps"):
        taught[part] = found
    return changed, Material(
        material.about, material.good.with_maps(maps["good"]), material.drawn.with_maps(maps["drawn"]),
        material.taught.with_maps(taught),
    )  # fmt: skip


def _fitted(held: Residuals, sums: Sums, rows: Floats) -> Residuals:
    """What a network holds, of other good parts."""
    gaussian, bank = held.mean is not None, held.bank
    if bank is not None:
        bank = Prototypes.of(rows, len(bank["level"]), np.random.default_rng(0)).convolutions()
    return Residuals(sums.mean if gaussian else None, whitening(sums.covariance) if gaussian else None, bank)


def _sampled(network: Network, good: Tiles) -> tuple[Floats, NDArray[np.intp]]:
    """Rows of features at judged places, evenly, [rows, C], and the fold of each."""
    rng = np.random.default_rng(1)
    share = _CORESET_ROWS / max(1, good.judged.sum())
    rows, folds = [], []
    for part, f in network.of_stored(good.taps, "features"):
        taken = good.judged[part] & (rng.random(good.judged[part].shape) < share)
        rows.append(f.transpose(0, 2, 3, 1)[taken])
        folds.append(np.repeat(good.fold[part], taken.sum((1, 2))))
    return np.concatenate(rows), np.concatenate(folds)
