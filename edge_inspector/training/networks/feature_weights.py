"""What each term of feature-anogan is worth, by maps that no network made of parts it was fitted to, and by no label."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from edge_inspector import pictures, scoring
from edge_inspector.training.data import MIN_PICTURES, Pictures
from edge_inspector.training.networks import feature_anogan as networks
from edge_inspector.training.networks.feature_material import COVERED, WITHHELD, Material, Store, parts
from edge_inspector.training.normals import Floats, Usual
from edge_inspector.training.teaching import material as teaching

Weights = tuple[float, float, float]
"""Of TERMS."""
CANDIDATES: tuple[Weights, ...] = ((0.5, 1.0, 0.5), (1.0, 0.0, 0.5), (0.0, 1.0, 0.5))
"""Weights that are tried, the usual ones first: residuals and the discriminator, as AnoGAN has it. D was trained on drawn
defects, so they would always ask for more of it than real ones do: they choose between the residuals alone."""
_CLEARLY = 0.03
"""AUROC by which drawn defects must be told better without a residual for it to be left out: they are not real ones."""


def tensors(usual: Usual) -> tuple[Tensor, Tensor]:
    """Its mean and spread, [T, h, w]."""
    return torch.from_numpy(usual.mean), torch.from_numpy(usual.spread)


@dataclass(frozen=True)
class Weighing:
    """Weights of the terms, and how well drawn defects of withheld families are told from good parts with them."""

    weights: Weights
    auroc: float
    tried: dict[Weights, float]

    @property
    def terms(self) -> tuple[str, ...]:
        """Those that are used."""
        return tuple(networks.TERMS[i] for i in self.used)

    @property
    def used(self) -> list[int]:
        """Which of TERMS these are."""
        return [i for i, weight in enumerate(self.weights) if weight]

    def of(self, usual: Usual) -> tuple[Tensor, Tensor]:
        """Mean and gain of the terms that are used, [terms, h, w], as the graph takes them."""
        mean, spread = tensors(usual)
        weight = torch.tensor([self.weights[i] for i in self.used])
        return mean[self.used], weight[:, None, None] / spread[self.used]


@dataclass(frozen=True)
class CrossFit:
    """Every term's map of every tile, by heads that were fitted to other folds, as multiples of what other folds show."""

    good: Tensor
    """[N, T, h, w]"""
    withheld: Tensor
    """[M, T, h, w] of good tiles with drawn defects, WITHHELD of each."""
    visible: Tensor
    """Bool [M]: the defect covers enough of a place to be called one."""
    judged: Tensor
    """Bool [N, h, w] of good tiles."""
    usual: Usual
    """By all folds, for the graph."""
    without: dict[int, Usual]
    """By all folds but one: a part's own map must not decide what is usual where it lies."""

    def raw(self, maps: Tensor, fold: NDArray[np.intp], used: list[int]) -> Floats:
        """Some of its maps [n, T, h, w] as the terms gave them, by the fold of each, of the terms that are used."""
        out = maps.numpy()[:, used]
        for one, usual in self.without.items():
            rows = fold == one
            out[rows] = out[rows] * usual.spread[used] + usual.mean[used]
        return out

    def scores(self, weights: Weights, *, spoiled: bool) -> NDArray[np.float64]:
        """Score of each good tile, or of each visibly spoiled one, as the graph computes it."""
        maps, counted = self.good, self.judged
        if spoiled:
            maps, counted = self.withheld[self.visible], self.judged.repeat_interleave(WITHHELD, 0)[self.visible]
        fused = (maps * torch.tensor(weights)[:, None, None]).sum(1, keepdim=True)
        return networks.finished(fused, counted[:, None], torch.ones(()))[0].double().numpy()


