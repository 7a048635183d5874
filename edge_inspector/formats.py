"""What the header of a picture file says: its kind, size, channels and depth, and what a decoder might obey or not.

Decoders obey some headers in some cases only. So everything that changes the meaning of the numbers is read here, by one rule
for every kind of file: it is obeyed by `pictures.decode`, or the file is refused. Sources: JPEG (ITU-T T.81), PNG (W3C, third
edition), TIFF 6.0 and BigTIFF, BMP (Windows GDI), WebP (RFC 9649), PNM (netpbm), JPEG 2000 (ISO/IEC 15444-1, annexes A and I).
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from edge_inspector import tiff
from edge_inspector.errors import PictureError

MAX_PIXELS, MAX_SIDE_PX = 1 << 30, 1 << 20
"""What OpenCV reads at most."""
SIGNATURE_BYTES = 16
"""Bytes at the start of a file that tell its kind."""
COPY_AGAIN = "copy or export it again, or take it again"
_PNG, _JPEG_2000, _CODESTREAM = b"\x89PNG\r\n\x1a\n", b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"
_FOREIGN = (
    ("GIF", re.compile(rb"GIF8")), ("HEIF or AVIF", re.compile(rb".{4}ftyp(hei|hev|mif1|msf1|avi)", re.DOTALL)),
    ("OpenEXR", re.compile(rb"v/1\x01")), ("Radiance HDR", re.compile(rb"#\?R")), ("Photoshop", re.compile(rb"8BPS")),
    ("PFM", re.compile(rb"P[Ff]\s")), ("PAM", re.compile(rb"P7\s")), ("JPEG XL", re.compile(rb"\xff\x0a|\0{3}\x0cJXL ")),
)  # fmt: skip
"""Pictures that other programs read: known here to be refused by their name."""


@dataclass(frozen=True)
class Header:
    """What a decoder has to deliver, and what is to be done with it."""

    kind: str
    width_px: int
    height_px: int
    """As stored: before it is turned."""
    channels: int
    """1 or 3; alpha does not count."""
    depth_bits: int
    data: bytes
    """The file without what decoders obey in some cases only."""
    orientation: int = 1
    """EXIF: 1 as it is, 2 to 8 to be turned or mirrored."""
    inverted: bool = False
    """The smallest number is white."""


def sniffed(start: bytes) -> str:
    """The kind of picture that a file with these first bytes is, also of kinds that are refused; empty for none."""
    for kind, signature, _ in _KINDS:
        if signature.match(start):
            return kind
    return next((kind for kind, signature in _FOREIGN if signature.match(start)), "")


def is_lossy(data: bytes) -> bool:
    """Whether the numbers of this picture are about those that were saved."""
    return sniffed(data[:SIGNATURE_BYTES]) in ("JPEG", "WebP", "JPEG 2000")


def header(data: bytes) -> Header:
    """Read the header of a picture file. Raises PictureError, without the file's name, for what cannot be read as it is."""
    if not data:
        raise PictureError("empty file", hint=COPY_AGAIN)
    reader = next((reader for _, signature, reader in _KINDS if signature.match(data)), None)
    if reader is None:
        kind = sniffed(data[:SIGNATURE_BYTES])
        what = f"{kind} files are not read" if kind else "not a picture: it starts as none of the kinds that are read"
        raise PictureError(what, hint=f"export it as one of: {', '.join(kind for kind, _, _ in _KINDS)}")
    try:
        found = reader(data)
    except (struct.error, IndexError, ValueError) as error:
        raise PictureError("truncated, or its header is damaged", hint=COPY_AGAIN) from error
    _refuse_size(found.width_px, found.height_px)
    return found


def _refuse_size(width: int, height: int) -> None:
    if min(width, height) < 1:
        raise PictureError(f"its header says {width}x{height} px", hint=COPY_AGAIN)
    if width * height > MAX_PIXELS:
        found, most = f"{width * height / 1e6:.0f} megapixels ({width}x{height})", f"{MAX_PIXELS / 1e6:.0f}"
        raise PictureError(f"{found}, at most {most} can be read", hint="cut it into several pictures")
    if max(width, height) > MAX_SIDE_PX:
        raise PictureError(
            f"{width}x{height} px, at most {MAX_SIDE_PX} px on a side can be read", hint="cut it into several pictures"
        )


