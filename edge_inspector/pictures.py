"""Picture files: read, write, and the picture that explains a finding (seen, anomaly map, expected)."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from edge_inspector import formats
from edge_inspector.errors import PictureError
from edge_inspector.folders import LeftOut, Listing, is_picture, listed, listing, part_names, printable
from edge_inspector.frames import Pixels
from edge_inspector.results import Region

__all__ = [
    "LeftOut",
    "Listing",
    "content",
    "decode",
    "encoded",
    "explanation",
    "is_picture",
    "listed",
    "listing",
    "part_names",
    "printable",
    "read",
    "to_bgr8",
    "write",
    "write_encoded",
]

_PANEL_PX = 384
"""The longer side of each panel of an explanation; above it a bar with its name, at the top lines of text."""
_BAR_PX = 26
_LINE_PX = 22
_FONT, _TEXT = cv2.FONT_HERSHEY_SIMPLEX, 0.5
_JPEG = [cv2.IMWRITE_JPEG_QUALITY, 92]
"""With half the colour resolution: full resolution takes twice the time for each part that fails."""
_BOX_PX = 2
"""How wide a box is drawn: at half the colour resolution a narrower red line turns grey."""


def decode(data: bytes, name: str) -> Pixels:
    """Bytes of a picture file -> uint8 or uint16 [H, W] or [H, W, 3] BGR: the one rule for every source of pictures.

    Turned as EXIF says, as every viewer shows it; alpha is dropped, numbers are as stored, colour profiles are not applied.
    Raises PictureError for whatever would be read in part, or differently by other programs.
    """
    try:
        header = formats.header(data)
        image = _jpeg(header) if header.kind == "JPEG" else _other(header)
    except PictureError as error:
        raise PictureError(f"{printable(name)}: {error.message}", hint=error.hint) from error
    if header.inverted:
        image = np.bitwise_not(image)
    return _upright(image, header.orientation)


def _jpeg(header: formats.Header) -> Pixels:
    """Strictly: libjpeg fills in what is missing and warns; OpenCV loses the warning, here it is an error."""
    colours = "GRAY" if header.channels == 1 else "BGR"
    try:
        image: Pixels = simplejpeg.decode_jpeg(header.data, colours)
    except (ValueError, MemoryError) as error:
        raise PictureError(f"damaged: {error}", hint=formats.COPY_AGAIN) from error
    return image[:, :, 0] if header.channels == 1 else image


def _other(header: formats.Header) -> Pixels:
    try:
        image = cv2.imdecode(np.frombuffer(header.data, np.uint8), cv2.IMREAD_UNCHANGED)
    except (cv2.error, MemoryError) as error:
        reason = str(getattr(error, "err", error)) or "there is too little memory"
        raise PictureError(f"OpenCV cannot read this {header.kind}: {reason}", hint=formats.COPY_AGAIN) from error
    if image is None:
        raise PictureError(f"damaged: OpenCV cannot read this {header.kind}", hint=formats.COPY_AGAIN)
    _refuse_unlike(image, header)
    if image.ndim == 3 and header.channels == 1:  # grey with alpha comes as colour
        return np.ascontiguousarray(image[:, :, 0])
    return np.ascontiguousarray(image[:, :, :3]) if image.ndim == 3 and image.shape[2] > 3 else image


def _refuse_unlike(image: Pixels, header: formats.Header) -> None:
    """Raise PictureError where the decoder made something else of the file than its header says."""
    found = (*image.shape[:2], image.dtype.itemsize * 8, image.dtype.kind)
    expected = (header.height_px, header.width_px, header.depth_bits, "u")
    if found != expected or (image.ndim == 2 and header.channels == 3):
        raise PictureError(
            f"OpenCV reads this {header.kind} as {image.shape} {image.dtype}, its header says "
            f"{header.width_px}x{header.height_px}, {header.channels} channel(s), {header.depth_bits} bit",
            hint="export it as PNG",
        )


def _upright(image: Pixels, orientation: int) -> Pixels:
    """Turn and mirror as EXIF's orientation says (CIPA DC-008, 4.6.4)."""
    turned = {3: 2, 4: 2, 5: -1, 6: -1, 7: 1, 8: 1}.get(orientation, 0)
    image = np.rot90(image, turned)
    return np.ascontiguousarray(image[:, ::-1] if orientation in (2, 4, 5, 7) else image)


def read(path: Path) -> Pixels:
    """A picture file -> pixels, as `decode`. Raises PictureError."""
    return decode(content(path), str(path))


