"""feature-anogan: AnoGAN's score, residual to the manifold of normals plus discriminator, on features instead of pixels.

Schlegl et al. (IPMI 2017, eq. 6) score A(x) = (1 - lambda) R(x) + lambda D(x): how far x is from what the generator can
draw, and how unlike good parts the discriminator finds it. Pixels are a poor place for both: light and position move
them more than a scratch does. Here x is a place in the feature maps f of a frozen backbone, and
  R is the distance to the manifold of normals, modelled twice: by a Gaussian for each neighbourhood (after Defard et al.,
    "PaDiM", 2021) and by a bank of prototypes (after Roth et al., "PatchCore", 2022);
  G(E(f)) is a bottleneck that draws the features a good part would have (after f-AnoGAN's encoder and generator);
  D judges f together with the residual f - G(E(f)) (after Liu et al., "SimpleNet", 2023), against noise and drawn defects.
What each term is worth for a product is measured on good parts and drawn defects alone (`feature_weights.py`).

f: float [N, C, h, w], standardised per channel. Input: uint8 [N, H, W, 3] RGB; h = H / stride of the backbone's finest map.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edge_inspector.training.networks.backbone import Backbone
from edge_inspector.training.normals import BLOCK, Floats, Prototypes
from edge_inspector.training.teaching.network import INNER

TERMS = ("gaussian", "bank", "discriminator")
_WIDTH, _LATENT, _HIDDEN = 64, 32, 256
_NEAREST = 0.005
"""Squared distances below this are this: at a prototype itself the difference of large squares is all rounding, 6e-7 of its
spacing's square. Those of unseen parts of the development sets lie above 0.0074."""
_SMOOTHING = 0.9
"""Sigma of the final blur, in feature places."""


def as_pixels(image: Tensor) -> Tensor:
    """Uint8 [N, H, W, 3] -> what a backbone takes, float [N, 3, H, W]."""
    return image.float().permute(0, 3, 1, 2)


def patches(taps: Sequence[Tensor], strides: Sequence[int]) -> Tensor:
    """A backbone's maps, the finest first -> [N, C, h, w]: each place with its neighbours, all scales."""
    found = []
    for tap, stride in zip(taps, strides, strict=True):
        pooled = functional.avg_pool2d(tap, 3, 1, 1, count_include_pad=False)
        factor = stride / strides[0]
        if factor > 1:
            pooled = functional.interpolate(pooled, scale_factor=factor, mode="bilinear", align_corners=False)
        found.append(pooled)
    return torch.cat(found, 1)


def scaled(raw: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """Features [N, C, h, w] about a mean and in units of a spread, each [C]."""
    return (raw - mean[:, None, None]) / spread[:, None, None]


def smoothing_kernel() -> Tensor:
    """Gaussian blur of maps, [1, 1, k, k]."""
    reach = int(3 * _SMOOTHING + 0.5)
    x = torch.arange(-reach, reach + 1, dtype=torch.float32)
    line = torch.exp(-(x**2) / (2 * _SMOOTHING**2))
    line /= line.sum()
    return (line[:, None] * line[None, :])[None, None]


class LocalGaussian(nn.Module):
    """Mahalanobis distance of each place: a mean of its own, and a covariance shared by its BLOCK x BLOCK neighbourhood."""

    def __init__(self, mean: Tensor, whitening: Tensor) -> None:
        """Mean [C, h, w]; whitening [h / BLOCK, w / BLOCK, C, C], so that |(f - mean) W|^2 is the distance^2.

        W is most of a bundle's size; it is kept at half precision and computed with at full precision.
        """
        super().__init__()
        self.register_buffer("mean", mean[None])
        self.rows, self.columns, self.depth = whitening.shape[:3]
        self.register_buffer("whitening", whitening.reshape(-1, self.depth, self.depth).half())
        self.mean: Tensor
        self.whitening: Tensor

    def forward(self, f: Tensor) -> Tensor:
        """Distances [N, 1, h, w]."""
        rows, columns = self.rows, self.columns
        split = (f - self.mean).reshape(-1, self.depth, rows, BLOCK, columns, BLOCK)
        together = split.permute(2, 4, 0, 3, 5, 1).reshape(rows * columns, -1, self.depth)
        squared = ((together @ self.whitening.float()) ** 2).sum(2)
        squared = squared.reshape(rows, columns, -1, BLOCK, BLOCK).permute(2, 0, 3, 1, 4)
        return squared.reshape(-1, 1, rows * BLOCK, columns * BLOCK).clamp(min=1e-6).sqrt()


class Bank(nn.Module):
    """Distance of each place to the nearest of K prototypes, in units of how far apart these lie there; by convolutions."""

    def __init__(self, prototypes: dict[str, Floats]) -> None:
        """Prototypes as `normals.Prototypes.convolutions` gives them."""
        super().__init__()
        for name, value in prototypes.items():
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(value, np.float32)))
        self.whitening: Tensor
        self.shift: Tensor
        self.kernel: Tensor
        self.level: Tensor

    def forward(self, f: Tensor) -> Tensor:
        """Distances [N, 1, h, w]."""
        y = functional.conv2d(f, self.whitening, self.shift)
        squared = functional.conv2d(torch.cat([y, (y * y).sum(1, keepdim=True)], 1), self.kernel, self.level)
        return squared.amin(1, keepdim=True).clamp(min=_NEAREST).sqrt()


