"""Frame -> what the network sees. The one home of cropping, resizing and masking, offline and on the line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_inspector.bundles import Bundle, InputSpec, Manifest
from edge_inspector.errors import InspectorError
from edge_inspector.frames import Pixels
from edge_inspector.results import Region
from edge_inspector.roi import Roi

BLANK = 127
"""What the network sees where nothing is judged."""
_ASPECT_TOLERANCE = 0.05
_SIZE_TOLERANCE = 0.2
"""A region may be so much larger or smaller than the pictures of training; from the first pixel on it is told."""
_WHITE = 255
_INTERPOLATION = {"area": cv2.INTER_AREA, "linear": cv2.INTER_LINEAR}
Scalar = TypeVar("Scalar", np.float32, np.uint8)
Window = tuple[int, int]
"""Intensities that become 0 and 255."""
Box = tuple[int, int, int, int]
"""Left, top, width and height."""


class FormatError(InspectorError):
    """A frame does not have the size or depth that the recipe needs."""


@dataclass(frozen=True)
class Tile:
    """A square (or all) of the region, and where it lands in the network's input."""

    x: int
    y: int
    w: int
    h: int
    left: int
    top: int
    width: int
    height: int


def _starts(length: int, tile: int, overlap: float) -> list[int]:
    if length <= tile:
        return [0]
    count = math.ceil((length - tile * overlap) / (tile * (1 - overlap)))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _tiles(spec: InputSpec, width: int, height: int) -> list[Tile]:
    side = spec.tile
    if side is None:
        return [_placed(spec, 0, 0, width, height)]
    return [
        _placed(spec, x, y, min(side, width), min(side, height))
        for y in _starts(height, side, spec.overlap)
        for x in _starts(width, side, spec.overlap)
    ]


