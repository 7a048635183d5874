"""What feature-anogan is fitted to: features of pictures, of jittered copies, and of copies with drawn defects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from edge_inspector import pictures, preprocess
from edge_inspector.bundles import InputSpec
from edge_inspector.preprocess import Window
from edge_inspector.roi import Roi
from edge_inspector.training import export, synthesis
from edge_inspector.training.networks import feature_anogan as networks
from edge_inspector.training.networks.backbone import Backbone
from edge_inspector.training.run import Run

WITHHELD = 2
"""Drawn defects of withheld families per picture, to weigh the terms with."""
_BATCH, _POOL = 8, 32
Drawn = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""Picture [H, W, 3] and mask [H, W]."""


def parts(index: Tensor, size: int = 16) -> Iterator[Tensor]:
    """An index in pieces that fit into memory."""
    for start in range(0, len(index), size):
        yield index[start : start + size]


@dataclass
class Store:
    """Backbone outputs of many tiles at half precision, and what is defective in them."""

    early: Tensor
    """[N, 40, h, w]"""
    late: Tensor
    """[N, 112, h / 2, w / 2]"""
    defective: Tensor
    """[N, h, w] share of each place that a drawn defect covers."""

    coarse: Tensor
    """[N, DEPTH, h / 2, w / 2] features averaged to stride 16."""

    def raw(self, chosen: Tensor) -> Tensor:
        """Features [n, DEPTH, h, w] of chosen tiles."""
        return networks.patches(self.early[chosen].float(), self.late[chosen].float())

    def __len__(self) -> int:
        return len(self.early)


@dataclass
class Material:
    """Everything the heads are fitted to and weighed with. Tiles of one picture stay together."""

    good: Store
    jittered: Store
    spoiled: Store
    """LEARNED defects, drawn into the jittered tiles."""
    withheld: Store
    """WITHHELD defects, `WITHHELD` for each good tile, in order."""
    valid: Tensor
    """[tiles, H, W] of good tiles."""
    shown: Tensor
    """uint8 [tiles, H / 2, W / 2, 3] good tiles, to show."""
    fold: NDArray[np.intp]
    """[tiles]"""
    picture: NDArray[np.intp]
    """[tiles]"""


class _Extractor:
    """The backbone, run by what is fastest: PyTorch on a GPU, ONNX Runtime on the CPU (a third of PyTorch's time)."""

    def __init__(self, height: int, width: int, run: Run) -> None:
        self.device, self.backbone = run.device, Backbone().to(run.device)
        self.session = None
        if self.device.type == "cpu":
            path = run.folder / f"backbone-{run.rank}.onnx"
            example = torch.zeros(1, 3, height, width)
            export.write(self.backbone, (example,), path, ["pixels"], ["early", "late"])
            self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            path.unlink()

    def __call__(self, images: list[NDArray[np.uint8]]) -> tuple[Tensor, Tensor]:
        """Images uint8 [H, W, 3] RGB -> features of stride 8 and 16, half precision, on the CPU."""
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
        if self.session is not None:
            early, late = (torch.from_numpy(a) for a in self.session.run(None, {"pixels": pixels.contiguous().numpy()}))
        else:
            with torch.no_grad():
                early, late = self.backbone(pixels.to(self.device))
        return early.half().cpu(), late.half().cpu()


def _within(image: NDArray[np.uint8], tile: preprocess.Tile, draw: Callable[[NDArray[np.uint8]], Drawn]) -> Drawn:
    """Draw on a tile at the resolution the camera had, where that is the lower one; returns picture and mask [H, W].

    Sharp lines in an enlarged, smooth picture would teach D to look for sharp lines, which no real defect has there.
    """
    inside = slice(tile.top, tile.top + tile.height), slice(tile.left, tile.left + tile.width)
    region = image[inside]
    enlarged = tile.w * tile.h < tile.width * tile.height
    changed, mask = draw(_resized(region, (tile.w, tile.h), cv2.INTER_AREA) if enlarged else region)
    size = tile.width, tile.height
    out, covered = image.copy(), np.zeros(image.shape[:2], np.uint8)
    out[inside] = _resized(changed, size, cv2.INTER_LINEAR) if enlarged else changed
    covered[inside] = _resized(mask, size, cv2.INTER_NEAREST) if enlarged else mask
    return out, covered


def _resized(picture: NDArray[np.uint8], size: tuple[int, int], interpolation: int) -> NDArray[np.uint8]:
    return cv2.resize(picture, size, interpolation=interpolation).astype(np.uint8, copy=False)