def _refuse_several(count: int) -> None:
    """One file is one part: of several pictures in it only the first would be judged."""
    if count != 1:
        raise PictureError(f"holds {count} pictures, expected 1", hint="save each picture as a file of its own")


def _unreadable(what: str, hint: str) -> PictureError:
    return PictureError(what, hint=hint)


def _turned(exif: bytes) -> int:
    """The orientation that EXIF data says; 1 where it says none, as viewers take it."""
    try:
        return tiff.orientation(exif.removeprefix(b"Exif\0\0"))
    except (struct.error, IndexError, ValueError):
        return 1


# --- JPEG

_JPEG = re.compile(rb"\xff\xd8\xff")
_AFTER_DATA = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")
_SIZES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""Start-of-frame markers."""


def _jpeg(data: bytes) -> Header:
    orientation, announced = 1, False
    segments = list(_segments(data))
    for marker, segment, _ in segments:
        if marker == 0xE1 and segment.startswith(b"Exif\0\0"):
            orientation = _turned(segment)
        elif marker == 0xE2 and segment.startswith(b"MPF\0"):  # phones append previews and depth maps, and say so
            announced = True
    marker, frame = _frame(segments)
    bits, height, width, components = struct.unpack_from(">BHHB", frame)
    if bits != 8:
        raise _unreadable(f"JPEG of {bits} bit, expected 8", "export it as PNG or TIFF of 16 bit")
    if components not in (1, 3):
        raise _unreadable(f"JPEG of {components} components (CMYK), expected grey or colour", "export it as RGB")
    _refuse_unfinished(frame, [segment for kind, segment, _ in segments if kind == 0xDA], progressive=marker == 0xC2)
    more = [_frame(found)[1][1:5] for found in _more_jpegs(data, segments[-1][2])]
    _refuse_several(1 + sum(1 for size in more if size == frame[1:5] or not announced))
    return Header("JPEG", width, height, components, 8, data, orientation)


def _frame(segments: list[tuple[int, bytes, int]]) -> tuple[int, bytes]:
    """Marker and content of the start of frame, which says size and components."""
    return next(((marker, segment) for marker, segment, _ in segments if marker in _SIZES), (0, b""))


def _refuse_unfinished(frame: bytes, scans: list[bytes], *, progressive: bool) -> None:
    """Raise PictureError where whole scans are missing: libjpeg shows what is there, and warns of nothing."""
    missing = {(component, number) for component in frame[6::3] for number in range(64)}
    for scan in scans:
        count = scan[0]
        first, last, bits = scan[1 + 2 * count : 4 + 2 * count] if progressive else (0, 63, 0)
        if not bits & 15:  # the last of its bits as well
            missing -= {(component, number) for component in scan[1 : 1 + 2 * count : 2] for number in range(first, last + 1)}
    if missing:
        raise PictureError("truncated: some of the JPEG's scans are missing", hint=COPY_AGAIN)


def _segments(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Marker, content and end of each segment up to the end marker. Raises PictureError where there is none."""
    at = 2
    while True:
        found = _AFTER_DATA.search(data, at)
        if found is None:
            raise PictureError("truncated: the JPEG has no end marker", hint=COPY_AGAIN)
        marker, at = data[found.end() - 1], found.end()
        if marker == 0xD9:
            yield marker, b"", at
            return
        if marker in (0x01, 0xD8):  # these have no length
            continue
        size = int.from_bytes(data[at : at + 2], "big")
        yield marker, data[at + 2 : at + size], at + size
        at += max(2, size)


def _more_jpegs(data: bytes, end: int) -> Iterator[list[tuple[int, bytes, int]]]:
    """JPEGs that follow the first one at once; bytes of any other kind after it are no picture."""
    while _JPEG.match(data, end):
        try:
            segments = list(_segments(data[end:]))
        except PictureError:
            yield []
            return
        yield segments
        end += segments[-1][2]


