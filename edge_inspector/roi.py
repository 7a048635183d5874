"""Regions of interest: rectangles and polygons of a frame, in pixels."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from edge_inspector.schema import Field, Model

Point = tuple[Annotated[int, Field(ge=0, le=65535)], Annotated[int, Field(ge=0, le=65535)]]


class Rectangle(Model):
    """Left, top, width and height of a part of the frame."""

    x_px: int = Field(ge=0, le=65535)
    y_px: int = Field(ge=0, le=65535)
    w_px: int = Field(ge=8, le=65535)
    h_px: int = Field(ge=8, le=65535)


class Roi(Model):
    """A rectangle, or a polygon of at least three corners; neither means the whole frame."""

    rectangle: Rectangle | None = None
    polygon: tuple[Point, ...] | None = Field(None, min_length=3, max_length=256)

    @model_validator(mode="after")
    def _one_shape(self) -> Roi:
        if self.rectangle is not None and self.polygon is not None:
            raise ValueError("give a rectangle or a polygon, not both")
        return self

    def box(self, height_px: int, width_px: int) -> tuple[int, int, int, int] | None:
        """(x, y, w, h) of the bounding box in a frame of that size; None when it reaches outside."""
        if self.rectangle is not None:
            r = self.rectangle
            box = (r.x_px, r.y_px, r.w_px, r.h_px)
        elif self.polygon is not None:
            corners = np.array(self.polygon)
            (x, y), (right, bottom) = corners.min(0), corners.max(0)
            box = (int(x), int(y), int(right - x) + 1, int(bottom - y) + 1)
        else:
            box = (0, 0, width_px, height_px)
        x, y, w, h = box
        return box if x + w <= width_px and y + h <= height_px else None

    def mask(self, box: tuple[int, int, int, int]) -> NDArray[np.uint8] | None:
        """uint8 [h, w], 1 where a pixel lies in the polygon or on its edge; None where all of the box counts."""
        if self.polygon is None:
            return None
        x0, y0, w, h = box
        rows = np.arange(h, dtype=np.float64)[:, None] + y0
        columns = np.arange(w, dtype=np.float64)[None, :] + x0
        inside, edge = np.zeros((h, w), dtype=bool), np.zeros((h, w), dtype=bool)
        corners = [(float(x), float(y)) for x, y in self.polygon]
        for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
            dx, dy = x2 - x1, y2 - y1
            if dy:  # even-odd rule
                crosses = (rows >= min(y1, y2)) & (rows < max(y1, y2))
                inside ^= crosses & (columns <= x1 + (rows - y1) * dx / dy)
            along = np.clip(((columns - x1) * dx + (rows - y1) * dy) / max(dx * dx + dy * dy, 1.0), 0.0, 1.0)
            edge |= np.hypot(columns - x1 - along * dx, rows - y1 - along * dy) <= 0.5  # half a pixel
        return (inside | edge).astype(np.uint8)