def _layer(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2))


class Generator(nn.Module):
    """G(E(f)): through a bottleneck of a quarter of the places each way and back to half, where features are smooth enough."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            _layer(depth, _WIDTH, 1), _layer(_WIDTH, _WIDTH, 3, 2), nn.Conv2d(_WIDTH, _LATENT, 1), nn.Dropout2d(0.2)
        )
        self.decoder = nn.Sequential(
            _layer(_LATENT, _WIDTH, 3), nn.Upsample(scale_factor=2), _layer(_WIDTH, _WIDTH, 3), nn.Conv2d(_WIDTH, depth, 1)
        )

    def coarse(self, pooled: Tensor) -> Tensor:
        """Features averaged over 2 x 2 places -> what a good part would have there."""
        drawn: Tensor = self.decoder(self.encoder(pooled))
        return drawn


class Discriminator(nn.Module):
    """D of [f, (f - G(E(f))) / spread] at each place: a logit, high where it is unlike good parts."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.register_buffer("spread", torch.ones(()))
        self.spread: Tensor
        self.body = nn.Sequential(
            nn.Conv2d(2 * depth, _HIDDEN, 1), nn.BatchNorm2d(_HIDDEN), nn.LeakyReLU(0.2), nn.Conv2d(_HIDDEN, 1, 1)
        )

    @staticmethod
    def residual(f: Tensor, coarse: Tensor) -> Tensor:
        """What is left of f without what G draws, [N, C, h, w]."""
        return f - functional.interpolate(coarse, scale_factor=2.0, mode="bilinear", align_corners=False)

    def seen(self, f: Tensor, coarse: Tensor) -> Tensor:
        """What D is given, [N, 2 C, h, w]."""
        return torch.cat([f, self.residual(f, coarse) / self.spread], 1)

    def forward(self, f: Tensor, coarse: Tensor) -> Tensor:
        logit: Tensor = self.body(self.seen(f, coarse))
        return logit


class Heads(nn.Module):
    """Everything that is fitted: features in, one map for each term out."""

    def __init__(
        self, mean: Tensor, spread: Tensor, gaussian: LocalGaussian, bank: Bank, generator: Generator,
        discriminator: Discriminator,
    ) -> None:  # fmt: skip
        """Mean and spread: [C] of the raw features."""
        super().__init__()
        self.register_buffer("mean", mean[None, :, None, None])
        self.register_buffer("spread", spread[None, :, None, None])
        self.mean: Tensor
        self.spread: Tensor
        self.gaussian, self.bank, self.generator, self.discriminator = gaussian, bank, generator, discriminator

    def standardised(self, raw: Tensor) -> Tensor:
        """Features with mean 0 and spread 1 per channel over good parts."""
        return (raw - self.mean) / self.spread

    def term(self, name: str, f: Tensor, coarse: Tensor) -> Tensor:
        """One term's map [N, 1, h, w] of standardised features f, with what G draws of them."""
        if name == "discriminator":
            logit: Tensor = self.discriminator(f, coarse)
            return logit
        distance: Tensor = getattr(self, name)(f)
        return distance


class Exemplars(nn.Module):
    """The good part most like what G draws: a real picture, sharp where a decoder would blur, without the defect."""

    def __init__(self, keys: Tensor, shown: Tensor) -> None:
        """Keys [M, K] as `key` gives them; shown uint8 [M, H / 2, W / 2, 3] RGB."""
        super().__init__()
        self.register_buffer("keys", (-2 * keys).T.contiguous())
        self.register_buffer("square", (keys**2).sum(1))
        self.register_buffer("shown", shown.permute(0, 3, 1, 2).half())
        self.keys: Tensor
        self.square: Tensor
        self.shown: Tensor

    @staticmethod
    def key(coarse: Tensor) -> Tensor:
        """Drawn features [N, C, h / 2, w / 2] -> [N, K]."""
        return functional.avg_pool2d(coarse, 2).flatten(1)

    def forward(self, coarse: Tensor) -> Tensor:
        """Pictures uint8 [N, H, W, 3]."""
        nearest = (self.key(coarse) @ self.keys + self.square).argmin(1)
        picture = functional.interpolate(self.shown[nearest].float(), scale_factor=2.0, mode="bilinear", align_corners=False)
        return picture.permute(0, 2, 3, 1).round().clamp(0, 255).to(torch.uint8)