class _Gatherer:
    """Turns pictures into Material, a batch at a time."""

    KINDS = ("good", "jittered", "spoiled", *(f"withheld-{n}" for n in range(WITHHELD)))

    def __init__(self, spec: InputSpec, run: Run) -> None:
        self.spec, self.run = spec, run
        self.extractor = _Extractor(spec.height, spec.width, run)
        self.features: dict[str, list[tuple[Tensor, Tensor]]] = {kind: [] for kind in self.KINDS}
        self.waiting: dict[str, list[NDArray[np.uint8]]] = {kind: [] for kind in self.KINDS}
        self.defective: dict[str, list[Tensor]] = {kind: [] for kind in self.KINDS}
        self.pool: list[NDArray[np.uint8]] = []

    def add(self, number: int, plan: preprocess.Plan, images: NDArray[np.uint8]) -> None:
        """Take the tiles of one picture, and draw their copies."""
        rng = self.run.rng(number)
        for image, tile in zip(images, plan.tiles, strict=True):
            if len(self.pool) < _POOL:
                self.pool.append(image)
            elif rng.random() < 0.2:
                self.pool[rng.integers(_POOL)] = image

            def spoilt(picture: NDArray[np.uint8], family: synthesis.Family) -> Drawn:
                other = self.pool[rng.integers(len(self.pool))]
                other = _resized(other, (picture.shape[1], picture.shape[0]), cv2.INTER_AREA)
                return synthesis.spoiled(rng, picture, other, family)

            def jittered(picture: NDArray[np.uint8]) -> Drawn:
                return synthesis.jittered(rng, picture), np.zeros(picture.shape[:2], np.uint8)

            moved, _ = _within(image, tile, jittered)
            self._put("good", image, None)
            self._put("jittered", moved, None)
            self._put("spoiled", *_within(moved, tile, lambda p: spoilt(p, synthesis.LEARNED)))
            for n in range(WITHHELD):
                self._put(f"withheld-{n}", *_within(image, tile, lambda p: spoilt(p, synthesis.WITHHELD)))

    def _put(self, kind: str, image: NDArray[np.uint8], mask: NDArray[np.uint8] | None) -> None:
        if mask is not None:
            grid = self.spec.width // networks.STRIDE, self.spec.height // networks.STRIDE
            share = cv2.resize(mask.astype(np.float32), grid, interpolation=cv2.INTER_AREA)
            self.defective[kind].append(torch.from_numpy(share))
        self.waiting[kind].append(image)
        if len(self.waiting[kind]) == _BATCH:
            self.flush(kind)

    def flush(self, kind: str) -> None:
        """Run what waits through the backbone."""
        if self.waiting[kind]:
            self.features[kind].append(self.extractor(self.waiting[kind]))
            self.waiting[kind] = []

    def store(self, *kinds: str) -> Store:
        """Everything of these kinds; of several, tile by tile."""
        for kind in kinds:
            self.flush(kind)
        columns = [[torch.cat(column) for column in zip(*self.features.pop(kind), strict=True)] for kind in kinds]
        early, late = (torch.stack([column[i] for column in columns], 1).flatten(0, 1) for i in (0, 1))
        masks = [torch.stack(self.defective[kind]) for kind in kinds if self.defective[kind]]
        coarse = [
            functional.avg_pool2d(networks.patches(early[part].float(), late[part].float()), 2).half()
            for part in parts(torch.arange(len(early)))
        ]
        covered = torch.stack(masks, 1).flatten(0, 1) if masks else torch.empty(0)
        return Store(early, late, covered, torch.cat(coarse))


def gathered(
    paths: Sequence[Path], folds: NDArray[np.intp], spec: InputSpec, window: Window | None, run: Run
) -> Material:
    """Features of pictures, of their jittered copies, and of copies with drawn defects. Raises PictureError."""
    gatherer = _Gatherer(spec, run)
    plans: dict[tuple[int, int], preprocess.Plan] = {}
    half = spec.width // 2, spec.height // 2
    valid, shown, picture = [], [], []
    for number, path in enumerate(paths):
        image = pictures.read(path)
        height, width = image.shape[:2]
        plan = plans.get((height, width))
        if plan is None:
            plan = plans[height, width] = preprocess.Plan(spec, Roi(), height, width, window)
        images, masks = plan.buffers()
        plan.fill(image, images, masks)
        gatherer.add(number, plan, images)
        valid.append(masks)
        shown += [_resized(tile, half, cv2.INTER_AREA) for tile in images]
        picture += [number] * len(images)
        run.tell("features", number + 1, len(paths))
        run.stop_if_asked()
    owner = np.array(picture)
    return Material(
        gatherer.store("good"), gatherer.store("jittered"), gatherer.store("spoiled"),
        gatherer.store(*_Gatherer.KINDS[3:]), torch.from_numpy(np.concatenate(valid)),
        torch.from_numpy(np.stack(shown)), folds[owner], owner,
    )  # fmt: skip