def _placed(spec: InputSpec, x: int, y: int, w: int, h: int) -> Tile:
    if spec.fit == "stretch":
        return Tile(x, y, w, h, 0, 0, spec.width, spec.height)
    scale = min(spec.width / w, spec.height / h)
    width, height = max(1, round(w * scale)), max(1, round(h * scale))
    return Tile(x, y, w, h, (spec.width - width) // 2, (spec.height - height) // 2, width, height)


def tile_count(spec: InputSpec, width: int, height: int) -> int:
    """How many tiles a region of that size has: the engine's batch."""
    return len(_tiles(spec, width, height))


class Plan:
    """Everything about one region of interest that does not change from frame to frame.

    Made once per frame size; `fill` then works without allocating.
    """

    def __init__(self, spec: InputSpec, roi: Roi, height: int, width: int, window: Window | None = None) -> None:
        """`height` and `width` are those of the frame. Raises FormatError if the region reaches outside."""
        box = roi.box(height, width)
        if box is None:
            raise FormatError(
                f"region of interest {roi.model_dump(exclude_none=True)} reaches outside a frame of {width}x{height}",
                hint="correct the region, or the camera's width and height",
            )
        self.spec, self.box, self.size, self.window = spec, box, (height, width), window
        self.tiles = _tiles(spec, box[2], box[3])
        self.mask = roi.mask(box)
        self.valid = self._valid()
        self._blank = None if bool(self.valid.all()) else self.valid == 0
        self._lut = _lut(window) if window else None
        depth = () if spec.channels == 1 else (3,)
        largest = (max(t.h for t in self.tiles), max(t.w for t in self.tiles))
        self._largest = largest
        self._levels: NDArray[np.uint8] | None = None
        self._coloured = np.empty((*largest, *depth), np.uint8)

    def buffers(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Fresh arrays for `fill`: images uint8 [tiles, H, W, C] and valid uint8 [tiles, H, W]."""
        n, s = len(self.tiles), self.spec
        return np.empty((n, s.height, s.width, s.channels), np.uint8), np.empty((n, s.height, s.width), np.uint8)

    def _valid(self) -> NDArray[np.uint8]:
        valid = np.zeros((len(self.tiles), self.spec.height, self.spec.width), np.uint8)
        for out, t in zip(valid, self.tiles, strict=True):
            target = out[t.top : t.top + t.height, t.left : t.left + t.width]
            if self.mask is None:
                target[:] = 1
            else:
                part = self.mask[t.y : t.y + t.h, t.x : t.x + t.w]
                target[:] = cv2.resize(part, (t.width, t.height), interpolation=cv2.INTER_NEAREST)
        return valid

    def fill(self, image: Pixels, images: NDArray[np.uint8], valid: NDArray[np.uint8]) -> int:
        """Cut, window, convert and resize one frame into the first rows of the buffers; returns how many rows.

        image: uint8 or uint16 [H, W] or [H, W, 3] BGR. Raises FormatError for another size, or 16 bit without window.
        """
        if image.shape[:2] != self.size:
            found, wanted = f"{image.shape[1]}x{image.shape[0]}", f"{self.size[1]}x{self.size[0]}"
            raise FormatError(f"frame of {found}, expected {wanted}", hint="did the camera's settings change?")
        if image.dtype != np.uint8 and self._lut is None:
            raise FormatError(
                f"{image.dtype} frame, but the recipe has no intensity_window",
                hint="set intensity_window: [low, high] of this camera in the recipe, e.g. [0, 4095] for 12 bit",
            )
        if image.dtype == np.uint8 and self.window is not None and self.window[1] > _WHITE:
            raise FormatError(
                f"8-bit frame, but the intensity window reaches to {self.window[1]}",
                hint="set the camera to the bit depth it was trained with",
            )
        x0, y0 = self.box[0], self.box[1]
        for out, t in zip(images, self.tiles, strict=False):
            crop = image[y0 + t.y : y0 + t.y + t.h, x0 + t.x : x0 + t.x + t.w]
            target = out[t.top : t.top + t.height, t.left : t.left + t.width]
            self._resize(self._convert(crop), target)
        n = len(self.tiles)
        np.copyto(valid[:n], self.valid)
        if self._blank is not None:
            images[:n][self._blank] = BLANK
        return n

    def _convert(self, crop: Pixels) -> Pixels:
        """Intensities to 8 bit, then colours to the network's order, into buffers that stay."""
        h, w = crop.shape[:2]
        if self._lut is not None:
            if self._levels is None or self._levels.ndim != crop.ndim:
                self._levels = np.empty((*self._largest, *crop.shape[2:]), np.uint8)
            crop = np.take(self._lut, crop, out=self._levels[:h, :w], mode="clip")
        grey, order = crop.ndim == 2, self.spec.order
        if grey == (order == "grey") and order != "rgb":
            return crop
        code = cv2.COLOR_GRAY2BGR if grey else cv2.COLOR_BGR2GRAY if order == "grey" else cv2.COLOR_BGR2RGB
        return cv2.cvtColor(crop, code, dst=self._coloured[:h, :w])

    def _resize(self, crop: Pixels, target: NDArray[np.uint8]) -> None:
        flat = target[:, :, 0] if self.spec.channels == 1 else target
        if crop.shape[:2] == flat.shape[:2]:
            np.copyto(flat, crop)
            return
        done = cv2.resize(crop, (flat.shape[1], flat.shape[0]), dst=flat, interpolation=_INTERPOLATION[self.spec.interpolation])
        if done is not flat:  # a letterboxed target is no contiguous block that OpenCV could write into
            np.copyto(flat, done)

    def stitched(self, maps: NDArray[Scalar]) -> NDArray[Scalar]:
        """Put per-tile outputs [tiles, h, w] or [tiles, h, w, C] back into the region: [h, w(, C)] in its own pixels.

        Floats (anomaly maps) keep the larger value where tiles overlap; pictures come back as frames are, BGR or grey.
        """
        _, _, w, h = self.box
        floats = maps.dtype.kind == "f"
        whole: NDArray[Scalar] = np.zeros((h, w, *maps.shape[3:]), maps.dtype)
        fx, fy = maps.shape[2] / self.spec.width, maps.shape[1] / self.spec.height
        for tile, t in zip(maps, self.tiles, strict=False):
            top, left = round(t.top * fy), round(t.left * fx)
            part = tile[top : top + max(1, round(t.height * fy)), left : left + max(1, round(t.width * fx))]
            part = cv2.resize(part, (t.w, t.h), interpolation=cv2.INTER_LINEAR)
            target = whole[t.y : t.y + t.h, t.x : t.x + t.w]
            part = part.reshape(target.shape)
            np.maximum(target, part, out=target) if floats else np.copyto(target, part)
        if self.mask is not None and floats:
            whole[self.mask == 0] = 0
        return whole if floats or self.spec.order != "rgb" else np.ascontiguousarray(whole[..., ::-1])

    def regions(self, anomaly: NDArray[np.float32], threshold: float, mm_per_px: float | None) -> tuple[Region, ...]:
        """Connected areas of a stitched map above the threshold, strongest first, in pixels of the frame."""
        above = (anomaly > threshold).astype(np.uint8)
        if not above.any():  # the peak was lost when the map was brought to frame pixels: show where it is
            above[np.unravel_index(int(anomaly.argmax()), anomaly.shape)] = 1
        count, labels, stats, _ = cv2.connectedComponentsWithStats(above, connectivity=8)
        found = []
        for label in range(1, count):
            x, y, w, h, area = (int(value) for value in stats[label])
            inside = labels[y : y + h, x : x + w] == label
            peak = round(float(anomaly[y : y + h, x : x + w][inside].max()), 5)
            area_mm2 = round(area * mm_per_px**2, 4) if mm_per_px else None
            x_px, y_px = x + self.box[0], y + self.box[1]
            found.append(Region(x_px=x_px, y_px=y_px, w_px=w, h_px=h, area_px=area, area_mm2=area_mm2, peak=peak))
        return tuple(sorted(found, key=lambda region: region.peak, reverse=True))


def _lut(window: Window) -> NDArray[np.uint8]:
    low, high = window
    levels = (np.arange(65536, dtype=np.float64) - low) * (255.0 / (high - low))
    return np.clip(np.round(levels), 0, 255).astype(np.uint8)


def refuse_unlike(manifest: Manifest, box: Box) -> None:
    """Raise FormatError for a region that the network would see squashed or scaled otherwise than in training."""
    trained, spec = manifest.training, manifest.input
    width, height = box[2:]
    if spec.tile is not None and min(width, height) < spec.tile:
        raise FormatError(
            f"region of {width}x{height} is narrower than the bundle's tiles of {spec.tile} px",
            hint=f"make the region at least {spec.tile} px wide and high, or train with a smaller --tile",
        )
    if spec.tile is not None:  # tiles keep their scale, whatever the region's size
        return
    aspect, expected = width / height, trained.width_px / trained.height_px
    low, high = trained.aspects or (expected, expected)
    slack = 1 + _ASPECT_TOLERANCE
    squashed = spec.fit == "stretch" and not low / slack <= aspect <= high * slack
    if squashed or _beyond(manifest, box) > _SIZE_TOLERANCE:
        raise FormatError(
            f"region of {width}x{height}, the bundle was trained on {_sizes(manifest)}",
            hint="give the region the size of the training pictures, or train on it: edge-inspector train PICTURES --recipe "
            "LINE.YAML:RECIPE/CAMERA/ROI",
        )


def refuse_camera(bundle: Bundle, image: Pixels) -> None:
    """Raise FormatError for a frame of other channels or another depth than the pictures of training had."""
    found, wanted = _colours(1 if image.ndim == 2 else 3), _colours(bundle.channels)
    if found != wanted:
        raise FormatError(
            f"{found} frame, the bundle was trained on {wanted}", hint="set the camera's pixel_format, or train anew"
        )
    bits, trained = image.dtype.itemsize * 8, bundle.manifest.training.depth_bits
    if bits != trained:
        raise FormatError(
            f"{bits}-bit frame, the bundle was trained on {trained} bit", hint="set the camera's pixel_format, or train anew"
        )


def _colours(channels: int) -> str:
    return "grey" if channels == 1 else "colour"


def _sizes(manifest: Manifest) -> str:
    (w, h), (widest, highest) = manifest.size_range
    return f"{w}x{h}" if (w, h) == (widest, highest) else f"{w}x{h} to {widest}x{highest}"


def _beyond(manifest: Manifest, box: Box) -> float:
    """How far a region is outside the sizes of training, as a share of them; 0 within."""
    shares = [
        max(1 - found / least, found / most - 1, 0.0) for found, least, most in zip(box[2:], *manifest.size_range, strict=True)
    ]
    return max(shares)


def broken_promise(manifest: Manifest, roi: Roi, threshold: float | None, window: Window | None, box: Box | None) -> str:
    """Why the rates that were promised with a bundle's threshold do not hold for a region; empty where they do.

    `threshold`: the recipe's own one. `box`: the region in a frame, where a frame's size is known.
    """
    why = []
    if threshold is not None and threshold != manifest.threshold:
        why.append("threshold set by the recipe")
    if window != manifest.training.intensity_window:
        why.append("intensity window is not that of training")
    if box is not None and _beyond(manifest, box) > 0:
        why.append(f"region of {box[2]}x{box[3]}, trained on {_sizes(manifest)}")
    if _outline(roi) != _outline(manifest.pictures.region):
        why.append("region of another outline than trained on")
    return f"not valid: {', '.join(why)}" if why else ""


def _outline(roi: Roi | None) -> tuple[tuple[int, int], ...]:
    """A polygon, wherever it lies; none for a rectangle."""
    if roi is None or roi.polygon is None:
        return ()
    left, top = (min(values) for values in zip(*roi.polygon, strict=True))
    return tuple((x - left, y - top) for x, y in roi.polygon)
