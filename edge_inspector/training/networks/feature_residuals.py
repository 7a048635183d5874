"""The residuals of feature-anogan: Gaussians and banks of good parts, of all of them or without one fold."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from edge_inspector.training import normals
from edge_inspector.training.networks import feature_anogan as networks
from edge_inspector.training.networks.feature_material import Material, Store, parts
from edge_inspector.training.run import Run

_CORESET_ROWS, _TILES = 20_000, 128


def rows_of(f: Tensor) -> Tensor:
    """[N, C, h, w] -> [N h w, C]."""
    return f.permute(0, 2, 3, 1).reshape(-1, f.shape[1])


def moments(material: Material, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread [C] of each channel over judged places, of some of the tiles, taken evenly."""
    total, squares, count = torch.zeros(material.good.depth), torch.zeros(material.good.depth), 0
    for part in parts(tiles[:: max(1, len(tiles) // _TILES)]):
        rows = rows_of(material.good.raw(part))[material.judged[part].flatten()]
        total, squares, count = total + rows.sum(0), squares + (rows**2).sum(0), count + len(rows)
    mean = total / count
    return mean, (squares / count - mean**2).clamp(min=0).sqrt() + 1e-6


def sampled(material: Material, store: Store, tiles: Tensor, most: float, seen: Callable[[Tensor], Tensor]) -> Tensor:
    """About `most` rows of seen(raw features) at judged places, evenly over at most _TILES of the tiles: [rows, columns]."""
    some = tiles[torch.randperm(len(tiles))[:_TILES]]
    share = most / max(1, int(material.judged[some].sum()))
    out = []
    for part in parts(some):
        judged = material.judged[part]
        kept = (judged & (torch.rand(judged.shape) < share)).flatten()
        out.append(seen(store.raw(part))[kept])
    return torch.cat(out)


class Residuals:
    """What is summed once for all tiles; a fold's own share is taken away again, instead of fitting anew."""

    def __init__(self, material: Material, prototypes: int, run: Run) -> None:
        self._material, self._prototypes, self._run = material, prototypes, run
        every = torch.arange(len(material.good))
        self._origin, self._unit = moments(material, every)
        """Products are summed of features about this origin and in this unit, or rounding would eat them."""
        self._sums = self._summed(every)

    def _summed(self, tiles: Tensor) -> normals.Sums:
        h, w = self._material.judged.shape[1:]
        standardised = (
            networks.scaled(self._material.good.raw(part), self._origin, self._unit).numpy() for part in parts(tiles)
        )
        return normals.Sums.of(standardised, (self._material.good.depth, h, w))

    def gaussian(self, without: Sequence[int], mean: Tensor, spread: Tensor) -> networks.LocalGaussian:
        """Of the tiles outside some folds; for features standardised by this mean and spread [C]."""
        own = torch.from_numpy(np.isin(self._material.fold, without).nonzero()[0])
        sums = self._sums.without(self._summed(own)) if len(own) else self._sums
        gain = (self._unit / spread).numpy()
        shift = ((self._origin - mean) / spread).numpy()
        average = sums.mean
        h, w = average.shape[1:]
        whitening = normals.whitening(sums.covariance * gain[:, None] * gain)
        return networks.LocalGaussian(
            torch.from_numpy(average * gain[:, None, None] + shift[:, None, None]),
            torch.from_numpy(whitening).reshape(h // normals.BLOCK, w // normals.BLOCK, *whitening.shape[1:]),
        )

    def bank(self, without: Sequence[int], mean: Tensor, spread: Tensor) -> networks.Bank:
        """The same for prototypes."""
        torch.manual_seed(int(torch.randint(2**53, (1,), generator=self._run.seeded(*without, 2))))
        others = torch.from_numpy((~np.isin(self._material.fold, without)).nonzero()[0])
        rows = sampled(
            self._material, self._material.good, others, _CORESET_ROWS,
            lambda raw: rows_of(networks.scaled(raw, mean, spread)),
        )  # fmt: skip
        prototypes = normals.Prototypes.of(rows.numpy(), self._prototypes, self._run.rng(*without, 1))
        return networks.Bank(prototypes.convolutions())
