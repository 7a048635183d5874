"""Whether a GAN draws good parts, or only a few of them, or the training pictures by heart.

Distances are taken between small pictures (16 x 16), where they mean what a person sees at a glance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_inspector.training.networks.fanogan import LATENT

_SAMPLES = 256
_SIDE = 16
COLLAPSED, COPIED = 0.5, 0.7
"""Below these shares it is said: chosen so that a set of normals measured against itself lies far above both."""


@dataclass(frozen=True)
class Watched:
    """Two ratios that are near 1 for a network that draws as the data are."""

    diversity: float
    """Mean distance between drawn pictures over that between good parts: near 0 where the GAN collapsed."""
    novelty: float
    """Median distance of drawn pictures to the nearest fitted picture over that of held-out good parts: near 0 where the
    GAN copies."""
    fitted: int

    def figures(self) -> dict[str, float]:
        """For the manifest."""
        return {"gan_diversity": self.diversity, "gan_novelty": self.novelty}

    def said(self) -> tuple[str, ...]:
        """In words."""
        diversity = f"drawn pictures differ {self.diversity:.2f} times as much as good parts do"
        novelty = f"they are {self.novelty:.2f} times as far from the fitted pictures as unseen good parts are"
        if self.diversity < COLLAPSED:
            diversity += ": the GAN collapsed to few pictures; train longer, or with another --seed"
        if self.novelty < COPIED and self.diversity >= COLLAPSED:
            novelty += f": the GAN copies some of its {self.fitted} pictures; more pictures help, fewer steps may"
        return diversity, novelty


def _small(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[N, H, W, C] -> [N, 768 or 256] in 0..1."""
    small = [cv2.resize(i, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).ravel() for i in images]
    scaled: NDArray[np.float32] = np.stack(small).astype(np.float32) / np.float32(255)
    return scaled


def _distances(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    squared: NDArray[np.float32] = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    distances: NDArray[np.float32] = np.sqrt(np.maximum(squared, 0))
    return distances


def measured(drawn: NDArray[np.uint8], fitted: NDArray[np.uint8], held_out: NDArray[np.uint8]) -> Watched:
    """Compare pictures uint8 [N, H, W, C]: drawn ones with those fitted to and those held out."""
    made, known, unseen = _small(drawn), _small(fitted), _small(held_out)

    def spread(x: NDArray[np.float32]) -> float:
        return float(_distances(x, x).sum() / (len(x) * (len(x) - 1)))

    nearest_unseen = float(np.median(_distances(unseen, known).min(1)))
    novelty = float(np.median(_distances(made, known).min(1))) / max(nearest_unseen, 1e-9)
    return Watched(spread(made) / max(spread(known), 1e-9), novelty, len(fitted))


def watch(draw: Callable[[Tensor], NDArray[np.uint8]], fitted: NDArray[np.uint8], held_out: NDArray[np.uint8]) -> Watched:
    """Measure a generator by 256 pictures from latents that depend on nothing else. At most 2000 fitted ones are compared."""
    latents = torch.randn(_SAMPLES, LATENT, generator=torch.Generator().manual_seed(0))
    step = max(1, len(fitted) // 2000)
    return measured(draw(latents), fitted[::step], held_out[: 2 * _SAMPLES])
