"""The region of each picture that verbs look at: given in pixels, or by the name of a recipe's region."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_inspector.errors import InspectorError
from edge_inspector.schema import validate

if TYPE_CHECKING:
    from edge_inspector.bundles import Bundle
    from edge_inspector.recipes import CameraRecipe, RoiRecipe
    from edge_inspector.roi import Roi

RectangleOption = Annotated[
    tuple[int, int, int, int] | None, typer.Option(metavar="X Y W H", help="what the recipe judges of each picture, in px")
]
PolygonOption = Annotated[
    str | None, typer.Option(metavar='"X,Y X,Y X,Y"', help="corners of what the recipe judges of each picture, in px")
]
RecipeOption = Annotated[
    str | None, typer.Option(metavar="LINE.YAML:RECIPE/CAMERA/ROI", help="take region and intensity window from a recipe")
]


@dataclass(frozen=True)
class Given:
    """A region and what a recipe says with it."""

    roi: Roi
    window: tuple[int, int] | None = None
    threshold: float | None = None


def region(rectangle: tuple[int, int, int, int] | None, polygon: str | None) -> Roi:
    """The region that was given in pixels; all of each picture without one. Raises InspectorError."""
    from edge_inspector.roi import Roi  # noqa: PLC0415 - verbs load what they need

    if rectangle is not None and polygon is not None:
        raise InspectorError("--rectangle and --polygon: both are given, expected one", hint="a polygon is cut out by its box")
    values: dict[str, Any] = {}
    if rectangle is not None:
        values["rectangle"] = dict(zip(("x_px", "y_px", "w_px", "h_px"), rectangle, strict=True))
    if polygon is not None:
        values["polygon"] = _corners(polygon)
    return validate(Roi, values, "--polygon" if polygon else "--rectangle")


def _corners(text: str) -> list[list[int]]:
    corners = re.fullmatch(r"\s*\d+\s*,\s*\d+(\s+\d+\s*,\s*\d+)*\s*", text)
    if corners is None:
        raise InspectorError(f"--polygon {text!r}: expected corners as X,Y X,Y X,Y", hint='as in --polygon "10,10 90,12 60,80"')
    return [[int(x), int(y)] for x, y in re.findall(r"(\d+)\s*,\s*(\d+)", text)]


def given(rectangle: tuple[int, int, int, int] | None, polygon: str | None, recipe: str | None) -> Given:
    """The region that was given in pixels or by a recipe's name. Raises InspectorError."""
    if recipe is None:
        return Given(region(rectangle, polygon))
    if rectangle is not None or polygon is not None:
        raise InspectorError("--recipe: a region is given as well, expected one of both", hint="the recipe has its region")
    camera, roi = _named(recipe)
    return Given(roi.shape, camera.intensity_window, roi.threshold)


def _named(text: str) -> tuple[CameraRecipe, RoiRecipe]:
    """The camera and region of FILE:RECIPE/CAMERA/ROI. Raises InspectorError that says which there are."""
    from edge_inspector.config import load_line  # noqa: PLC0415 - verbs load what they need

    file, _, name = text.rpartition(":")
    parts = name.split("/")
    if not file or len(parts) != 3:
        raise InspectorError(f"--recipe {text}: expected FILE:RECIPE/CAMERA/ROI", hint="as in line.yaml:my-recipe/top/lid")
    recipes = load_line(Path(file)).recipes
    known = {
        f"{recipe}/{camera}/{roi}": (of_camera, of_roi)
        for recipe, of_recipe in recipes.items()
        for camera, of_camera in of_recipe.cameras.items()
        for roi, of_roi in of_camera.rois.items()
    }
    if name not in known:
        raise InspectorError(f"--recipe: no region {name} in {file}", hint=f"there are: {', '.join(known)}")
    return known[name]


def batch_of(bundle: Bundle) -> int:
    """A whole picture is one tile; of many tiles some go together."""
    return 1 if bundle.manifest.input.tile is None else 4
