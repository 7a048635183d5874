"""The header of a TIFF or BigTIFF file: what is obeyed by one rule, and what is refused. EXIF data is a TIFF, too."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from edge_inspector import packings
from edge_inspector.errors import PictureError

_SUBFILE, _WIDTH, _HEIGHT, _BITS, _PACKING, _PHOTOMETRIC, _FILL = 254, 256, 257, 258, 259, 262, 266
_OFFSETS, _ORIENTATION, _SAMPLES, _COUNTS, _PLANAR = 273, 274, 277, 279, 284
_ROWS, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_COUNTS, _EXTRA, _FORMAT = 278, 322, 323, 324, 325, 338, 339
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 6: 1, 7: 1, 8: 2, 9: 4, 13: 4, 16: 8, 18: 8}
_LETTERS = {1: "B", 2: "B", 3: "H", 4: "I", 6: "b", 7: "B", 8: "h", 9: "i", 13: "I", 16: "Q", 18: "Q"}
_PACKINGS = {1: "none", 5: "LZW", 8: "Deflate", 32946: "Deflate", 32773: "PackBits"}
_UNPACKED = {"LZW": packings.lzw, "Deflate": packings.deflated, "PackBits": packings.packed_bits}
"""How many bytes a piece unpacks to."""
_MAX_PICTURES = 10_000
_REDUCED, _MASK = 1, 4
_NOT_A_PICTURE = _REDUCED | _MASK
"""Bits of a picture that belongs to another: its thumbnail, its mask."""
_COPY_AGAIN = "copy it again"
_HINT = "export it as PNG, or as TIFF of grey or RGB, 8 or 16 bit"


@dataclass(frozen=True)
class Tiff:
    """What the header says; `data` is the file as libtiff is to read it: not turned, not inverted, alpha as stored."""

    width_px: int
    height_px: int
    channels: int
    depth_bits: int
    orientation: int
    inverted: bool
    pictures: int
    data: bytes


@dataclass(frozen=True)
class _Entry:
    """One tag of a directory."""

    kind: int
    count: int
    at: int
    """Where its values lie."""


class _Reader:
    """Directories and values of one file."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.order = "<" if data[:2] == b"II" else ">"
        self.big = self.unpack("H", 2)[0] == 43
        self.first = self.unpack("Q", 8)[0] if self.big else self.unpack("I", 4)[0]

    def unpack(self, letters: str, at: int) -> tuple[int, ...]:
        return struct.unpack_from(self.order + letters, self.data, at)

    def directories(self) -> Iterator[dict[int, _Entry]]:
        """Each directory of the chain. Raises ValueError for one that does not end."""
        at, seen = self.first, set[int]()
        while at:
            if at in seen or len(seen) >= _MAX_PICTURES:
                raise ValueError("the directories go in a circle")
            seen.add(at)
            entries, at = self._directory(at)
            yield entries

    def _directory(self, at: int) -> tuple[dict[int, _Entry], int]:
        count = self.unpack("Q" if self.big else "H", at)[0]
        at += 8 if self.big else 2
        size = 20 if self.big else 12
        if at + count * size > len(self.data):
            raise ValueError("a directory reaches beyond the file")
        found = dict(self._entry(at + size * number) for number in range(count))
        return found, self.unpack("Q" if self.big else "I", at + size * count)[0]

    def _entry(self, at: int) -> tuple[int, _Entry]:
        tag, kind, count = self.unpack("HHQ" if self.big else "HHI", at)
        field, room = (at + 12, 8) if self.big else (at + 8, 4)
        if _SIZES.get(kind, 1) * count > room:
            field = self.unpack("Q" if self.big else "I", field)[0]
        return tag, _Entry(kind, count, field)

    def values(self, entries: dict[int, _Entry], tag: int, default: int) -> tuple[int, ...]:
        """The numbers of a tag, or its default."""
        entry = entries.get(tag)
        if entry is None or entry.kind not in _LETTERS:
            return (default,)
        if entry.count * _SIZES[entry.kind] > len(self.data):
            raise ValueError("a tag reaches beyond the file")
        return self.unpack(f"{entry.count}{_LETTERS[entry.kind]}", entry.at)

    def value(self, entries: dict[int, _Entry], tag: int, default: int) -> int:
        """The first number of a tag, or its default."""
        return (self.values(entries, tag, default) or (default,))[0]


def orientation(exif: bytes) -> int:
    """The orientation in EXIF data, 1 to 8. Raises struct.error or ValueError where it is none."""
    reader = _Reader(exif)
    found = reader.value(next(reader.directories(), {}), _ORIENTATION, 1)
    return found if 1 <= found <= 8 else 1