# --- PNG

_CRITICAL = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}


def _png(data: bytes) -> Header:
    """Profiles, transparency and times are taken out: numbers are read as they are stored."""
    kept, orientation, pictures = [_PNG], 1, 1
    chunks = list(_png_chunks(data))
    for kind, content, _ in chunks:
        if kind in _CRITICAL:
            kept.append(
                struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(content, zlib.crc32(kind)))
            )
        elif kind == b"eXIf":
            orientation = _turned(content)
        elif kind == b"acTL":
            pictures = int.from_bytes(content[:4], "big")
    _refuse_several(max(1, pictures) + (1 if data.startswith(_PNG, chunks[-1][2]) else 0))
    width, height, bits, colour = struct.unpack_from(">IIBB", data, 16)
    return Header("PNG", width, height, 1 if colour in (0, 4) else 3, max(8, bits), b"".join(kept), orientation)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes, int]]:
    """Type, content and end of each chunk. Raises PictureError for a damaged one, or where the end is missing."""
    at, kind = len(_PNG), b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        content, (crc,) = data[at + 8 : at + 8 + length], struct.unpack_from(">I", data, at + 8 + length)
        if zlib.crc32(content, zlib.crc32(kind)) != crc:
            raise PictureError(f"damaged: the check sum of its {kind.decode('latin-1')!r} data is wrong", hint=COPY_AGAIN)
        at += 12 + length
        yield kind, content, at


# --- BMP


def _bmp(data: bytes) -> Header:
    """Uncompressed with 1, 4, 8, 24 or 32 bits a pixel; other masks and run lengths are read differently by programs."""
    offset, size = struct.unpack_from("<II", data, 10)
    if size < 40:
        raise _unreadable("BMP of OS/2's old kind", "export it as PNG")
    width, height, _, bits, packing = struct.unpack_from("<iiHHI", data, 18)
    masks = struct.unpack_from("<III", data, 54) if packing in (3, 6) else (0xFF0000, 0xFF00, 0xFF)
    if packing not in (0, 3, 6) or bits not in (1, 4, 8, 24, 32) or masks != (0xFF0000, 0xFF00, 0xFF):
        raise _unreadable(f"BMP of {bits} bits a pixel, packed by method {packing}", "export it as PNG, or as BMP of 24 bit")
    missing = offset + (width * bits + 31) // 32 * 4 * abs(height) - len(data)
    if missing > 0:
        raise PictureError(f"truncated: {missing} bytes are missing", hint=COPY_AGAIN)
    colours = _bmp_palette(data, 14 + size, bits) if bits <= 8 else []
    grey = bits <= 8 and all(blue == green == red for blue, green, red in colours)
    return Header("BMP", width, abs(height), 1 if grey else 3, 8, data)


def _bmp_palette(data: bytes, start: int, bits: int) -> list[tuple[int, int, int]]:
    used = struct.unpack_from("<I", data, 46)[0] or 1 << bits
    return [struct.unpack_from("<BBB", data, start + 4 * number) for number in range(min(used, 256))]


# --- WebP


def _webp(data: bytes) -> Header:
    length = struct.unpack_from("<I", data, 4)[0] + 8
    if len(data) < length:
        raise PictureError(f"truncated: {len(data)} of {length} bytes are there", hint=COPY_AGAIN)
    orientation, pictures, size = 1, 0, (0, 0)
    at = 12
    while at + 8 <= length:
        kind, count = struct.unpack_from("<4sI", data, at)
        content = data[at + 8 : at + 8 + count]
        if kind == b"EXIF":
            orientation = _turned(content)
        elif kind in (b"VP8 ", b"VP8L"):
            pictures, size = pictures + 1, _webp_size(kind, content)
        elif kind == b"ANMF":
            pictures += 1
        at += 8 + count + count % 2
    _refuse_several(pictures)
    return Header("WebP", *size, 3, 8, data, orientation)


def _webp_size(kind: bytes, content: bytes) -> tuple[int, int]:
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", content, 1)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", content, 6)
    return width & 0x3FFF, height & 0x3FFF


# --- TIFF


