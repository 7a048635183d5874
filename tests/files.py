"""Picture files made by hand, of kinds and with headers that no encoder here writes."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_inspector import pictures
from edge_inspector.frames import Pixels

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def _rgb(image: Pixels) -> NDArray[np.generic]:
    """Colours in the order of files."""
    if image.ndim == 2:
        return image
    order = [2, 1, 0, 3][: image.shape[2]] if image.shape[2] > 2 else [0, 1]
    return image[:, :, order]


def exif(orientation: int) -> bytes:
    return b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 274, 3, 1, orientation, 0, 0)


def with_alpha(image: Pixels) -> Pixels:
    """Half transparent."""
    alpha = np.full(image.shape[:2], np.iinfo(image.dtype).max // 2, image.dtype)
    return np.dstack([image, alpha])


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int, colour: int, bits: int, data: bytes, more: Iterable[tuple[bytes, bytes]] = ()) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    middle = b"".join(chunk(kind, content) for kind, content in more)
    return _SIGNATURE + chunk(b"IHDR", head) + middle + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def png(image: Pixels, more: Iterable[tuple[bytes, bytes]] = ()) -> bytes:
    channels = 1 if image.ndim == 2 else image.shape[2]
    rows = b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in _rgb(image))
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    return png_of(image.shape[1], image.shape[0], colour, image.dtype.itemsize * 8, zlib.compress(rows), more)


def jpeg(image: Pixels, about: bytes = b"", *, several: bool = False) -> bytes:
    """With EXIF data, or saying that other pictures follow."""
    data = pictures.encoded(image, ".jpg")
    marks = [(0xE1, b"Exif\0\0" + about)] if about else []
    marks += [(0xE2, b"MPF\0" + bytes(20))] if several else []
    segments = b"".join(b"\xff" + bytes([mark]) + struct.pack(">H", len(text) + 2) + text for mark, text in marks)
    return data[:2] + segments + data[2:]


def cmyk_jpeg() -> bytes:
    frame = struct.pack(">BHHB", 8, 8, 8, 4) + b"".join(bytes([n, 0x11, 0]) for n in range(1, 5))
    return b"\xff\xd8\xff\xc0" + struct.pack(">H", len(frame) + 2) + frame + b"\xff\xd9"


def webp(image: Pixels, about: bytes) -> bytes:
    done, data = cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, 101])
    assert done
    head = struct.pack("<I", 0x08) + (image.shape[1] - 1).to_bytes(3, "little") + (image.shape[0] - 1).to_bytes(3, "little")
    return _riff(_part(b"VP8X", head) + data.tobytes()[12:] + _part(b"EXIF", about))


def animated_webp(image: Pixels, count: int) -> bytes:
    picture = cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes()[12:]
    size = (image.shape[1] - 1).to_bytes(3, "little") + (image.shape[0] - 1).to_bytes(3, "little")
    frame = _part(b"ANMF", bytes(6) + size + bytes(4) + picture)
    return _riff(_part(b"VP8X", struct.pack("<I", 0x02) + size) + _part(b"ANIM", bytes(6)) + frame * count)


def _part(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def _riff(content: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", len(content) + 4) + b"WEBP" + content


def jp2(image: Pixels) -> bytes:
    """JPEG 2000 without loss."""
    done, data = cv2.imencode(".jp2", image, [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000])
    assert done
    return data.tobytes()


def bmp(image: Pixels, *, top_down: bool = False, bits: int = 24) -> bytes:
    colour = image if image.ndim == 3 else np.dstack([image] * 3)
    rows = [row.tobytes() + bytes(-len(row.tobytes()) % 4) for row in colour]
    data = b"".join(rows if top_down else rows[::-1])
    height = -image.shape[0] if top_down else image.shape[0]
    if image.ndim == 2:
        return _grey_bmp(image, height)
    head = struct.pack("<IiiHHIIiiII", 40, image.shape[1], height, 1, bits, 0, len(data), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(data), 0, 0, 54) + head + data


def _grey_bmp(image: Pixels, height: int) -> bytes:
    palette = b"".join(bytes([n, n, n, 0]) for n in range(256))
    rows = [row.tobytes() + bytes(-len(row) % 4) for row in (image if height < 0 else image[::-1])]
    head = struct.pack("<IiiHHIIiiII", 40, image.shape[1], height, 1, 8, 0, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024) + head + palette + b"".join(rows)


def tiff(
    image: Pixels, tags: Mapping[int, int | bytes] | None = None, *, order: Literal["<", ">"] = "<", deflate: bool = False, pages: int = 1,
    later: Mapping[int, int | bytes] | None = None,
) -> bytes:  # fmt: skip
    """One strip for each page; `tags` go before what the picture says, `later` counts from the second page on."""
    made = bytearray(b"II*\0\0\0\0\0" if order == "<" else b"MM\0*\0\0\0\0")
    pointer = 4
    for page in range(pages):
        data = _rgb(image).astype(image.dtype.newbyteorder(order)).tobytes()
        data = zlib.compress(data) if deflate else data
        more = dict(tags or {}) if page == 0 else dict(later or {})
        at = len(made)
        made += data + bytes(len(data) % 2)
        entries = {**_entries(image, at, len(data), deflate=deflate), **more}
        start = len(made)
        struct.pack_into(order + "I", made, pointer, start)
        made += _directory(entries, order, start)
        pointer = len(made) - 4 - _extra(entries)
    return bytes(made)


def _entries(image: Pixels, at: int, length: int, *, deflate: bool) -> dict[int, int | bytes]:
    channels = 1 if image.ndim == 2 else image.shape[2]
    bits: int | bytes = image.dtype.itemsize * 8
    if channels > 1:
        bits = struct.pack(f"<{channels}H", *[image.dtype.itemsize * 8] * channels)
    entries: dict[int, int | bytes] = {
        256: image.shape[1], 257: image.shape[0], 258: bits, 259: 8 if deflate else 1, 262: 1 if channels == 1 else 2, 273: at,
        277: channels, 278: image.shape[0], 279: length,
    }  # fmt: skip
    return {**entries, **({338: 2} if channels == 4 else {})}


def _extra(entries: Mapping[int, int | bytes]) -> int:
    return sum(len(value) for value in entries.values() if isinstance(value, bytes))


def _directory(entries: Mapping[int, int | bytes], order: str, start: int) -> bytes:
    """Numbers as LONG, bytes as SHORTs behind the directory."""
    behind = start + 2 + 12 * len(entries) + 4
    rows, extra = b"", b""
    for tag, value in sorted(entries.items()):
        if isinstance(value, bytes):
            shorts = struct.unpack(f"<{len(value) // 2}H", value)
            rows += struct.pack(order + "HHII", tag, 3, len(shorts), behind + len(extra))
            extra += struct.pack(f"{order}{len(shorts)}H", *shorts)
        else:
            rows += struct.pack(order + "HHII", tag, 4, 1, value)
    return struct.pack(order + "H", len(entries)) + rows + bytes(4) + extra


_NOBODY = "import os; os.setgroups([]); os.setresgid(*[65534] * 3); os.setresuid(*[65534] * 3)"


def as_nobody(folder: Path, imports: str, code: str) -> str:
    """What a program prints that has no rights beyond those of everybody. `imports`: what needs more, to be loaded."""
    parts = [imports, code]
    if os.geteuid() == 0:
        for path in (folder, *folder.parents):
            if path.stat().st_uid == 0 and not path.stat().st_mode & 1 and path != Path("/"):
                path.chmod(path.stat().st_mode | 0o55)
        parts.insert(1, _NOBODY)
    done = subprocess.run([sys.executable, "-c", "; ".join(parts)], capture_output=True, text=True, check=False, timeout=60)
    assert not done.returncode, done.stderr
    return done.stdout
