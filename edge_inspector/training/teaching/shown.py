"""Pictures that a person shows -> tiles, seen as the line sees them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_inspector import pictures, preprocess
from edge_inspector.bundles import Bundle
from edge_inspector.errors import TrainingError
from edge_inspector.frames import Pixels
from edge_inspector.preprocess import FormatError
from edge_inspector.roi import Roi
from edge_inspector.training.data import cut, folds_of
from edge_inspector.training.evaluation import mask_beside
from edge_inspector.training.teaching.material import Tiles
from edge_inspector.training.teaching.network import BATCH, Network

Tick = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Shown:
    """Pictures of one folder."""

    paths: tuple[Path, ...]
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    """Of each picture the name of its subfolder; empty where there is none."""
    tiles: Tiles
    marked: NDArray[np.bool_]
    """[tiles, h, w]: where a mask says that the defect lies; everything judged where there is no mask."""


def plan_of(bundle: Bundle, image: Pixels) -> preprocess.Plan:
    """How a picture is cut: by the region that was trained on, or whole where it is that region. Raises FormatError."""
    manifest = bundle.manifest
    preprocess.refuse_camera(bundle, image)
    region, (height, width) = manifest.pictures.region, image.shape[:2]
    box = region.box(height, width) if region is not None else None
    roi = region if region is not None and box is not None else Roi()
    plan = preprocess.Plan(manifest.input, roi, height, width, manifest.training.intensity_window)
    preprocess.refuse_unlike(manifest, plan.box)
    return plan


def region_of(bundle: Bundle, path: Path) -> Pixels:
    """What is judged of a picture, as the bundle's samples are cut. Raises PictureError, FormatError."""
    image, manifest = pictures.read(path), bundle.manifest
    region = manifest.pictures.region
    if region is None or region.box(*image.shape[:2]) is None:
        return image
    return cut(image, region, path, manifest.training.intensity_window)


def shown(folder: Path, bundle: Bundle, network: Network, folds: int, masks: Path | None, tick: Tick) -> Shown:
    """Read a folder of pictures; exact copies count once. `folds`: of good parts, 0 for defects.

    Raises PictureError, FormatError and TrainingError, each with the picture's name.
    """
    listing = pictures.listed(folder)
    names = pictures.part_names(listing.taken, listing.folder)
    compute = network.between(["image"], [*network.taps, "maps"])
    found: dict[str, tuple[Path, str, list[NDArray[np.generic]]]] = {}
    for number, (path, name) in enumerate(zip(listing.taken, names, strict=True), 1):
        content = pictures.content(path)
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256 not in found:
            seen = _seen(path, pictures.decode(content, str(path)), bundle, compute, _mask_of(path, folder, masks))
            found[sha256] = path, name, seen
        tick(f"looking at {folder.name}", number, len(names))
    paths, told, seen_all = zip(*found.values(), strict=True)
    counts = [len(seen[0]) for seen in seen_all]
    *taps, maps, judged, marked = (np.concatenate(parts) for parts in zip(*seen_all, strict=True))
    picture = np.repeat(np.arange(len(counts)), counts)
    fold = folds_of(len(counts), folds)[picture] if folds else np.full(len(picture), -1)
    tiles = Tiles(tuple(tap.astype(np.float16) for tap in taps), maps, judged, fold, picture)
    return Shown(paths, told, tuple(_kind(path, folder) for path in paths), tiles, marked)


def _seen(
    path: Path, image: Pixels, bundle: Bundle, compute: Callable[..., list[NDArray[np.float32]]], mask: NDArray[np.uint8] | None
) -> list[NDArray[np.generic]]:
    """The backbone's maps, the terms' maps, what is judged and what is marked, of each tile."""
    try:
        plan = plan_of(bundle, image)
    except FormatError as error:
        raise TrainingError(f"{pictures.printable(path)}: {error.message}", hint=error.hint) from error
    images, valid = plan.buffers()
    plan.fill(image, images, valid)
    batches = [compute(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
    *taps, maps = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    h, w = maps.shape[2:]
    judged = _any(valid, h, w)
    marked = judged & _any(_cut(mask, plan, path), h, w) if mask is not None else judged
    if mask is not None and not marked.any():
        raise TrainingError(f"{pictures.printable(path)}: its mask marks nothing that is judged", hint="correct the mask")
    return [*taps, maps, judged, marked]


def _any(pixels: NDArray[np.uint8], h: int, w: int) -> NDArray[np.bool_]:
    """[n, H, W] -> whether any pixel of a place is set, [n, h, w]."""
    n, height, width = pixels.shape
    found: NDArray[np.bool_] = pixels.reshape(n, h, height // h, w, width // w).max((2, 4)) > 0
    return found


def _mask_of(path: Path, folder: Path, masks: Path | None) -> NDArray[np.uint8] | None:
    """The mask of a picture, at its own place in the folder of masks: NAME_mask.* or NAME.*. Raises TrainingError."""
    if masks is None:
        return None
    place = (masks / path.relative_to(folder)).parent
    mask = mask_beside(place, path)
    if mask is None:
        raise TrainingError(
            f"{pictures.printable(place)}: no mask for {pictures.printable(path.name)}",
            hint=f"call it {path.stem}_mask.png, or give no --masks: without them it works nearly as well",
        )
    return mask


def _cut(mask: NDArray[np.uint8], plan: preprocess.Plan, path: Path) -> NDArray[np.uint8]:
    """A picture's mask, cut as the picture is: [tiles, H, W]."""
    if mask.shape != plan.size:
        found, wanted = (f"{size[1]}x{size[0]}" for size in (mask.shape, plan.size))
        raise TrainingError(
            f"{pictures.printable(path)}: its mask has {found} px, the picture {wanted}",
            hint="give masks of the pictures' own size",
        )
    _, out = plan.buffers()
    out[:] = 0
    left, top = plan.box[:2]
    for target, tile in zip(out, plan.tiles, strict=True):
        part = mask[top + tile.y : top + tile.y + tile.h, left + tile.x : left + tile.x + tile.w]
        share = cv2.resize(part.astype(np.float32), (tile.width, tile.height), interpolation=cv2.INTER_AREA)
        target[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width] = share > 0
    return out


def _kind(path: Path, folder: Path) -> str:
    within = path.relative_to(folder).parent
    return "" if within == Path() else pictures.printable(within)