def read(data: bytes) -> Tiff:
    """Read the header. Raises PictureError for what is not read; struct.error and ValueError where it is damaged."""
    reader = _Reader(data)
    pages = list(reader.directories())
    if not pages:
        raise ValueError("no directory")
    page = pages[0]
    if reader.value(page, _SUBFILE, 0) & _NOT_A_PICTURE:
        raise PictureError("its first picture is a preview of another one (a raw file of a camera?)", hint=_HINT)
    own = sum(not reader.value(entries, _SUBFILE, 0) & _NOT_A_PICTURE for entries in pages)
    channels, depth = _layout(reader, page)
    _whole(reader, page, reader.value(page, _SAMPLES, 1) * depth // 8)
    turned = reader.value(page, _ORIENTATION, 1)
    inverted = channels == 1 and reader.value(page, _PHOTOMETRIC, 1) == 0
    return Tiff(
        reader.value(page, _WIDTH, 0), reader.value(page, _HEIGHT, 0), channels, depth,
        turned if 1 <= turned <= 8 else 1, inverted, own, _plain(reader, page),
    )  # fmt: skip


def _layout(reader: _Reader, page: dict[int, _Entry]) -> tuple[int, int]:
    """Channels without alpha, and depth. Raises PictureError for a layout that programs read differently."""
    samples, photometric = reader.value(page, _SAMPLES, 1), reader.value(page, _PHOTOMETRIC, -1)
    bits = set(reader.values(page, _BITS, 1))
    packing, fill = reader.value(page, _PACKING, 1), reader.value(page, _FILL, 1)
    if packing not in _PACKINGS:
        raise PictureError(
            f"TIFF packed by method {packing}, expected {', '.join(dict.fromkeys(_PACKINGS.values()))}", hint=_HINT
        )
    if set(reader.values(page, _FORMAT, 1)) != {1}:
        raise PictureError("TIFF of signed or floating numbers, expected whole ones from 0", hint=_HINT)
    if bits not in ({8}, {16}) or fill != 1:
        found = ", ".join(str(number) for number in sorted(bits))
        raise PictureError(f"TIFF of {found} bit, expected 8 or 16", hint=_HINT)
    if (photometric, samples) not in ((0, 1), (1, 1), (2, 3), (2, 4)):
        raise PictureError(f"TIFF of colour kind {photometric} with {samples} samples, expected grey or RGB", hint=_HINT)
    if samples > 1 and reader.value(page, _PLANAR, 1) != 1:
        raise PictureError("TIFF whose colours lie in planes of their own, expected side by side", hint=_HINT)
    return min(samples, 3), bits.pop()


def _whole(reader: _Reader, page: dict[int, _Entry], pixel_bytes: int) -> None:
    """Raise PictureError where data is missing or damaged: libtiff leaves such rows black and delivers the picture."""
    tiled = _TILE_OFFSETS in page
    offsets = reader.values(page, _TILE_OFFSETS if tiled else _OFFSETS, 0)
    counts = reader.values(page, _TILE_COUNTS if tiled else _COUNTS, 0)
    pieces = [reader.data[at : at + count] for at, count in zip(offsets, counts, strict=True)]
    if sum(map(len, pieces)) < sum(counts):
        raise PictureError("truncated: its data reaches beyond the file", hint=_COPY_AGAIN)
    width, height = reader.value(page, _WIDTH, 0), reader.value(page, _HEIGHT, 0)
    packing = _PACKINGS[reader.value(page, _PACKING, 1)]
    if packing == "none":
        expected = width * height * pixel_bytes
        if sum(counts) < expected:
            raise PictureError(f"truncated: {sum(counts)} of {expected} bytes are there", hint=_COPY_AGAIN)
        return
    across, rows = width, max(1, min(reader.value(page, _ROWS, height), height))
    if tiled:
        across, rows = max(1, reader.value(page, _TILE_WIDTH, 0)), max(1, reader.value(page, _TILE_HEIGHT, 0))
    count = -(-height // rows) * (-(-width // across) if tiled else 1)
    if len(pieces) < count:
        raise PictureError(f"truncated: {len(pieces)} of its {count} pieces are there", hint=_COPY_AGAIN)
    for number, piece in enumerate(pieces[:count]):
        there = rows if tiled else min(rows, height - number * rows)
        _refuse_damaged(piece, packing, there * across * pixel_bytes, rows * across * pixel_bytes)


def _refuse_damaged(piece: bytes, packing: str, least: int, most: int) -> None:
    """Raise PictureError for a piece that does not unpack to that many bytes; what has a check sum may hold more."""
    try:
        found = _UNPACKED[packing](piece)
    except ValueError as error:
        raise PictureError(f"damaged: {error}", hint=_COPY_AGAIN) from error
    if found < least or (found > most and packing != "Deflate"):
        raise PictureError(f"damaged: {found} bytes are packed where {least} are expected", hint=_COPY_AGAIN)


def _plain(reader: _Reader, page: dict[int, _Entry]) -> bytes:
    """The file with a header that every version of every decoder takes alike: what it says is done by us."""
    changed = bytearray(reader.data)
    grey = reader.value(page, _SAMPLES, 1) == 1
    for tag, value in ((_ORIENTATION, 1), (_PHOTOMETRIC, 1 if grey else 2), (_EXTRA, 0)):
        entry = page.get(tag)
        if entry is not None and entry.kind in (1, 3, 4):
            struct.pack_into(reader.order + _LETTERS[entry.kind], changed, entry.at, value)
    return bytes(changed)
