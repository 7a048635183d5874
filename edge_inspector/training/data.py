"""Pictures of good parts: read, audited, split, cut into what the network sees."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge_inspector import pictures, preprocess
from edge_inspector.bundles import InputSpec
from edge_inspector.errors import PictureError, TrainingError
from edge_inspector.frames import Pixels
from edge_inspector.roi import Roi
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
    sizes: tuple[tuple[int, int], tuple[int, int]]
    """Smallest and largest width and height."""

    def folds(self, count: int) -> NDArray[np.intp]:
        """The fold of each picture, 0 to count - 1, whole runs of names together."""
        return folds_of(len(self.paths), count)


def folds_of(pictures: int, count: int) -> NDArray[np.intp]:
    """The fold of each of some pictures in name order, 0 to count - 1: runs of neighbours are in one fold."""
    fold = np.empty(pictures, np.intp)
    for number, run in enumerate(np.array_split(np.arange(pictures), min(BLOCKS, max(1, pictures // 2)))):
        fold[run] = number % count
    return fold


def survey(
    folder: Path,
    tick: Callable[[int, int], None] = lambda _, __: None,
    window: preprocess.Window | None = None,
    original: Path | None = None,
    leave_out: Sequence[str] = (),
) -> Pictures:
    """Read every picture once: refuse what cannot be used, remark on what looks odd. tick(done, all) after each.

    Exact copies are left out: in another fold they would let a network be judged by parts that it knows. `window`: the
    intensities that are black and white. `original`: where the pictures were cut from, whose left-out files are told.
    `leave_out`: names of pictures that a person does not want to be learned from.
    Raises TrainingError (too few, mixed colours or bit depths) and PictureError (none, no folder).
    """
    listing = _without(pictures.listed(folder), leave_out, cut=original is not None)
    read = _read(listing, tick, window)
    _refuse_few(folder, read)
    _refuse_mixed(folder, read.found)
    found = read.found
    (height, width), _ = Counter((f.height_px, f.width_px) for f in found).most_common(1)[0]
    aspects, widths, heights = zip(*((f.width_px / f.height_px, f.width_px, f.height_px) for f in found), strict=True)
    return Pictures(
        paths=tuple(f.path for f in found), height_px=height, width_px=width, aspects=(min(aspects), max(aspects)),
        channels=found[0].channels, depth_bits=found[0].depth_bits, digest=read.digest,
        remarks=_said(read, listing if original is None else pictures.listed(original)),
        sizes=((min(widths), min(heights)), (max(widths), max(heights))),
    )  # fmt: skip


def _without(listing: pictures.Listing, leave_out: Sequence[str], *, cut: bool) -> pictures.Listing:
    """The listing without some pictures, each named by its file name or its path in the folder. Raises TrainingError.

    `cut`: the files are crops, whose names end in a further .png.
    """
    named: dict[str, list[Path]] = {}
    for path in listing.taken:
        within = path.relative_to(listing.folder)
        own = within.with_name(within.name.removesuffix(".png")) if cut else within
        for name in {own.name, str(own)}:
            named.setdefault(name, []).append(path)
    gone: set[Path] = set()
    for name in leave_out:
        count = len(named.get(name, ()))
        again = count == 1 and named[name][0] in gone
        if count != 1 or again:
            found = "named twice" if again else f"{count} pictures have that name" if count else "no such picture"
            raise TrainingError(
                f"--leave-out {pictures.printable(name)}: {found} in {pictures.printable(listing.folder)}",
                hint="one name on each line, as the report tells them; or the path within the folder",
            )
        gone.add(named[name][0])
    return replace(listing, taken=tuple(path for path in listing.taken if path not in gone))


@dataclass
class _Read:
    """What came out of reading every picture once."""

    found: list[audit.Facts] = field(default_factory=list)
    unreadable: list[tuple[Path, str]] = field(default_factory=list)
    copies: list[Path] = field(default_factory=list)
    digest: str = ""


def _read(listing: pictures.Listing, tick: Callable[[int, int], None], window: preprocess.Window | None) -> _Read:
    read, digest, seen = _Read(), hashlib.sha256(), set[bytes]()
    names = pictures.part_names(listing.taken, listing.folder)
    for number, (path, name) in enumerate(zip(listing.taken, names, strict=True), 1):
        try:
            content = pictures.content(path)
            sha256 = hashlib.sha256(content).digest()
            if sha256 in seen:
                read.copies.append(path)
                continue
            read.found.append(audit.facts(path, pictures.decode(content, str(path)), window))
            seen.add(sha256)
            digest.update(name.encode() + b"\0" + sha256)
        except PictureError as error:
            read.unreadable.append((path, error.message))
        finally:
            tick(number, len(names))
    read.digest = digest.hexdigest()
    return read


def _refuse_few(folder: Path, read: _Read) -> None:
    if len(read.found) >= MIN_PICTURES:
        return
    why = f" ({len(read.unreadable)} unreadable: {read.unreadable[0][1]})" if read.unreadable else ""
    why += f" ({len(read.copies)} exact copies do not count)" if read.copies else ""
    raise TrainingError(
        f"{folder}: {len(read.found)} usable pictures{why}, at least {MIN_PICTURES} are needed",
        hint="take more pictures of good parts; 200 are a good start",
    )


def _refuse_mixed(folder: Path, found: Sequence[audit.Facts]) -> None:
    for name, kinds in (
        ("grey and colour pictures", ["grey" if f.channels == 1 else "colour" for f in found]),
        ("bit depths", [f"{f.depth_bits} bit" for f in found]),
    ):
        counted = Counter(kinds).most_common()
        if len(counted) > 1:
            listed, rare = ", ".join(f"{n} {kind}" for kind, n in counted), counted[-1][0]
            one = pictures.printable(found[kinds.index(rare)].path.name)
            raise TrainingError(
                f"{folder}: mixed {name}: {listed}; {rare} is, for one, {one}", hint="train on pictures of one camera setting"
            )


def _said(read: _Read, whole: pictures.Listing) -> tuple[audit.Remark, ...]:
    """What was left out, then what looks odd."""
    said = [_remark(reason, whole.left_out) for reason in whole.reasons]
    if read.unreadable:
        whys = sorted({why.split(": ", 1)[-1] for _, why in read.unreadable})
        text = f"left out, unreadable ({'; '.join(whys)})"
        said.append(audit.Remark("warning", text, tuple(path for path, _ in read.unreadable)))
    if read.copies:
        text = f"{len(read.copies)} exact copies of others were left out: they add no information"
        said.append(audit.Remark("warning", text, tuple(read.copies)))
    return (*said, *audit.remarks(read.found))


def _remark(reason: str, left_out: Sequence[pictures.LeftOut]) -> audit.Remark:
    """What was left out for one reason."""
    alike = [one for one in left_out if one.reason == reason]
    level: Literal["note", "warning"] = "note" if all(one.harmless for one in alike) else "warning"
    return audit.Remark(level, f"left out, {reason}", tuple(one.path for one in alike))


def cropped(folder: Path, roi: Roi, out: Path, window: preprocess.Window | None) -> None:
    """Write what lies in a region of each picture into `out`, blank beyond a polygon: what follows sees what the recipe does.

    Crops of an interrupted run are kept; unreadable pictures are passed on as they are. Raises PictureError.
    """
    wanted = {out / path.relative_to(folder).parent / f"{path.name}.png": path for path in pictures.listed(folder).taken}
    for stale in set(out.rglob("*.png")) - set(wanted):
        stale.unlink()
    for target, path in wanted.items():
        if target.exists() and target.stat().st_mtime >= path.stat().st_mtime:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            image = pictures.read(path)
        except PictureError:
            target.write_bytes(pictures.content(path))
            continue
        pictures.write(target, cut(image, roi, path, window))


def cut(image: Pixels, roi: Roi, path: Path, window: preprocess.Window | None) -> Pixels:
    """What lies in a region of a picture, blank beyond a polygon. Raises PictureError where the region reaches outside."""
    box = roi.box(*image.shape[:2])
    if box is None:
        size, wanted = f"{image.shape[1]}x{image.shape[0]}", roi.model_dump(exclude_none=True, mode="json")
        raise PictureError(
            f"{pictures.printable(path)}: the region {wanted} reaches outside its {size} px", hint="correct the region"
        )
    x, y, w, h = box
    crop: Pixels = image[y : y + h, x : x + w].copy()
    mask = roi.mask(box)
    if mask is not None:
        low, high = window or (0, int(np.iinfo(crop.dtype).max))
        crop[mask == 0] = low + round((high - low) * preprocess.BLANK / 255)
    return crop


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