class FeatureAnoganGraph(nn.Module):
    """The one graph that is exported: pixels in, score, map and expected appearance out."""

    inner = INNER
    """What `judge` gives beside the outputs; these tensors and the backbone's keep their names in the exported graph."""

    def __init__(
        self, backbone: Backbone, heads: Heads, exemplars: Exemplars, terms: Sequence[str], mean: Tensor, gain: Tensor
    ) -> None:
        """terms: those of TERMS that are used; mean and gain [terms, h, w]: as `fused` takes them."""
        super().__init__()
        self.backbone, self.heads, self.exemplars, self.terms = backbone, heads, exemplars, tuple(terms)
        self.register_buffer("mean", mean)
        self.register_buffer("gain", gain)
        self.mean: Tensor
        self.gain: Tensor
        self.register_buffer("kernel", smoothing_kernel())
        self.register_buffer("unit", torch.ones(()))
        self.kernel: Tensor
        self.unit: Tensor
        """What scores are divided by: calibration makes the median good part 1."""

    def forward(self, image: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image uint8 [N, H, W, 3] RGB, valid uint8 [N, H, W] (0 = not judged) -> score [N], map [N, h, w], expected."""
        score, anomaly, expected, *_ = self.opened(image, valid)
        return score, anomaly, expected

    def opened(self, image: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        """What `forward` gives, then what lies between."""
        taps = self.backbone(as_pixels(image))
        score, anomaly, expected, *inner = self.judge(*taps, valid)
        return score, anomaly, expected, *taps, *inner

    def judge(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Everything after the backbone, of its maps and valid: what `forward` gives, then features, maps and their sum."""
        *taps, valid = given
        f = self.heads.standardised(patches(taps, self.backbone.taps.strides))
        coarse = self.heads.generator.coarse(functional.avg_pool2d(f, 2))
        maps = smoothed(torch.cat([self.heads.term(name, f, coarse) for name in self.terms], 1), self.kernel)
        total = fused(maps, self.mean, self.gain)
        score, anomaly = finished(total, judged(valid, self.backbone.taps.stride), self.unit)
        return score, anomaly, self.exemplars(coarse), f, maps, total


def empty_heads(depth: int, h: int, w: int, prototypes: int) -> Heads:
    """Heads of that shape that know nothing."""
    empty = Prototypes.of(np.zeros((prototypes, depth), np.float32), prototypes, np.random.default_rng(0))
    return Heads(
        torch.zeros(depth), torch.ones(depth),
        LocalGaussian(torch.zeros(depth, h, w), torch.zeros(h // BLOCK, w // BLOCK, depth, depth)),
        Bank(empty.convolutions()), Generator(depth), Discriminator(depth),
    )  # fmt: skip


def smoothed(maps: Tensor, kernel: Tensor) -> Tensor:
    """Maps [N, T, h, w], each blurred by the kernel."""
    each = maps.reshape(-1, 1, *maps.shape[2:])
    return functional.conv2d(each, kernel, padding=kernel.shape[-1] // 2).reshape(maps.shape)


def fused(maps: Tensor, mean: Tensor, gain: Tensor) -> Tensor:
    """Smoothed maps [N, T, h, w] -> weighted sum [N, 1, h, w].

    mean: of each term at each place over good parts, [T, h, w]; gain: its weight over its spread there. A place where
    good parts differ much, an edge that never lies quite the same, must differ more than others to be called odd.
    """
    return ((maps - mean) * gain).sum(1, keepdim=True)


def judged(valid: Tensor, stride: int) -> Tensor:
    """Valid uint8 [N, H, W] -> 1 or 0 [N, 1, h, w]: a place counts as soon as one of its pixels does, so none is left out."""
    return functional.max_pool2d(valid.float().unsqueeze(1), stride).clamp(max=1.0)


def finished(fused: Tensor, counted: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum of terms [N, 1, h, w] -> score [N] and map [N, h, w]: only what counts, in units."""
    anomaly = (fused / unit).clamp(min=0.0) * counted
    return anomaly.amax((1, 2, 3)), anomaly.squeeze(1)