def content(path: Path) -> bytes:
    """The bytes of a picture file. Raises PictureError for one that cannot be read, or is no plain file."""
    try:
        if not path.is_file() and path.exists():  # a pipe would be waited for, a folder is none
            raise PictureError(f"{printable(path)}: not a plain file", hint="give a picture file")
        return path.read_bytes()
    except OSError as error:
        raise PictureError(f"{printable(path)}: {error.strerror}", hint="check the path and its permissions") from error


def encoded(image: Pixels, suffix: str = ".png") -> bytes:
    """Pixels -> bytes of a picture file of that kind."""
    done, data = cv2.imencode(suffix, image, _JPEG if suffix == ".jpg" else [])
    if not done:
        raise PictureError(f"cannot encode {image.shape} {image.dtype} as {suffix}")
    return data.tobytes()


def write(path: Path, image: Pixels) -> None:
    """Write a picture file, whole or not at all. Raises PictureError."""
    write_encoded(path, encoded(image, path.suffix))


def write_encoded(path: Path, data: bytes) -> None:
    """Write the bytes of a picture file, whole or not at all. Raises PictureError."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise PictureError(f"{path}: {error.strerror}", hint="check the folder's permissions and free space") from error


def to_bgr8(image: Pixels) -> NDArray[np.uint8]:
    """Any frame as 8-bit BGR for people to look at; 16 bit is stretched to its own range."""
    if image.dtype == np.uint16:
        low, high = int(image.min()), int(image.max())
        image = ((image.astype(np.float32) - low) * (255.0 / max(high - low, 1))).astype(np.uint8)
    shown = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR) if image.ndim == 2 else image
    return np.asarray(shown, dtype=np.uint8)


def _captioned(lines: list[str], height_px: int, width_px: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A white picture with lines of text at its top, and the view of it below them, of the size that is asked for."""
    width = max(width_px, *(cv2.getTextSize(line, _FONT, _TEXT, 1)[0][0] + 12 for line in lines))
    top = 8 + _LINE_PX * len(lines)
    picture = np.full((top + height_px, width, 3), 255, np.uint8)
    for number, line in enumerate(lines):
        cv2.putText(picture, line, (6, 20 + _LINE_PX * number), _FONT, _TEXT, (0, 0, 0), 1, cv2.LINE_AA)
    return picture, picture[top:, :width_px]


def explanation(
    seen: Pixels,
    anomaly: NDArray[np.float32],
    threshold: float,
    regions: tuple[Region, ...],
    expected: NDArray[np.uint8] | None,
    title: str,
    offset_px: tuple[int, int] = (0, 0),
) -> NDArray[np.uint8]:
    """What a person looks at: the region of interest as seen with boxes, its anomaly map, and what was expected.

    `seen` is the crop [h, w(, 3)], `anomaly` float32 [h, w] in score units, `expected` uint8 [h, w(, 3)] or None;
    `regions` are in frame pixels, `offset_px` is where the crop starts in the frame.
    """
    base = to_bgr8(seen)
    scale = _PANEL_PX / max(base.shape[:2])
    height, width = (max(1, round(side * scale)) for side in base.shape[:2])
    panels = {"seen": (base, cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)}
    # The colour scale is anchored on the threshold: everything brighter than its middle is over it.
    level = np.clip(anomaly / (2 * threshold) * 255, 0, 255).astype(np.uint8)
    heat = np.asarray(cv2.applyColorMap(level, cv2.COLORMAP_INFERNO), np.uint8)
    panels["anomaly map (mid scale = threshold)"] = (heat, cv2.INTER_LINEAR)
    if expected is not None:
        panels["expected"] = (to_bgr8(expected), cv2.INTER_NEAREST)

    # What the font has no letter for is told by its number.
    lines = title.encode("ascii", "backslashreplace").decode().split("\n")
    # Everything is drawn into one picture: copies of it would take longer than all that is drawn.
    picture, body = _captioned(lines, _BAR_PX + height, width * len(panels))
    body[:_BAR_PX] = 32
    for number, (name, (panel, interpolation)) in enumerate(panels.items()):
        place = body[:, number * width : (number + 1) * width]
        cv2.putText(place, name, (6, 18), _FONT, 0.48, (255, 255, 255), 1, cv2.LINE_AA)
        place[_BAR_PX:] = cv2.resize(panel, (width, height), interpolation=interpolation)
    boxed = body[_BAR_PX:, :width]
    for region in regions:
        x, y = (region.x_px - offset_px[0]) * scale, (region.y_px - offset_px[1]) * scale
        corner = (round(x + region.w_px * scale), round(y + region.h_px * scale))
        cv2.rectangle(boxed, (round(x), round(y)), corner, (0, 0, 255), _BOX_PX)
    return picture
