"""What each term of feature-anogan is worth, by maps that no network made of parts it was fitted to, and by no label."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from edge_inspector import scoring
from edge_inspector.training.networks import feature_anogan as networks
from edge_inspector.training.networks.feature_material import COVERED, WITHHELD, Material, Store, parts

Weights = tuple[float, float, float]
"""Of TERMS."""
CANDIDATES: tuple[Weights, ...] = ((1.0, 0.5, 0.5), (1.0, 0.0, 0.5), (0.0, 1.0, 0.5))
"""Weights that are tried, the usual ones first: residuals and the discriminator, as AnoGAN has it. D was trained on drawn
defects, so they would always ask for more of it than real ones do: they choose between the residuals alone."""
_CLEARLY = 0.03
"""AUROC by which drawn defects must be told better without a residual for it to be left out: they are not real ones."""
_SHARED = 100
"""Good tiles that the spread of all places together counts for, beside a place's own."""


@dataclass(frozen=True)
class Normal:
    """What each term's smoothed map is over good tiles."""

    mean: Tensor
    """[T, h, w]"""
    spread: Tensor
    """[T, h, w]; where tiles are few it is nearly the same at every place."""

    @staticmethod
    def of(maps: Tensor, judged: Tensor) -> Normal:
        """By maps [N, T, h, w]; judged bool [N, h, w]."""
        mean = maps.mean(0)
        away = (maps - mean) ** 2
        shared = torch.stack([away[:, term][judged].mean() for term in range(maps.shape[1])])
        variance = (away.sum(0) + _SHARED * shared[:, None, None]) / (len(maps) + _SHARED)
        return Normal(mean, variance.sqrt())


@dataclass(frozen=True)
class Weighing:
    """Weights of the terms, and how well drawn defects of withheld families are told from good parts with them."""

    weights: Weights
    auroc: float
    tried: dict[Weights, float]

    @property
    def terms(self) -> tuple[str, ...]:
        """Those that are used."""
        return tuple(name for name, weight in zip(networks.TERMS, self.weights, strict=True) if weight)

    def of(self, normal: Normal) -> tuple[Tensor, Tensor]:
        """Mean and gain of the terms that are used, [terms, h, w], as the graph takes them."""
        used = [i for i, weight in enumerate(self.weights) if weight]
        weight = torch.tensor([self.weights[i] for i in used])
        return normal.mean[used], weight[:, None, None] / normal.spread[used]


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
    normal: Normal
    """By all folds, for the graph."""
    without: dict[int, Normal]
    """By all folds but one: a part's own map must not decide what is usual where it lies."""

    def scores(self, weights: Weights, *, spoiled: bool) -> NDArray[np.float64]:
        """Score of each good tile, or of each visibly spoiled one, as the graph computes it."""
        maps, counted = self.good, self.judged
        if spoiled:
            maps, counted = self.withheld[self.visible], self.judged.repeat_interleave(WITHHELD, 0)[self.visible]
        fused = (maps * torch.tensor(weights)[:, None, None]).sum(1, keepdim=True)
        return networks.finished(fused, counted[:, None], torch.ones(()))[0].double().numpy()


def cross_fit(material: Material, heads: dict[int, networks.Heads]) -> CrossFit:
    """Maps of every tile by the heads that did not see its fold."""
    good = torch.empty(len(material.good), len(networks.TERMS), *material.good.early.shape[2:])
    withheld = torch.empty(WITHHELD * len(good), *good.shape[1:])
    fold = torch.from_numpy(material.fold)
    drawn_fold = fold.repeat_interleave(WITHHELD)
    folds = sorted(set(material.fold.tolist()))
    for one in folds:
        held, drawn = (fold == one).nonzero()[:, 0], (drawn_fold == one).nonzero()[:, 0]
        good[held] = term_maps(heads[one], material.good, held)
        withheld[drawn] = term_maps(heads[one], material.withheld, drawn)
    normal = Normal.of(good, material.judged)
    without = {one: Normal.of(good[fold != one], material.judged[fold != one]) for one in folds}
    for one, usual in without.items():
        for maps, where in ((good, fold == one), (withheld, drawn_fold == one)):
            maps[where] = (maps[where] - usual.mean) / usual.spread
    visible = material.withheld.defective.flatten(1).amax(1) > COVERED
    return CrossFit(good, withheld, visible, material.judged, normal, without)


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


@torch.no_grad()
def term_maps(heads: networks.Heads, store: Store, tiles: Tensor) -> Tensor:
    """Every term's smoothed map of tiles: [n, T, h, w]."""
    return torch.cat([_maps(heads, heads.standardised(store.raw(part))) for part in parts(tiles)])


@torch.no_grad()
def score_of(heads: networks.Heads, mean: Tensor, gain: Tensor, features: Tensor, valid: Tensor) -> float:
    """The largest score of some tiles, by their raw features [n, DEPTH, h, w] and valid uint8 [n, H, W], with all TERMS.

    mean and gain: [T, h, w] of all TERMS, as `networks.fused` takes them.
    """
    fused = networks.fused(_maps(heads, heads.standardised(features)), mean, gain)
    return float(networks.finished(fused, networks.judged(valid), torch.ones(()))[0].max())


def _maps(heads: networks.Heads, f: Tensor) -> Tensor:
    coarse = heads.generator.coarse(functional.avg_pool2d(f, 2))
    return networks.smoothed(
        torch.cat([heads.term(name, f, coarse) for name in networks.TERMS], 1), networks.smoothing_kernel()
    )
