"""What feature-anogan is fitted to: features of pictures, of jittered copies, and of copies with drawn defects."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from edge_inspector import pictures, preprocess
from edge_inspector.bundles import InputSpec
from edge_inspector.preprocess import Window
from edge_inspector.roi import Roi
from edge_inspector.training import export, quantise, synthesis
from edge_inspector.training.data import load_tiles
from edge_inspector.training.networks import feature_anogan as networks
from edge_inspector.training.networks.backbone import Backbone, OnnxBackbone, Source, Taps
from edge_inspector.training.run import Run, key_of

WITHHELD = 2
"""Drawn defects of withheld families per picture, to weigh the terms with."""
COVERED = 0.3
"""Share of a place that a drawn defect must cover for it to be called bad."""
SHEET = 8
"""Pictures of each fold that are kept to be shown."""
MOST_PLACES = 2000 * 32 * 32
"""What is kept in memory, in feature places of good tiles with _CHANNELS: 2000 of 256 x 256 px, 2.5 GB."""
_CHANNELS = 168
CHUNK = 64
"""Good tiles whose features, and their copies', are kept on the disk together: what an interruption loses at most."""
_BATCH, _POOL, _RANGES = 8, 32, 32
_TRIAL, _FEWEST, _SHARE = 8, 60, 0.35
"""Where time is short: tiles that tell what one costs, the fewest that are taken, the share of the time for all of them."""
Drawn = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""Picture [H, W, 3] and mask [H, W]."""


def parts(index: Tensor, size: int = 16) -> Iterator[Tensor]:
    """An index in pieces that fit into memory."""
    for start in range(0, len(index), size):
        yield index[start : start + size]


class Store:
    """Backbone outputs of tiles at half precision, and what is defective in them.

    Allocated once: thousands of small arrays that stay would leave the heap full of holes, tenfold what they hold.
    """

    def __init__(self, count: int, size: tuple[int, int], taps: Taps) -> None:
        """`size`: height and width of tiles, in px."""
        self.strides, self.depth = taps.strides, taps.depth
        h, w = taps.places(*size)
        self.taps = [
            torch.empty(count, channels, size[0] // stride, size[1] // stride, dtype=torch.half)
            for channels, stride in zip(taps.channels, taps.strides, strict=True)
        ]
        """The backbone's maps."""
        self.coarse = torch.empty(count, taps.depth, h // 2, w // 2, dtype=torch.half)
        """Features averaged over 2 x 2 places."""
        self.defective = torch.zeros(count, h, w)
        """Share of each place that a drawn defect covers."""

    def put(self, rows: list[int], taps: Sequence[Tensor]) -> None:
        """Keep a backbone's maps of a few tiles."""
        for store, tap in zip(self.taps, taps, strict=True):
            store[rows] = tap.half()
        self.coarse[rows] = functional.avg_pool2d(networks.patches(taps, self.strides), 2).half()

    def raw(self, chosen: Tensor) -> Tensor:
        """Features [n, C, h, w] of chosen tiles."""
        return networks.patches([tap[chosen].float() for tap in self.taps], self.strides)

    def kept(self, rows: slice) -> list[Tensor]:
        """Everything of these rows, for a checkpoint."""
        return [held[rows].clone() for held in self._held]

    def restore(self, rows: slice, state: list[Tensor]) -> None:
        """What `kept` gave."""
        for held, kept in zip(self._held, state, strict=True):
            held[rows] = kept

    def some(self, chosen: Tensor) -> Store:
        """A store of chosen tiles."""
        found = copy.copy(self)
        found.taps = [tap[chosen] for tap in self.taps]
        found.coarse, found.defective = self.coarse[chosen], self.defective[chosen]
        return found

    @property
    def _held(self) -> list[Tensor]:
        return [*self.taps, self.coarse, self.defective]

    def __len__(self) -> int:
        return len(self.coarse)


@dataclass
class Material:
    """Everything the heads are fitted to and weighed with: every tile, or so many as fit into memory, taken evenly."""

    good: Store
    jittered: Store
    spoiled: Store
    """LEARNED defects, drawn into the jittered tiles."""
    withheld: Store
    """WITHHELD defects, `WITHHELD` for each good tile, in order."""
    judged: Tensor
    """Bool [tiles, h, w]: places of good tiles that count."""
    shown: Tensor
    """uint8 [tiles, H / 2, W / 2, 3] good tiles, to show."""
    drawn: dict[int, NDArray[np.uint8]]
    """Some tiles of `withheld`, of its row: uint8 [H / 2, W / 2, 3], to show."""
    fold: NDArray[np.intp]
    """[tiles]"""
    picture: NDArray[np.intp]
    """[tiles]"""
    whole: NDArray[np.bool_]
    """[pictures], whether every tile of a picture is here."""
    extractor: Extractor
    """What made the features."""


class Extractor:
    """The backbone, run by what is fastest: PyTorch on a GPU, ONNX Runtime on the CPU (a third of PyTorch's time)."""

    def __init__(
        self, source: Source, height: int, width: int, run: Run, ranges: NDArray[np.uint8] | None = None
    ) -> None:  # fmt: skip
        """`ranges`: pictures uint8 [N, H, W, 3] that the ranges of an INT8 backbone come from; None for a float one."""
        self.used, self.taps = source.used, source.taps
        folder = run.folder / f"backbone-{run.rank}"
        folder.mkdir(exist_ok=True)
        self.exported: Backbone = source.opened(folder)
        """For the graph: PyTorch's own, unless it is a file or quantised."""
        self.fast, self.device = self.exported, run.device
        if isinstance(self.exported, OnnxBackbone) or ranges is not None:
            self.device = torch.device("cpu")
        if self.device.type == "cpu" and not isinstance(self.exported, OnnxBackbone):
            path = folder / "exported.onnx"
            export.write(self.exported, (torch.zeros(1, 3, height, width),), path, ["pixels"], [*self.taps.names])
            self.fast = OnnxBackbone(path, self.taps)
        if isinstance(self.fast, OnnxBackbone) and ranges is not None:
            quantised = folder / "int8.onnx"
            quantise.quantise(self.fast.path, ranges, quantised)
            self.exported = self.fast = OnnxBackbone(quantised, self.taps)
        self.fast.to(self.device)

    def __call__(self, images: list[NDArray[np.uint8]]) -> list[Tensor]:
        """Images uint8 [H, W, 3] RGB -> the backbone's maps, on the CPU."""
        with torch.no_grad():
            found = self.fast(networks.as_pixels(torch.from_numpy(np.stack(images)).to(self.device)))
        return [tap.cpu() for tap in found]


def drawn_within(image: NDArray[np.uint8], tile: preprocess.Tile, draw: Callable[[NDArray[np.uint8]], Drawn]) -> Drawn:
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


class _Cutter:
    """Cuts pictures into the tiles that are taken: every one, or so many as fit into memory, evenly."""

    def __init__(self, paths: Sequence[Path], spec: InputSpec, window: Window | None, most: int) -> None:
        sizes = [pictures.read(path).shape for path in paths]
        shared = {size: preprocess.Plan(spec, Roi(), size[0], size[1], window) for size in set(sizes)}
        self.paths, self.plans = paths, [shared[size] for size in sizes]
        self.counts = np.array([len(plan.tiles) for plan in self.plans])
        owner = np.repeat(np.arange(len(paths)), self.counts)
        within = np.concatenate([np.arange(n) for n in self.counts])
        taken = np.linspace(0, len(owner) - 1, min(len(owner), max(1, most))).round().astype(int)
        self.owner, self.within = owner[taken], within[taken]
        """Of each row: its picture, and which of that one's tiles it is."""

    def chunks(self) -> list[NDArray[np.intp]]:
        """Numbers of pictures, in runs of about CHUNK tiles."""
        numbers, counts = np.unique(self.owner, return_counts=True)
        chunk = (np.cumsum(counts) - counts) // CHUNK
        return [numbers[chunk == one] for one in np.unique(chunk)]

    def rows(self, numbers: NDArray[np.intp]) -> slice:
        """Rows of the tiles of pictures in a run."""
        first, last = np.searchsorted(self.owner, [numbers[0], numbers[-1] + 1])
        return slice(int(first), int(last))

    def cut(self, number: int) -> tuple[NDArray[np.intp], NDArray[np.uint8], NDArray[np.uint8], list[preprocess.Tile]]:
        """One picture's rows, with the image, the mask and the place of each. Raises PictureError."""
        plan = self.plans[number]
        images, masks = plan.buffers()
        plan.fill(pictures.read(self.paths[number]), images, masks)
        rows = np.flatnonzero(self.owner == number)
        tiles = self.within[rows]
        return rows, images[tiles], masks[tiles], [plan.tiles[tile] for tile in tiles]

    def image(self, row: int) -> NDArray[np.uint8]:
        """The tile of one row."""
        rows, images, _, _ = self.cut(int(self.owner[row]))
        tile: NDArray[np.uint8] = images[int(np.flatnonzero(rows == row)[0])]
        return tile


class Gatherer:
    """Turns pictures into Material, a batch at a time."""

    def __init__(self, spec: InputSpec, folds: NDArray[np.intp], extractor: Extractor, run: Run) -> None:
        """`folds`: of each tile."""
        self.run, self.extractor, self.folds, tiles = run, extractor, folds, len(folds)
        size, taps = (spec.height, spec.width), extractor.taps
        self.h, self.w = taps.places(*size)
        self.good, self.jittered, self.spoiled = (Store(tiles, size, taps) for _ in range(3))
        self.withheld = Store(WITHHELD * tiles, size, taps)
        self.judged = torch.empty(tiles, self.h, self.w, dtype=torch.bool)
        self.shown = torch.empty(tiles, spec.height // 2, spec.width // 2, 3, dtype=torch.uint8)
        self.waiting: dict[Store, list[tuple[int, NDArray[np.uint8]]]] = {}
        self.pools: dict[int, list[tuple[int, NDArray[np.uint8]]]] = {fold: [] for fold in sorted(set(folds.tolist()))}
        """Good tiles to cut from, with their rows, of each fold: pieces of parts that a network must not know would be taught
        to it as bad."""
        self.drawn: dict[int, NDArray[np.uint8]] = {}
        inside = [np.flatnonzero(folds == fold) for fold in self.pools]
        self.to_show = {int(row) for rows in inside for row in rows[np.linspace(0, len(rows) - 1, SHEET).astype(int)]}

    def half(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A tile at half its size."""
        return _resized(image, (image.shape[1] // 2, image.shape[0] // 2), cv2.INTER_AREA)

    def take(self, number: int, cutter: _Cutter) -> None:
        """One picture: its tiles and their copies. Raises PictureError."""
        rows, images, masks, tiles = cutter.cut(number)
        self.add(number, list(zip(rows.tolist(), images, tiles, strict=True)))
        self.judged[rows] = networks.judged(torch.from_numpy(masks), self.extractor.taps.stride).squeeze(1) > 0
        self.shown[rows] = torch.from_numpy(np.stack([self.half(image) for image in images]))

    def add(self, number: int, tiles: list[tuple[int, NDArray[np.uint8], preprocess.Tile]]) -> None:
        """Take tiles of one picture with their rows, and draw their copies."""
        rng = self.run.rng(number)
        for row, image, tile in tiles:
            pool = self.pools[int(self.folds[row])]
            if len(pool) < _POOL:
                pool.append((row, image))
            elif rng.random() < 0.2:
                pool[rng.integers(_POOL)] = row, image

            def spoilt(
                picture: NDArray[np.uint8], family: synthesis.Family, pool: list[tuple[int, NDArray[np.uint8]]] = pool
            ) -> Drawn:
                _, other = pool[rng.integers(len(pool))]
                other = _resized(other, (picture.shape[1], picture.shape[0]), cv2.INTER_AREA)
                return synthesis.visibly_spoiled(rng, picture, other, family)

            def jittered(picture: NDArray[np.uint8]) -> Drawn:
                return synthesis.jittered(rng, picture), np.zeros(picture.shape[:2], np.uint8)

            moved, _ = drawn_within(image, tile, jittered)
            self._put(self.good, row, image, None)
            self._put(self.jittered, row, moved, None)
            self._put(self.spoiled, row, *drawn_within(moved, tile, lambda p: spoilt(p, synthesis.LEARNED)))
            for n in range(WITHHELD):
                drawn = drawn_within(image, tile, lambda p: spoilt(p, synthesis.WITHHELD))
                self._put(self.withheld, WITHHELD * row + n, *drawn)
            if row in self.to_show:
                self.drawn[WITHHELD * row + n] = self.half(drawn[0])

    def _put(self, store: Store, row: int, image: NDArray[np.uint8], mask: NDArray[np.uint8] | None) -> None:
        if mask is not None:
            share = cv2.resize(mask.astype(np.float32), (self.w, self.h), interpolation=cv2.INTER_AREA)
            store.defective[row] = torch.from_numpy(share)
        waiting = self.waiting.setdefault(store, [])
        waiting.append((row, image))
        if len(waiting) == _BATCH:
            self._flush(store)

    def _flush(self, store: Store) -> None:
        rows, images = zip(*self.waiting.pop(store), strict=True)
        store.put(list(rows), self.extractor(list(images)))

    def finish(self) -> None:
        """Run what still waits through the backbone."""
        for store in list(self.waiting):
            self._flush(store)

    def kept(self, rows: slice) -> dict[str, Any]:
        """What was made of tiles in these rows, for a checkpoint."""
        several = slice(WITHHELD * rows.start, WITHHELD * rows.stop)
        drawn = {row: torch.from_numpy(image) for row, image in self.drawn.items() if several.start <= row < several.stop}
        return {
            "stores": [store.kept(rows) for store in (self.good, self.jittered, self.spoiled)],
            "withheld": self.withheld.kept(several), "drawn": drawn,
            "judged": self.judged[rows].clone(), "shown": self.shown[rows].clone(),
            "pools": {fold: [row for row, _ in pool] for fold, pool in self.pools.items()},
        }  # fmt: skip

    def restore(self, rows: slice, state: dict[str, Any]) -> None:
        """What `kept` gave, but for the pools."""
        self.judged[rows], self.shown[rows] = state["judged"], state["shown"]
        for store, kept in zip((self.good, self.jittered, self.spoiled), state["stores"], strict=True):
            store.restore(rows, kept)
        self.withheld.restore(slice(WITHHELD * rows.start, WITHHELD * rows.stop), state["withheld"])
        self.drawn |= {row: image.numpy() for row, image in state["drawn"].items()}


def gathered(
    paths: Sequence[Path], folds: NDArray[np.intp], spec: InputSpec, window: Window | None, run: Run, source: Source,
    *, most_places: int = MOST_PLACES, int8: bool = False, digest: str | None = None,
) -> Material:  # fmt: skip
    """Features of pictures, of their jittered copies, and of copies with drawn defects.

    `digest`: of the pictures; with it what is made is kept on the disk, and found there. Raises PictureError.
    """
    h, w = source.taps.places(spec.height, spec.width)
    ranges = load_tiles(paths[:: max(1, len(paths) // _RANGES)], spec, window).images[:_RANGES] if int8 else None
    extractor = Extractor(source, spec.height, spec.width, run, ranges)
    about = {
        "seed": run.seed, "digest": digest, "input": spec.model_dump(), "window": window, "int8": int8,
        "backbone": source.used.sha256,
    }  # fmt: skip
    most = most_places * _CHANNELS // (source.taps.depth * h * w)
    if run.left_s() is not None:
        most = min(most, _affordable(paths, spec, window, extractor, run, key_of(about)))
    cutter = _Cutter(paths, spec, window, most)
    owner = cutter.owner
    g = Gatherer(spec, folds[owner], extractor, run)
    _gather(g, cutter, run, key_of(about, folds[owner], owner, cutter.within) if digest is not None else None)
    whole = np.bincount(owner, minlength=len(paths)) == cutter.counts
    return Material(
        g.good, g.jittered, g.spoiled, g.withheld, g.judged, g.shown, g.drawn, folds[owner], owner, whole, g.extractor
    )  # fmt: skip


def _affordable(paths: Sequence[Path], spec: InputSpec, window: Window | None, extractor: Extractor, run: Run, key: str) -> int:
    """Tiles whose features can be had in their share of the time that is left, at least _FEWEST: a few tell what one costs."""
    plan = run.load("features-plan", key)
    if plan is None:
        cutter = _Cutter(paths[:: max(1, len(paths) // _TRIAL)][:_TRIAL], spec, window, _TRIAL)
        trial = Gatherer(spec, np.zeros(len(cutter.owner), np.intp), extractor, run)
        began = time.monotonic()
        for number in np.unique(cutter.owner):
            trial.take(int(number), cutter)
        trial.finish()
        each_s = (time.monotonic() - began) / len(cutter.owner)
        plan = {"tiles": run.shared(max(_FEWEST, int(_SHARE * (run.left_s() or 0.0) / each_s)), 0)}
        run.save("features-plan", key, plan)
    tiles: int = plan["tiles"]
    return tiles


def _gather(g: Gatherer, cutter: _Cutter, run: Run, key: str | None) -> None:
    """Take every picture, or what an earlier run has kept of it under this key."""
    done, everything = 0, len(np.unique(cutter.owner))
    pools: dict[int, list[int]] | None = None
    for index, numbers in enumerate(cutter.chunks()):
        rows, name = cutter.rows(numbers), f"features-{index}"
        state = run.load(name, key) if key is not None else None
        if state is not None:
            g.restore(rows, state)
            pools, done = state["pools"], done + len(numbers)
            continue
        if pools is not None:  # what is cut from must be what it would be without the interruption
            g.pools = {fold: [(row, cutter.image(row)) for row in pool] for fold, pool in pools.items()}
            pools = None
        for number in numbers:
            g.take(int(number), cutter)
            done += 1
            run.step("features", done, everything)
        g.finish()
        if key is not None:
            run.save(name, key, g.kept(rows))