def _tiff(data: bytes) -> Header:
    found = tiff.read(data)
    _refuse_several(found.pictures)
    return Header(
        "TIFF", found.width_px, found.height_px, found.channels, found.depth_bits, found.data, found.orientation, found.inverted
    )


# --- PNM

_PNM = re.compile(rb"P[56]")
_PNM_HEADER = re.compile(rb"P([56])" + rb"(?:\s|#[^\n]*\n)+(\d{1,10})" * 3 + rb"\s")
_LEVELS = {255, *((1 << bits) - 1 for bits in range(10, 17))}


def _pnm(data: bytes) -> Header:
    """Binary grey and colour. Numbers of 10 to 16 bit are read as they are stored, as those of cameras in 16-bit PNGs are."""
    found = _PNM_HEADER.match(data)
    if found is None:
        raise PictureError("its header is damaged", hint=COPY_AGAIN)
    width, height, most = (int(text) for text in found.groups()[1:])
    if most not in _LEVELS:
        raise _unreadable(f"PNM whose white is {most}, expected 255, or that of 10 to 16 bit", "export it as PNG")
    channels, depth = (1 if found[1] == b"5" else 3), (8 if most == 255 else 16)
    rest = len(data) - found.end() - width * height * channels * depth // 8
    if rest < 0:
        raise PictureError(f"truncated: {-rest} bytes are missing", hint=COPY_AGAIN)
    _refuse_several(2 if rest and _PNM.match(data, len(data) - rest) else 1)
    return Header("PNM", width, height, channels, depth, data)


# --- JPEG 2000

_SRGB, _GREY = 16, 17


def _jpeg_2000(data: bytes) -> Header:
    start = data.find(_CODESTREAM)
    if start < 0:
        raise PictureError("truncated: it holds no codestream", hint=COPY_AGAIN)
    right, bottom, left, top = struct.unpack_from(">IIII", data, start + 8)
    count = struct.unpack_from(">H", data, start + 40)[0]
    parts = {struct.unpack_from(">BBB", data, start + 42 + 3 * number) for number in range(count)}
    colour = data.find(b"colr\x01\0\0", 0, start)
    space = struct.unpack_from(">I", data, colour + 7)[0] if colour >= 0 else 0
    if count not in (1, 3) or len(parts) != 1 or space not in (0, _SRGB, _GREY):
        raise _unreadable(f"JPEG 2000 of {count} components that are not grey or RGB of one size", "export it as PNG")
    bits, *steps = parts.pop()
    if bits not in (7, 15) or steps != [1, 1]:
        raise _unreadable("JPEG 2000 whose numbers are not whole ones of 8 or 16 bit", "export it as PNG of 8 or 16 bit")
    _refuse_open_end(data, start)
    return Header("JPEG 2000", right - left, bottom - top, count, bits + 1, data)


def _refuse_open_end(data: bytes, start: int) -> None:
    """The lengths of the tiles' parts must lead to the end marker: decoders fill in what is missing."""
    at = start + 2
    while data[at : at + 2] != b"\xff\x90":
        at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    while data[at : at + 2] == b"\xff\x90":
        length = struct.unpack_from(">I", data, at + 6)[0]
        at = at + length if length else len(data) - 2
    if data[at : at + 2] != b"\xff\xd9":
        raise PictureError("damaged: its parts are shorter or longer than they say", hint=COPY_AGAIN)


_KINDS: tuple[tuple[str, re.Pattern[bytes], Callable[[bytes], Header]], ...] = (
    ("PNG", re.compile(re.escape(_PNG)), _png),
    ("JPEG", _JPEG, _jpeg),
    ("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]"), _tiff),
    ("BMP", re.compile(rb"BM.{4}\0{4}", re.DOTALL), _bmp),
    ("WebP", re.compile(rb"RIFF.{4}WEBP", re.DOTALL), _webp),
    ("PNM", re.compile(rb"P[56][\s#]"), _pnm),
    ("JPEG 2000", re.compile(re.escape(_JPEG_2000) + b"|" + re.escape(_CODESTREAM)), _jpeg_2000),
)
