"""The residuals of feature-anogan: Gaussians and banks of good parts, of all of them or without one fold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from edge_inspector.training.networks import feature_anogan as networks
from edge_inspector.training.networks.feature_material import Material, Store, parts
from edge_inspector.training.run import Run

_RIDGE = 0.05
"""Added to covariances of standardised features, so that directions good parts never vary in do not decide alone."""
_CORESET_ROWS, _SKETCH, _TILES = 20_000, 64, 128


def rows_of(f: Tensor) -> Tensor:
    """[N, C, h, w] -> [N h w, C]."""
    return f.permute(0, 2, 3, 1).reshape(-1, f.shape[1])


def moments(material: Material, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread [DEPTH] of each channel over judged places, of some of the tiles, taken evenly."""
    total, squares, count = torch.zeros(networks.DEPTH), torch.zeros(networks.DEPTH), 0
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


def centres(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Greedy k-centre choice among rows [n, C], by distances in a random projection (Roth et al. 2022, section 3.2)."""
    sketch = rows @ (torch.randn(rows.shape[1], _SKETCH, generator=generator) / _SKETCH**0.5)
    distance = torch.full((len(rows),), torch.inf)
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    for _ in range(min(count, len(rows)) - 1):
        distance = torch.minimum(distance, ((sketch - sketch[chosen[-1]]) ** 2).sum(1))
        chosen.append(int(distance.argmax()))
    return torch.tensor(chosen)


def _whitening(covariance: Tensor) -> Tensor:
    """W with W W^T = (covariance + ridge I)^-1, for each of many covariances [N, C, C]."""
    regular = covariance.double() + _RIDGE * torch.eye(covariance.shape[-1], dtype=torch.float64)
    factor = torch.linalg.cholesky(regular)
    inverse = torch.linalg.solve_triangular(factor, torch.eye(factor.shape[-1], dtype=torch.float64), upper=False)
    whitening: Tensor = inverse.mT.float()
    return whitening


@dataclass
class _Sums:
    """Of features at each place, and of their products in each block."""

    count: int
    total: Tensor
    """[DEPTH, h, w]"""
    products: Tensor
    """[blocks, DEPTH, DEPTH]"""

    def without(self, other: _Sums) -> _Sums:
        """What is left where the others are taken away: exactly what a fit without them would have summed."""
        return _Sums(self.count - other.count, self.total - other.total, self.products - other.products)


class Residuals:
    """What is summed once for all tiles; a fold's own share is taken away again, instead of fitting anew."""

    def __init__(self, material: Material, prototypes: int, run: Run) -> None:
        self._material, self._prototypes, self._run = material, prototypes, run
        every = torch.arange(len(material.good))
        self._origin, self._unit = moments(material, every)
        """Products are summed of features about this origin and in this unit, or rounding would eat them."""
        self._sums = self._summed(every)

    def _summed(self, tiles: Tensor) -> _Sums:
        h, w = self._material.judged.shape[1:]
        blocks = h // networks.BLOCK * (w // networks.BLOCK)
        sums = _Sums(
            len(tiles),
            torch.zeros(networks.DEPTH, h, w),
            torch.zeros(blocks, networks.DEPTH, networks.DEPTH),
        )
        for part in parts(tiles):
            f = networks.scaled(self._material.good.raw(part), self._origin, self._unit)
            sums.total += f.sum(0)
            x = networks.blocks(f)
            sums.products.baddbmm_(x.mT, x)
        return sums

    def gaussian(self, fold: int, mean: Tensor, spread: Tensor) -> networks.LocalGaussian:
        """Of the tiles outside a fold, of all for -1; for features standardised by this mean and spread [DEPTH]."""
        own = torch.from_numpy((self._material.fold == fold).nonzero()[0])
        sums = self._sums.without(self._summed(own)) if len(own) else self._sums
        average = sums.total / sums.count
        centre = networks.blocks(average[None])
        covariance = (sums.products / sums.count - centre.mT @ centre) / networks.BLOCK**2
        gain = self._unit / spread
        shift = (self._origin - mean) / spread
        h, w = average.shape[1:]
        whitening = _whitening(covariance * gain[:, None] * gain)
        return networks.LocalGaussian(
            average * gain[:, None, None] + shift[:, None, None],
            whitening.reshape(h // networks.BLOCK, w // networks.BLOCK, networks.DEPTH, networks.DEPTH),
        )

    def bank(self, fold: int, mean: Tensor, spread: Tensor) -> networks.Bank:
        """The same for prototypes."""
        torch.manual_seed(int(torch.randint(2**53, (1,), generator=self._run.seeded(fold, 2))))
        others = torch.from_numpy((self._material.fold != fold).nonzero()[0])
        rows = sampled(
            self._material, self._material.good, others, _CORESET_ROWS,
            lambda raw: rows_of(networks.scaled(raw, mean, spread)),
        )  # fmt: skip
        return networks.Bank(rows[centres(rows, self._prototypes, self._run.seeded(fold, 1))])
