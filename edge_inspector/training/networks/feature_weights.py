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


@dataclass(frozen=True)
class Weighing:
    """Weights of the terms, and how well drawn defects of withheld families are told from good parts with them."""

    weights: dict[str, tuple[float, float]]
    """For each term that is used: its mean over good parts, and its weight divided by its spread there."""
    auroc: float
    tried: dict[str, float]


Weights = tuple[float, float, float]
CANDIDATES: tuple[Weights, ...] = ((1.0, 1.0, 0.5), (1.0, 0.0, 0.5), (0.0, 1.0, 0.5))
"""Weights of TERMS that are tried, the usual ones first: residuals and the discriminator, as AnoGAN has it. D was trained on
drawn defects, so they would always ask for more of it than real ones do: they choose between the residuals alone."""
_CLEARLY = 0.03
"""AUROC by which drawn defects must be told better without a residual for it to be left out: they are not real ones."""


@dataclass(frozen=True)
class CrossFit:
    """Every term's map of every tile, by heads that were fitted to other folds."""

    good: Tensor
    """[N, T, h, w]"""
    withheld: Tensor
    """[M, T, h, w] of good tiles with drawn defects, WITHHELD of each."""
    visible: Tensor
    """Bool [M]: the defect covers enough of a place to be called one."""
    judged: Tensor
    """Bool [N, h, w] of good tiles."""

    def normalised(self, candidate: tuple[float, ...]) -> dict[str, tuple[float, float]]:
        """The graph's weights for weights of TERMS: for each that is used, its mean over good parts, and w / spread."""
        columns = [self.good[:, i][self.judged] for i in range(len(networks.TERMS))]
        return {
            name: (column.mean().item(), w / column.std().item())
            for name, column, w in zip(networks.TERMS, columns, candidate, strict=True) if w
        }  # fmt: skip

    def scores(self, weights: dict[str, tuple[float, float]], *, spoiled: bool) -> NDArray[np.float64]:
        """Score of each good tile, or of each visibly spoiled one, as the graph computes it."""
        maps, counted = self.good, self.judged
        if spoiled:
            maps, counted = self.withheld[self.visible], self.judged.repeat_interleave(WITHHELD, 0)[self.visible]
        fused = networks.fused(maps, weights)
        found = networks.finished(fused, counted[:, None], networks.smoothing_kernel(), torch.ones(()))[0]
        return found.double().numpy()


def cross_fit(material: Material, heads: dict[int, networks.Heads]) -> CrossFit:
    """Maps of every tile by the heads that did not see its fold."""
    good = torch.empty(len(material.good), len(networks.TERMS), *material.good.early.shape[2:])
    withheld = torch.empty(WITHHELD * len(good), *good.shape[1:])
    for fold in set(material.fold.tolist()):
        held = torch.from_numpy(np.flatnonzero(material.fold == fold))
        drawn = (WITHHELD * held[:, None] + torch.arange(WITHHELD)).flatten()
        good[held], withheld[drawn] = (
            term_maps(heads[fold], material.good, held),
            term_maps(heads[fold], material.withheld, drawn),
        )
    visible = material.withheld.defective.flatten(1).amax(1) > COVERED
    return CrossFit(good, withheld, visible, material.judged)


def preferred(found: dict[Weights, float]) -> Weights:
    """The usual weights, unless others told drawn defects clearly better: by AUROC of each of CANDIDATES."""
    best = max(CANDIDATES, key=found.__getitem__)
    return best if found[best] > found[CANDIDATES[0]] + _CLEARLY else CANDIDATES[0]


def weighed(crossed: CrossFit) -> Weighing:
    """Weights by cross-fitted maps alone: the usual ones, unless others tell drawn defects clearly better from good parts."""
    found = {}
    for candidate in CANDIDATES:
        weights = crossed.normalised(candidate)
        found[candidate] = scoring.auroc(crossed.scores(weights, spoiled=False), crossed.scores(weights, spoiled=True))
    chosen = preferred(found)
    named = {" + ".join(f"{w:g} {n}" for w, n in zip(c, networks.TERMS, strict=True) if w): v for c, v in found.items()}
    return Weighing(crossed.normalised(chosen), found[chosen], named)


@torch.no_grad()
def term_maps(heads: networks.Heads, store: Store, tiles: Tensor) -> Tensor:
    """Every term's map of tiles: [n, T, h, w]."""
    return torch.cat([_maps(heads, heads.standardised(store.raw(part))) for part in parts(tiles)])


@torch.no_grad()
def score_of(
    heads: networks.Heads, weights: dict[str, tuple[float, float]], early: Tensor, late: Tensor, valid: Tensor
) -> float:
    """The largest score of some tiles, by their backbone outputs and valid uint8 [n, H, W], as the graph computes it."""
    fused = networks.fused(_maps(heads, heads.standardised(networks.patches(early, late))), weights)
    found = networks.finished(fused, networks.judged(valid), networks.smoothing_kernel(), torch.ones(()))[0]
    return float(found.max())


def _maps(heads: networks.Heads, f: Tensor) -> Tensor:
    coarse = heads.generator.coarse(functional.avg_pool2d(f, 2))
    return torch.cat([heads.term(name, f, coarse) for name in networks.TERMS], 1)
