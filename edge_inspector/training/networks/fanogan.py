"""f-AnoGAN: Schlegl et al., "f-AnoGAN: Fast unsupervised anomaly detection with generative adversarial networks", MedIA 2019.

A generator G learns what good parts look like (WGAN-GP, Gulrajani et al. 2017), then an encoder E learns to find
a picture's place among them ("izi_f", section 2.2 of the paper). What G(E(x)) cannot reproduce is anomalous.

All pictures here are float [N, C, S, S] in [-1, 1]; latents are float [N, latent].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

LATENT = 128
KAPPA = 1.0
SMOOTHING_PX = 2.0
SLOW_PX = 15


def _normalised(channels: int, kind: str) -> nn.Module:
    """Batch norm for G and E; for the critic layer norm over C, H, W (WGAN-GP forbids coupling pictures of a batch)."""
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(1, channels)


class _Up(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(inputs, outputs, 1)
        self.body = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        grown: Tensor = functional.interpolate(self.shortcut(x), scale_factor=2.0) + self.body(x)
        return grown


class _Down(nn.Module):
    def __init__(self, inputs: int, outputs: int, norm: str) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(inputs, outputs, 1)
        self.body = nn.Sequential(
            _normalised(inputs, norm),
            nn.ReLU(),
            nn.Conv2d(inputs, outputs, 3, padding=1),
            _normalised(outputs, norm),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        shrunk: Tensor = self.shortcut(functional.avg_pool2d(x, 2)) + self.body(x)
        return shrunk


def _widths(size: int, width: int) -> list[int]:
    """Channels at each resolution from `size` down to 4: width, then doubling, at most 8 x width."""
    return [width * min(2**level, 8) for level in range(int(math.log2(size // 4)) + 1)]


class Generator(nn.Module):
    """Latent [N, LATENT] -> picture [N, channels, size, size]."""

    def __init__(self, size: int, channels: int, width: int) -> None:
        super().__init__()
        widths = _widths(size, width)[::-1]
        self.deepest = widths[0]
        self.project = nn.Linear(LATENT, widths[0] * 16)
        self.grow = nn.Sequential(*(_Up(a, b) for a, b in zip(widths, widths[1:], strict=False)))
        self.picture = nn.Sequential(
            nn.BatchNorm2d(widths[-1]), nn.ReLU(), nn.Conv2d(widths[-1], channels, 3, padding=1), nn.Tanh()
        )

    def forward(self, latent: Tensor) -> Tensor:
        picture: Tensor = self.picture(self.grow(self.project(latent).reshape(-1, self.deepest, 4, 4)))
        return picture


def as_pixels(picture: Tensor) -> Tensor:
    """[N, C, S, S] in [-1, 1] -> uint8 [N, S, S, C]."""
    return ((picture.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class Drawing(nn.Module):
    """G as it is exported: latents [N, LATENT] -> pictures uint8 [N, size, size, channels]."""

    def __init__(self, g: Generator) -> None:
        super().__init__()
        self.g = g

    def forward(self, latent: Tensor) -> Tensor:
        return as_pixels(self.g(latent))


class Shrinker(nn.Module):
    """Picture -> `outputs` numbers and, before the last layer, features [N, F, 4, 4].

    The critic D has one output and layer norm; the encoder E has LATENT outputs and batch norm.
    """

    def __init__(self, size: int, channels: int, width: int, outputs: int, norm: str) -> None:
        super().__init__()
        widths = _widths(size, width)
        self.first = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.shrink = nn.Sequential(*(_Down(a, b, norm) for a, b in zip(widths, widths[1:], strict=False)))
        self.last = nn.Linear(widths[-1] * 16, outputs)

    def features(self, x: Tensor) -> Tensor:
        features: Tensor = self.shrink(self.first(x))
        return features

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.features(x).flatten(1))
        return out


def critic(size: int, channels: int, width: int) -> Shrinker:
    """D: one output, layer norm."""
    return Shrinker(size, channels, width, 1, "layer")


def encoder(size: int, channels: int, width: int) -> Shrinker:
    """E: LATENT outputs, batch norm."""
    return Shrinker(size, channels, width, LATENT, "batch")


def critic_loss(d: Shrinker, real: Tensor, fake: Tensor, penalty_weight: float = 10.0) -> tuple[Tensor, Tensor]:
    """Wasserstein loss and gradient penalty (Gulrajani et al. 2017, eq. 3), to be added."""
    mix = torch.rand(len(real), 1, 1, 1, device=real.device)
    between = (mix * real + (1 - mix) * fake).requires_grad_(True)
    (gradient,) = torch.autograd.grad(d(between).sum(), between, create_graph=True)
    penalty = penalty_weight * ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean()
    return d(fake).mean() - d(real).mean(), penalty


def izi_f_loss(x: Tensor, g: Generator, d: Shrinker, e: Shrinker) -> Tensor:
    """Encoder loss: picture residual plus KAPPA times critic-feature residual (f-AnoGAN eq. 4)."""
    again = g(e(x))
    picture = functional.mse_loss(again, x)
    return picture + KAPPA * functional.mse_loss(d.features(again), d.features(x))


def _gaussian(sigma: float) -> Tensor:
    reach = int(3 * sigma)
    x = torch.arange(-reach, reach + 1, dtype=torch.float32)
    line = torch.exp(-(x**2) / (2 * sigma**2))
    line /= line.sum()
    return (line[:, None] * line[None, :])[None, None]


class FanoganGraph(nn.Module):
    """The one graph that is exported: pixels in, score, map and expected appearance out.

    The anomaly score of the paper, A(x) = picture residual + KAPPA * feature residual (eq. 5), is an average over the
    whole picture, in which a speck drowns. Here the same two terms are kept per place, and three things differ:
    the picture residual is taken without its slow part (a box of SLOW_PX), because brightness and tint of a whole area
    are the lamp's and not a defect's; both terms are brought to one scale, their 99th percentile over good pictures
    (`balance`), because critic features have no unit; the score is the maximum over the valid pixels.
    """

    def __init__(self, g: Generator, d: Shrinker, e: Shrinker, size: int) -> None:
        super().__init__()
        self.g, self.d, self.e, self.size = g, d, e, size
        kernel = _gaussian(SMOOTHING_PX)
        self.reach = kernel.shape[-1] // 2
        self.register_buffer("kernel", kernel)
        self.register_buffer("box", torch.full((1, 1, SLOW_PX, SLOW_PX), 1.0 / SLOW_PX**2))
        self.register_buffer("picture_unit", torch.ones(()))
        self.register_buffer("feature_unit", torch.ones(()))
        self.register_buffer("unit", torch.ones(()))
        self.kernel: Tensor
        self.box: Tensor
        self.picture_unit: Tensor
        self.feature_unit: Tensor
        self.unit: Tensor
        """What scores are divided by: calibration makes the median good part 1."""

    def _terms(self, x: Tensor, judged: Tensor, again: Tensor) -> tuple[Tensor, Tensor]:
        """Picture and feature residual per place, [N, 1, S, S] each."""
        residual = (again - x) * judged
        share = functional.conv2d(judged, self.box, padding=SLOW_PX // 2).clamp(min=1e-3)
        slow = functional.avg_pool2d(residual, SLOW_PX, 1, SLOW_PX // 2) / share
        quick = ((residual - slow) ** 2).mean(1, keepdim=True) * judged
        weight = functional.conv2d(judged, self.kernel, padding=self.reach).clamp(min=1e-3)
        picture = functional.conv2d(quick, self.kernel, padding=self.reach) / weight
        deep = ((self.d.features(again) - self.d.features(x)) ** 2).mean(1, keepdim=True)
        deep = functional.interpolate(deep, scale_factor=float(self.size // 4), mode="bilinear", align_corners=False)
        return picture, deep

    @torch.no_grad()
    def balance(self, image: Tensor) -> None:
        """Set the terms' units from the good pictures fitted to: uint8 [N, S, S, C]. Scores of those held out stay honest."""
        peaks = []
        for part in image.split(64):  # type: ignore[no-untyped-call]
            x = part.float().permute(0, 3, 1, 2) / 127.5 - 1
            terms = self._terms(x, torch.ones_like(x[:, :1]), self.g(self.e(x)))
            peaks.append(torch.stack([term.amax((1, 2, 3)) for term in terms]))
        picture, feature = torch.cat(peaks, 1).quantile(0.99, dim=1)
        self.picture_unit.copy_(picture)
        self.feature_unit.copy_(feature)

    def forward(self, image: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image uint8 [N, S, S, C], valid uint8 [N, S, S] (0 = not judged) -> score [N], map [N, S, S], expected uint8."""
        x = image.float().permute(0, 3, 1, 2) / 127.5 - 1
        judged = valid.float().unsqueeze(1).clamp(max=1.0)
        again = self.g(self.e(x))
        picture, deep = self._terms(x, judged, again)
        anomaly = (picture / self.picture_unit + KAPPA * deep / self.feature_unit) * judged / self.unit
        expected = as_pixels(again)
        return anomaly.amax((1, 2, 3)), anomaly.squeeze(1), expected
