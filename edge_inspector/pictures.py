"""Picture files: read, write, and the picture that explains a finding (seen, anomaly map, expected)."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_inspector.errors import PictureError
from edge_inspector.frames import Pixels
from edge_inspector.results import Region

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
_END_OF_JPEG = b"\xff\xd9"
_PANEL_PX = 384
_JPEG = [
    cv2.IMWRITE_JPEG_QUALITY, 92,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
]  # fmt: skip
"""Full colour resolution, so that a thin red box stays red."""


def listed(folder: Path) -> list[Path]:
    """The picture files of a folder and its subfolders, in name order. Raises PictureError when there are none."""
    if not folder.is_dir():
        raise PictureError(f"{folder}: no such folder", hint="give the folder that holds the pictures")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise PictureError(f"{folder}: no pictures in it", hint=f"pictures end in {', '.join(SUFFIXES)}")
    return found


def decode(data: bytes, name: str) -> Pixels:
    """Bytes of a picture file -> uint8 or uint16 [H, W] or [H, W, 3] BGR; alpha is dropped. Raises PictureError."""
    jpeg = data[:2] == b"\xff\xd8"
    image = None
    if data and not (jpeg and _END_OF_JPEG not in data[-64:]):
        with contextlib.suppress(cv2.error):  # raised, for one, where the header claims a size beyond all bounds
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None:
        what = "empty file" if not data else "truncated" if jpeg else "not a picture that OpenCV can read"
        raise PictureError(f"{name}: {what}", hint="open it in a viewer; copy or export it again")
    if image.dtype not in (np.uint8, np.uint16):
        raise PictureError(f"{name}: {image.dtype} pixels, expected 8 or 16 bit", hint="export it as 8 or 16 bit")
    return image[:, :, :3] if image.ndim == 3 else image


def read(path: Path) -> Pixels:
    """A picture file -> pixels, as `decode`. Raises PictureError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PictureError(f"{path}: {error.strerror}", hint="check the path and its permissions") from error
    return decode(data, str(path))


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


def _fitted(image: Pixels, interpolation: int) -> NDArray[np.uint8]:
    scale = _PANEL_PX / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return np.asarray(cv2.resize(image, size, interpolation=interpolation), dtype=np.uint8)


def _titled(panel: NDArray[np.uint8], title: str) -> NDArray[np.uint8]:
    bar = np.full((26, panel.shape[1], 3), 32, np.uint8)
    cv2.putText(bar, title, (6, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.48, (255, 255, 255), 1, cv2.LINE_AA)
    return np.vstack([bar, panel])


def _captioned(picture: NDArray[np.uint8], caption: str) -> NDArray[np.uint8]:
    """The picture below as many lines of text as it takes; what the font has no letter for is told by its number."""
    font, scale, height = cv2.FONT_HERSHEY_SIMPLEX, 0.5, 22
    lines = caption.encode("ascii", "backslashreplace").decode().split("\n")
    width = max(picture.shape[1], *(cv2.getTextSize(line, font, scale, 1)[0][0] + 12 for line in lines))
    below = np.full((picture.shape[0], width, 3), 255, np.uint8)
    below[:, : picture.shape[1]] = picture
    strip = np.full((8 + height * len(lines), width, 3), 255, np.uint8)
    for number, line in enumerate(lines):
        cv2.putText(strip, line, (6, 20 + height * number), font, scale, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([strip, below])


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
    boxed = _fitted(base, cv2.INTER_AREA if max(base.shape) > _PANEL_PX else cv2.INTER_NEAREST)
    scale = boxed.shape[1] / base.shape[1]
    for region in regions:
        x, y = (region.x_px - offset_px[0]) * scale, (region.y_px - offset_px[1]) * scale
        corner = (round(x + region.w_px * scale), round(y + region.h_px * scale))
        cv2.rectangle(boxed, (round(x), round(y)), corner, (0, 0, 255), 1, cv2.LINE_AA)
    # The colour scale is anchored on the threshold: everything brighter than its middle is over it.
    level = np.clip(anomaly / (2 * threshold) * 255, 0, 255).astype(np.uint8)
    heat = _fitted(cv2.applyColorMap(level, cv2.COLORMAP_INFERNO), cv2.INTER_LINEAR)
    panels = [_titled(boxed, "seen"), _titled(heat, "anomaly map (mid scale = threshold)")]
    if expected is not None:
        panels.append(_titled(_fitted(to_bgr8(expected), cv2.INTER_NEAREST), "expected"))
    return _captioned(np.hstack(panels), title)
