"""Pictures of good parts: read, split, cut into what the network sees."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_inspector import pictures, preprocess
from edge_inspector.bundles import InputSpec
from edge_inspector.errors import PictureError, TrainingError
from edge_inspector.roi import Roi

MIN_PICTURES = 20
BLOCKS = 20
"""The name order is cut into this many runs; every fourth run is held out for calibration. Neighbours in name order
tend to come from the same sheet, shift or minute: held out one by one they would flatter the threshold."""


@dataclass(frozen=True)
class Pictures:
    """Good parts of one product: those the network is fitted to, and those held out for calibration."""

    fit: tuple[Path, ...]
    held_out: tuple[Path, ...]
    height_px: int
    width_px: int
    channels: int
    depth_bits: int
    digest: str
    """sha256 over names and bytes, in name order."""
    warnings: tuple[str, ...]


def _split(paths: Sequence[Path]) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    blocks = np.array_split(np.arange(len(paths)), min(BLOCKS, len(paths) // 2))
    held = {int(i) for number, block in enumerate(blocks) if number % 4 == 3 for i in block}
    return (
        tuple(p for i, p in enumerate(paths) if i not in held),
        tuple(p for i, p in enumerate(paths) if i in held),
    )


def survey(folder: Path) -> Pictures:
    """Read every picture once: refuse what cannot be used, warn of what looks odd, split the rest.

    Raises TrainingError (too few, mixed bit depths) and PictureError (none, unreadable).
    """
    paths = pictures.listed(folder)
    digest, digests, shapes, warnings, unreadable = hashlib.sha256(), Counter[bytes](), Counter[tuple[int, ...]](), [], []
    usable = []
    for path in paths:
        try:
            image = pictures.read(path)
        except PictureError as error:
            unreadable.append(error.message)
            continue
        content = path.read_bytes()
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(content).digest())
        digests[hashlib.sha256(content).digest()] += 1
        height, width = image.shape[:2]
        shapes[height, width, 1 if image.ndim == 2 else 3, image.dtype.itemsize * 8] += 1
        usable.append(path)
    if unreadable:
        warnings.append(f"left out {len(unreadable)} unreadable: " + "; ".join(unreadable[:5]))
    if len(usable) < MIN_PICTURES:
        raise TrainingError(
            f"{folder}: {len(usable)} usable pictures, at least {MIN_PICTURES} are needed",
            hint="take more pictures of good parts; 300 support a promised false-reject rate of 1 %",
        )
    for position, name in ((2, "colours (grey and colour)"), (3, "bit depths")):
        kinds = {shape[position] for shape in shapes}
        if len(kinds) > 1:
            raise TrainingError(f"{folder}: mixed {name}: {sorted(kinds)}", hint="train on pictures of one camera setting")
    if len(shapes) > 1:
        sizes = ", ".join(f"{w}x{h} ({n})" for (h, w, _, _), n in shapes.most_common(4))
        warnings.append(f"pictures differ in size: {sizes}; each is fitted to the network's input on its own")
    twice = sum(n - 1 for n in digests.values())
    if twice:
        warnings.append(f"{twice} exact copies: copies add no information and flatter the threshold")
    fit, held_out = _split(usable)
    (height, width, channels, bits), _ = shapes.most_common(1)[0]
    return Pictures(fit, held_out, height, width, channels, bits, digest.hexdigest(), tuple(warnings))


def load_tiles(paths: Sequence[Path], spec: InputSpec, roi: Roi, window: preprocess.Window | None) -> NDArray[np.uint8]:
    """Every tile of every picture as the network will see it on the line: uint8 [N, H, W, C]."""
    out = []
    plans: dict[tuple[int, int], preprocess.Plan] = {}
    for path in paths:
        image = pictures.read(path)
        height, width = image.shape[:2]
        plan = plans.get((height, width))
        if plan is None:
            plan = plans[height, width] = preprocess.Plan(spec, roi, height, width, window)
        buffers = plan.buffers()
        plan.fill(image, *buffers)
        out.append(buffers[0])
    return np.concatenate(out)
