"""BUNDLE.teach: what training leaves beside a bundle, so that it can be taught without the pictures and without training anew.

Plain arrays of features and maps, and about.json. The bundle's manifest holds its digest; it never goes to a device.
"""

from __future__ import annotations

import hashlib
import io
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_inspector.errors import TrainingError
from edge_inspector.schema import Field, Model, read_json, validate
from edge_inspector.training.normals import Floats

MOST_BYTES = 400_000_000
"""Of backbone outputs of good parts that are kept, evenly; of drawn defects a quarter of it."""
_ABOUT, _MOST_ABOUT = "about.json", 4 << 20
_PARTS = ("maps", "judged", "fold", "picture")
_GROUPS = ("good", "drawn", "taught")
_COPY = 1e-5
"""Features of a copy differ by less, as a share of their square."""


@dataclass(frozen=True)
class Tiles:
    """Tiles of pictures, in the pictures' order."""

    taps: tuple[NDArray[np.float16], ...]
    """The backbone's maps, the finest first, [n, C, h, w] each."""
    maps: Floats
    """[n, T, h, w]: the terms' smoothed maps, by networks that were fitted without the tile's fold."""
    judged: NDArray[np.bool_]
    """[n, h, w]"""
    fold: NDArray[np.intp]
    """[n]; -1 for defects that people have shown."""
    picture: NDArray[np.intp]
    """[n], numbers from 0 without a gap."""

    def __len__(self) -> int:
        return len(self.picture)

    @property
    def pictures(self) -> int:
        """How many pictures these are tiles of."""
        return int(self.picture.max()) + 1 if len(self) else 0

    def scores(self, maps: Floats) -> NDArray[np.float64]:
        """Score of each picture by maps [..., n, h, w], which count where judged: [..., pictures]."""
        each = np.where(self.judged, maps, 0).max((-2, -1)).clip(min=0)
        found = np.zeros((*each.shape[:-1], self.pictures))
        for tile, picture in enumerate(self.picture):
            found[..., picture] = np.maximum(found[..., picture], each[..., tile])
        return found

    def with_maps(self, maps: Floats) -> Tiles:
        """The same with other maps."""
        return replace(self, maps=maps)

    def thinned(self, most_bytes: int) -> tuple[Tiles, NDArray[np.intp]]:
        """As many of the pictures as take so many bytes, evenly, and their numbers."""
        each = sum(tap.nbytes for tap in self.taps) / max(1, len(self))
        share = min(1.0, most_bytes / max(1.0, each * len(self)))
        kept = np.unique(np.linspace(0, self.pictures - 1, max(1, int(share * self.pictures))).round().astype(np.intp))
        rows = np.isin(self.picture, kept)
        number = np.full(self.pictures, -1)
        number[kept] = np.arange(len(kept))
        some = self.some(np.flatnonzero(rows))
        return replace(some, picture=number[some.picture]), kept

    def some(self, rows: NDArray[np.intp]) -> Tiles:
        """Chosen tiles; numbers of pictures stay."""
        return Tiles(tuple(tap[rows] for tap in self.taps), *(part[rows] for part in self.parts))

    def copies(self, other: Tiles) -> list[tuple[int, int]]:
        """Numbers of pictures that are here and in the other, as (here, there)."""
        if not (len(self) and len(other)):
            return []
        a, b = (tiles.taps[-1][:, :, ::2, ::2].reshape(len(tiles), -1).astype(np.float32) for tiles in (self, other))
        apart = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
        alike = apart < _COPY * (b**2).sum(1)
        found = []
        for picture in range(self.pictures):
            rows = alike[self.picture == picture]  # an empty corner may look like another's: every tile must be there
            matched = set.intersection(*(set(other.picture[row].tolist()) for row in rows))
            found += [(picture, there) for there in sorted(matched)]
        return found

    def and_(self, other: Tiles) -> Tiles:
        """These, then others."""
        other = replace(other, picture=other.picture + self.pictures)
        taps = tuple(np.concatenate(both) for both in zip(self.taps, other.taps, strict=True))
        return Tiles(taps, *(np.concatenate(both) for both in zip(self.parts, other.parts, strict=True)))

    @property
    def parts(self) -> list[Any]:
        """Everything but the taps, in the order of _PARTS."""
        return [getattr(self, name) for name in _PARTS]

    def none(self) -> Tiles:
        """No tile of this kind."""
        return self.some(np.array([], np.intp))


class About(Model):
    """What the arrays do not say."""

    terms: tuple[str, ...]
    weights: tuple[float, ...]
    folds: int
    good: tuple[str, ...] = Field(description="names of the pictures")
    taught: tuple[str, ...] = ()


@dataclass(frozen=True)
class Material:
    """Good parts, defects drawn into some of them, and defects that people have shown."""

    about: About
    good: Tiles
    drawn: Tiles
    taught: Tiles

    def bounded(self) -> Material:
        """As much of it as may be kept."""
        good, kept = self.good.thinned(MOST_BYTES)
        drawn, _ = self.drawn.thinned(MOST_BYTES // 4)
        names = tuple(self.about.good[number] for number in kept)
        return Material(self.about.model_copy(update={"good": names}), good, drawn, self.taught)

    def write(self, folder: Path) -> str:
        """Write it into a new folder; returns its digest."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for group in _GROUPS:
            tiles: Tiles = getattr(self, group)
            for name, part in (
                *((f"tap{number}", tap) for number, tap in enumerate(tiles.taps)),
                *zip(_PARTS, tiles.parts, strict=True),
            ):
                np.save(folder / f"{group}-{name}.npy", part)
        (folder / _ABOUT).write_text(self.about.model_dump_json() + "\n")
        return _digest({path.name: path.read_bytes() for path in sorted(folder.iterdir())})


def beside(bundle: Path) -> Path:
    """Where a bundle's material lies."""
    return bundle.with_name(bundle.name + ".teach")


def opened(bundle: Path, digest: str | None) -> Material:
    """The material of a bundle; digest: as its manifest has it. Raises TrainingError."""
    folder = beside(bundle)
    if digest is None:
        raise TrainingError(
            f"{bundle}: was not made to be taught", hint="train it again with this release, and with feature-anogan"
        )
    if not folder.is_dir():
        raise TrainingError(
            f"{folder}: missing; a bundle is taught from what training left beside it",
            hint="teach on the machine that trained it, or copy that folder from there; else train again",
        )
    try:
        read = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}  # what is hashed is what is used
        if _digest(read) != digest:
            raise TrainingError(f"{folder}: is not what was left beside this bundle", hint="copy the folder again, whole")
        about = validate(About, read_json(read[_ABOUT], str(folder / _ABOUT), _MOST_ABOUT), str(folder / _ABOUT))
        groups = [_tiles(read, group) for group in _GROUPS]
    except (OSError, ValueError) as error:
        raise TrainingError(f"{folder}: cannot be read: {error}", hint="copy the folder again, whole") from error
    return Material(about, *groups)


def _tiles(read: dict[str, bytes], group: str) -> Tiles:
    count = sum(name.startswith(f"{group}-tap") for name in read)
    taps = [read.pop(f"{group}-tap{number}.npy") for number in range(count)]
    return Tiles(tuple(_array(tap) for tap in taps), *(_array(read.pop(f"{group}-{part}.npy")) for part in _PARTS))


def _array(data: bytes) -> Any:
    return np.load(io.BytesIO(data), allow_pickle=False)


def _digest(read: dict[str, bytes]) -> str:
    """Over names and contents of its files, in the order of names."""
    whole = hashlib.sha256()
    for name, data in read.items():
        whole.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
    return whole.hexdigest()
