"""Pictures of good parts: read, audited, split, cut into what the network sees."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_inspector import pictures, preprocess
from edge_inspector.bundles import InputSpec
from edge_inspector.errors import PictureError, TrainingError
from edge_inspector.roi import Rectangle, Roi
from edge_inspector.training import audit

MIN_PICTURES = 20
BLOCKS = 60
"""The name order is cut into this many runs, and whole runs are held out together. Neighbours in name order tend to come
from the same sheet, shift or minute: held out one by one they would flatter the threshold. Longer runs would hold out a
whole variant of the product where the names sort by variant, and the others cannot stand in for it."""


@dataclass(frozen=True)
class Pictures:
    """Good parts of one product, in name order."""

    paths: tuple[Path, ...]
    height_px: int
    width_px: int
    """The commonest size."""
    aspects: tuple[float, float]
    """Smallest and largest width / height."""
    channels: int
    depth_bits: int
    digest: str
    """sha256 over names and bytes, in name order."""
    remarks: tuple[audit.Remark, ...]

    def folds(self, count: int) -> NDArray[np.intp]:
        """The fold of each picture, 0 to count - 1, whole runs of names together."""
        runs = np.array_split(np.arange(len(self.paths)), min(BLOCKS, len(self.paths) // 2))
        fold = np.empty(len(self.paths), np.intp)
        for number, run in enumerate(runs):
            fold[run] = number % count
        return fold


def survey(
    folder: Path, tick: Callable[[int, int], None] = lambda _, __: None, window: preprocess.Window | None = None
) -> Pictures:
    """Read every picture once: refuse what cannot be used, remark on what looks odd. tick(done, all) after each.

    Exact copies are left out: in another fold they would let a network be judged by parts that it knows. `window`: the
    intensities that are black and white. Raises TrainingError (too few, mixed colours or bit depths) and PictureError (none,
    no folder).
    """
    paths = pictures.listed(folder)
    digest, unreadable, copies, found = hashlib.sha256(), [], [], []
    seen: set[bytes] = set()
    for number, path in enumerate(paths, 1):
        try:
            content = path.read_bytes()
            sha256 = hashlib.sha256(content).digest()
            if sha256 in seen:
                copies.append(path)
                continue
            found.append(audit.facts(path, pictures.decode(content, str(path)), window))
            seen.add(sha256)
            digest.update(path.name.encode() + b"\0" + sha256)
        except (PictureError, OSError) as error:
            unreadable.append((path, error.message if isinstance(error, PictureError) else str(error)))
        finally:
            tick(number, len(paths))
    if len(found) < MIN_PICTURES:
        why = f" ({len(unreadable)} unreadable: {unreadable[0][1]})" if unreadable else ""
        why += f" ({len(copies)} exact copies do not count)" if copies else ""
        raise TrainingError(
            f"{folder}: {len(found)} usable pictures{why}, at least {MIN_PICTURES} are needed",
            hint="take more pictures of good parts; 59 support a promised false-reject rate of 5 %, 299 one of 1 %",
        )
    for name, kinds in (
        ("grey and colour pictures", ["grey" if f.channels == 1 else "colour" for f in found]),
        ("bit depths", [f"{f.depth_bits} bit" for f in found]),
    ):
        counted = Counter(kinds).most_common()
        if len(counted) > 1:
            listed, rare = ", ".join(f"{n} {kind}" for kind, n in counted), counted[-1][0]
            raise TrainingError(
                f"{folder}: mixed {name}: {listed}; {rare} is, for one, {found[kinds.index(rare)].path.name}",
                hint="train on pictures of one camera setting",
            )
    said = audit.remarks(found)
    if copies:
        text = f"{len(copies)} exact copies of others were left out: they add no information"
        said = (audit.Remark("warning", text, tuple(copies)), *said)
    if unreadable:
        text = "left out, unreadable (" + "; ".join(sorted({why.split(": ", 1)[-1] for _, why in unreadable})) + ")"
        said = (audit.Remark("warning", text, tuple(path for path, _ in unreadable)), *said)
    (height, width), _ = Counter((f.height_px, f.width_px) for f in found).most_common(1)[0]
    aspects = [f.width_px / f.height_px for f in found]
    return Pictures(
        tuple(f.path for f in found), height, width, (min(aspects), max(aspects)), found[0].channels, found[0].depth_bits,
        digest.hexdigest(), said,
    )  # fmt: skip


def cropped(folder: Path, region: Rectangle, out: Path) -> Path:
    """Write what lies in a region of each picture into `out`, and return it: what follows sees parts as the recipe does.

    Pictures that are there already are kept; unreadable ones are passed on as they are. Raises PictureError.
    """
    for path in pictures.listed(folder):
        target = out / path.relative_to(folder).parent / f"{path.name}.png"
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            image = pictures.read(path)
        except PictureError:
            target.write_bytes(path.read_bytes())
            continue
        box = Roi(rectangle=region).box(*image.shape[:2])
        if box is None:
            size, wanted = f"{image.shape[1]}x{image.shape[0]}", " ".join(map(str, region.model_dump().values()))
            raise PictureError(
                f"{path}: the region {wanted} (X Y W H) reaches outside its {size} px", hint="correct --rectangle"
            )
        x, y, w, h = box
        pictures.write(target, image[y : y + h, x : x + w])
    return out


@dataclass(frozen=True)
class Tiles:
    """Every tile of every picture as the network sees it on the line."""

    images: NDArray[np.uint8]
    """[N, H, W, C]"""
    valid: NDArray[np.uint8]
    """[N, H, W], 0 where nothing is judged."""
    picture: NDArray[np.intp]
    """[N], which picture a tile is of."""

    def of(self, chosen: NDArray[np.bool_]) -> Tiles:
        """The tiles of chosen pictures; chosen: bool [pictures]."""
        kept = chosen[self.picture]
        return Tiles(self.images[kept], self.valid[kept], self.picture[kept])


def load_tiles(paths: Sequence[Path], spec: InputSpec, window: preprocess.Window | None) -> Tiles:
    """Cut pictures as the line will. Raises PictureError, FormatError."""
    images, masks, origin = [], [], []
    plans: dict[tuple[int, int], preprocess.Plan] = {}
    for number, path in enumerate(paths):
        image = pictures.read(path)
        height, width = image.shape[:2]
        plan = plans.get((height, width))
        if plan is None:
            plan = plans[height, width] = preprocess.Plan(spec, Roi(), height, width, window)
        buffers = plan.buffers()
        plan.fill(image, *buffers)
        images.append(buffers[0])
        masks.append(buffers[1])
        origin += [number] * len(buffers[0])
    return Tiles(np.concatenate(images), np.concatenate(masks), np.array(origin))