def cross_fit(material: Material, heads: dict[int, networks.Heads]) -> CrossFit:
    """Maps of every tile by the heads that did not see its fold."""
    good = torch.empty(len(material.good), len(networks.TERMS), *material.judged.shape[1:])
    withheld = torch.empty(WITHHELD * len(good), *good.shape[1:])
    fold = torch.from_numpy(material.fold)
    drawn_fold = fold.repeat_interleave(WITHHELD)
    folds = sorted(set(material.fold.tolist()))
    for one in folds:
        held, drawn = (fold == one).nonzero()[:, 0], (drawn_fold == one).nonzero()[:, 0]
        good[held] = term_maps(heads[one], material.good, held)
        withheld[drawn] = term_maps(heads[one], material.withheld, drawn)
    judged, every, others = material.judged.numpy(), good.numpy(), fold.numpy()
    usual = Usual.of(every, judged)
    without = {one: Usual.of(every[others != one], judged[others != one]) for one in folds}
    for one, found in without.items():
        mean, spread = tensors(found)
        for maps, where in ((good, fold == one), (withheld, drawn_fold == one)):
            maps[where] = (maps[where] - mean) / spread
    visible = material.withheld.defective.flatten(1).amax(1) > COVERED
    return CrossFit(good, withheld, visible, material.judged, usual, without)


def preferred(found: dict[Weights, float]) -> Weights:
    """The usual weights, unless others told drawn defects clearly better: by AUROC of each of CANDIDATES."""
    best = max(CANDIDATES, key=found.__getitem__)
    return best if found[best] > found[CANDIDATES[0]] + _CLEARLY else CANDIDATES[0]


def weighed(crossed: CrossFit) -> Weighing:
    """Weights by cross-fitted maps alone: the usual ones, unless others tell drawn defects clearly better from good parts."""
    found = {
        candidate: scoring.auroc(crossed.scores(candidate, spoiled=False), crossed.scores(candidate, spoiled=True))
        for candidate in CANDIDATES
    }
    chosen = preferred(found)
    return Weighing(chosen, found[chosen], found)


def to_teach_from(
    material: Material, crossed: CrossFit, weighing: Weighing, surveyed: Pictures, folds: int
) -> teaching.Material | None:
    """What the bundle can be taught from: of pictures that are whole here, and defects drawn into them; None: of too few."""
    if material.whole.sum() < MIN_PICTURES:
        return None
    whole = material.whole[material.picture]
    number = np.cumsum(material.whole) - 1
    spoiled = np.repeat(whole, WITHHELD) & crossed.visible.numpy()

    def tiles(store: Store, rows: NDArray[np.bool_], maps: Tensor, origin: NDArray[np.intp]) -> teaching.Tiles:
        fold = material.fold[origin]
        picture = number[material.picture[origin]] if store is material.good else np.arange(len(origin))
        taps = tuple(tap.numpy()[rows] for tap in store.taps)
        seen = crossed.raw(maps, fold, weighing.used)
        return teaching.Tiles(taps, seen, material.judged.numpy()[origin], fold, picture)

    rows = np.arange(len(whole))
    good = tiles(material.good, whole, crossed.good[whole], rows[whole])
    drawn = tiles(material.withheld, spoiled, crossed.withheld[spoiled], np.repeat(rows, WITHHELD)[spoiled])
    paths = [path for path, kept in zip(surveyed.paths, material.whole, strict=True) if kept]
    names = pictures.part_names(paths, Path(os.path.commonpath([path.parent for path in paths])))
    weights = tuple(weighing.weights[term] for term in weighing.used)
    about = teaching.About(terms=weighing.terms, weights=weights, folds=folds, good=names)
    return teaching.Material(about, good, drawn, good.none()).bounded()


@torch.no_grad()
def term_maps(heads: networks.Heads, store: Store, tiles: Tensor) -> Tensor:
    """Every term's smoothed map of tiles: [n, T, h, w]."""
    return torch.cat([_maps(heads, heads.standardised(store.raw(part))) for part in parts(tiles)])


@torch.no_grad()
def score_of(heads: networks.Heads, mean: Tensor, gain: Tensor, features: Tensor, counted: Tensor) -> float:
    """The largest score of some tiles, by their raw features [n, C, h, w], where `networks.judged` counts, with all TERMS.

    mean and gain: [T, h, w] of all TERMS, as `networks.fused` takes them.
    """
    fused = networks.fused(_maps(heads, heads.standardised(features)), mean, gain)
    return float(networks.finished(fused, counted, torch.ones(()))[0].max())


def _maps(heads: networks.Heads, f: Tensor) -> Tensor:
    coarse = heads.generator.coarse(functional.avg_pool2d(f, 2))
    return networks.smoothed(
        torch.cat([heads.term(name, f, coarse) for name in networks.TERMS], 1), networks.smoothing_kernel()
    )
