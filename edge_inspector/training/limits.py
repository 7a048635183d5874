"""The smallest defect that is found: drawn chips of known size and contrast, of a family no network was trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_inspector import pictures
from edge_inspector.runtime import Engine
from edge_inspector.runtime.engine import picture_score
from edge_inspector.training import synthesis

SIZES = (0.01, 0.02, 0.04, 0.08, 0.16)
"""Diameters, as shares of the picture's shorter side."""
CONTRASTS = (10, 20, 40, 80)
"""Grey levels of 255 by which a chip is darker or brighter than the part."""
FOUND = 0.9
_PARTS = 10


@dataclass(frozen=True)
class Curve:
    """Share of drawn chips found at the bundle's threshold."""

    sizes_px: tuple[float, ...]
    contrasts: tuple[int, ...]
    found: tuple[tuple[float, ...], ...]
    """[contrast][size]"""
    parts: int
    """Chips behind each share."""

    def smallest_px(self, contrast: int) -> float | None:
        """The size from which on 90 % of chips are found, or None."""
        row = self.found[self.contrasts.index(contrast)]
        at = next((i for i in range(len(row)) if all(share >= FOUND for share in row[i:])), None)
        return None if at is None else self.sizes_px[at]

    def figures(self) -> dict[str, float]:
        """For the manifest."""
        smallest = {contrast: self.smallest_px(contrast) for contrast in self.contrasts}
        return {f"smallest_found_px_at_contrast_{c}": size for c, size in smallest.items() if size is not None}

    def __str__(self) -> str:
        for contrast in self.contrasts:
            size = self.smallest_px(contrast)
            if size is not None:
                return f"chips of {contrast} grey levels are found from {size:.0f} px on (drawn, {self.parts} of each)"
        return f"no drawn chip up to {self.sizes_px[-1]:.0f} px and {self.contrasts[-1]} grey levels is found reliably"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"sizes_px": self.sizes_px, "contrasts": self.contrasts, "found": self.found, "parts": self.parts}


def curve(
    engine: Engine, paths: Sequence[Path], rng: np.random.Generator, tick: Callable[[int, int], None] = lambda _, __: None
) -> Curve:
    """Draw chips into good parts, the most ordinary ones first in `paths`, and judge them."""
    manifest = engine.bundle.manifest
    chosen = paths[: max(_PARTS, len(paths) // 2) : max(1, len(paths) // 2 // _PARTS)][:_PARTS]
    hits = np.zeros((len(CONTRASTS), len(SIZES)))
    shorter = 0
    for done, path in enumerate(chosen, 1):
        image = pictures.read(path)
        shorter += min(image.shape[:2])
        scale = manifest.training.intensity_window or (0, 255)
        for i, contrast in enumerate(CONTRASTS):
            for j, size in enumerate(SIZES):
                chipped = synthesis.chipped(rng, image, max(1.0, size * min(image.shape[:2])), contrast / 255, scale)
                hits[i, j] += picture_score(engine, chipped) > manifest.threshold
        tick(done, len(chosen))
    sizes = tuple(round(max(1.0, size * shorter / len(chosen)), 1) for size in SIZES)
    found = tuple(tuple(float(share) for share in row) for row in hits / len(chosen))
    return Curve(sizes, CONTRASTS, found, len(chosen))
