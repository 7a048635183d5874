"""Detection on real sets, with references and the ablation: python -m tests.benchmarks.detection SET... [--seeds 1 2 3]

Each SET is a folder in MVTec layout, FOLDER:PREFIX for the files of a set whose names begin so, or `elpv:mono`, `elpv:poly`
from the package elpv-dataset (label 0.0 against 1.0; a third of the good cells is for testing). Of more than --pictures good
ones so many are taken, evenly in name order. One line of JSON for each set and seed is appended to --out, and what is there
is not run again; `tests.benchmarks.tables` prints what is there.

The references see the same frozen features of the same pictures: PaDiM (full covariance at each place, good and jittered
tiles) and PatchCore (coreset of standardised features: twice the flagship's bank, and 1 % of all patches as published).
Every term of the flagship and their sums are scored too. No label is read before all scores are made.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_inspector import pictures, preprocess, scoring
from edge_inspector.roi import Roi
from edge_inspector.training import data, normals
from edge_inspector.training.evaluation import Trivial, aupro, detection, labelled, mask_of
from edge_inspector.training.networks import feature_anogan as networks
from edge_inspector.training.networks import feature_fit as fitting
from edge_inspector.training.networks import feature_weights as weights_of
from edge_inspector.training.networks.feature_material import Extractor, Material, gathered, parts
from edge_inspector.training.run import Run, key_of

PROTOTYPES, SHARE, ROWS = 2048, 0.01, 60_000
MAP_PX, BATCH = 256, 16
SUMS = ((0, 0, 1), *(
    (gaussian, bank, discriminator) for gaussian in (0, 0.5, 1) for bank in (0, 0.5, 1) for discriminator in (0, 0.25, 0.5, 1) if gaussian + bank
))  # fmt: skip
"""Weights of the terms for the ablation."""
RATES = (0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5)
"""Shares of good test parts rejected, of the curve of escapes."""


def padim(heads: networks.Heads, material: Material) -> Callable[[Tensor], Tensor]:
    """A Gaussian with full covariance at each place (Defard et al. 2021): features -> map."""
    count = 2 * len(material.good)
    total = torch.zeros(material.good.depth, *material.judged.shape[1:])
    products = torch.zeros(total[0].numel(), material.good.depth, material.good.depth)
    for store in (material.good, material.jittered):
        for part in parts(torch.arange(len(store))):
            f = heads.standardised(store.raw(part))
            total += f.sum(0)
            x = f.flatten(2).permute(2, 0, 1)
            products.baddbmm_(x.mT, x)
    mean = total / count
    centre = mean.flatten(1).T
    covariance = products.div_(count) - centre[:, :, None] * centre[:, None, :]
    inverse = torch.linalg.inv(covariance + 0.05 * torch.eye(material.good.depth))

    def apply(f: Tensor) -> Tensor:
        away = (f - mean).flatten(2).permute(2, 0, 1)
        distance: Tensor = ((away @ inverse) * away).sum(2).T.clamp(min=0).sqrt()
        return distance.reshape(len(f), 1, *f.shape[2:])

    return apply


def patchcore(heads: networks.Heads, material: Material, run: Run, count: int = PROTOTYPES) -> Callable[[Tensor], Tensor]:
    """Distance to the nearest of a coreset of standardised features (Roth et al. 2022): features -> map."""
    rows = []
    for part in parts(torch.arange(len(material.good))):
        f = heads.standardised(material.good.raw(part)).permute(0, 2, 3, 1).reshape(-1, material.good.depth)
        share = ROWS * len(part) // len(material.good)
        rows.append(f[torch.randperm(len(f), generator=run.seeded(7, int(part[0])))[:share]])
    every = torch.cat(rows)
    chosen = every[normals.centres(every.numpy(), min(count, len(every)), run.rng(8))]

    def apply(f: Tensor) -> Tensor:
        nearest = torch.cdist(f.permute(0, 2, 3, 1).flatten(0, 2), chosen).amin(1)
        return nearest.reshape(len(f), 1, *f.shape[2:])

    return apply


def elpv(kind: str, folder: Path) -> None:
    """Write cells of one kind as a set: good 0.0, defective 1.0; every third good cell is for testing."""
    from elpv_dataset.utils import load_dataset

    images, probability, kinds = load_dataset()
    for name in ("train/good", "test/good", "test/defective"):
        (folder / name).mkdir(parents=True)
    good = 0
    for number, (image, p, found) in enumerate(zip(images, probability, kinds, strict=True)):
        if found != kind or p not in (0.0, 1.0):
            continue
        good += p == 0
        place = "test/defective" if p else "test/good" if good % 3 == 0 else "train/good"
        pictures.write(folder / place / f"{number:04d}.png", image)


class Reader:
    """Pictures -> standardised features, as the network sees them."""

    def __init__(self, family: fitting.FeatureAnogan, surveyed: data.Pictures, run: Run) -> None:
        self.spec = family.input_spec(surveyed, None, 0.0)
        self.extractor = Extractor(family.source, self.spec.height, self.spec.width, run)

    def __call__(self, heads: networks.Heads, images: list[NDArray[Any]]) -> tuple[Tensor, Tensor]:
        tiles, valid = [], []
        for image in images:
            plan = preprocess.Plan(self.spec, Roi(), image.shape[0], image.shape[1])
            buffers = plan.buffers()
            plan.fill(image, *buffers)
            tiles.append(buffers[0][0])
            valid.append(buffers[1][0])
        taps = self.extractor.taps
        features = networks.patches(self.extractor(tiles), taps.strides)
        return heads.standardised(features), networks.judged(torch.from_numpy(np.stack(valid)), taps.stride)


def part_of(folder: Path, prefix: str, out: Path) -> Path:
    """Links to the files of a set whose names begin with `prefix`."""
    for path in folder.rglob(f"{prefix}*.*"):
        link = out / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    return out


def opened(sets: Sequence[str], seeds: Sequence[int], out: Path) -> Iterator[tuple[str, int, Path, Path]]:
    """Name, seed, folder and an empty work folder of each run that `out` has no line of."""
    done = {(line["set"], line["seed"]) for line in map(json.loads, out.read_text().splitlines())} if out.exists() else set()
    for seed in seeds:
        for given in sets:
            where, _, part = given.partition(":")
            name = f"{Path(where).name}-{part}" if part else Path(where).name
            if (name, seed) in done:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                folder, work = Path(scratch) / name, Path(scratch) / "work"
                work.mkdir()
                if where == "elpv":
                    elpv(part, folder)
                else:
                    part_of(Path(where), part, folder)
                yield name, seed, folder, work


def measured(folder: Path, seed: int, most: int, family: fitting.FeatureAnogan, work: Path) -> dict[str, Any]:
    """Train on one set, score everything, then read the labels."""
    began, cpu = time.monotonic(), time.process_time()
    surveyed = data.survey(folder / "train" / "good")
    taken = np.unique(np.linspace(0, len(surveyed.paths) - 1, min(most, len(surveyed.paths))).round().astype(int))
    surveyed = dataclasses.replace(surveyed, paths=tuple(surveyed.paths[i] for i in taken))
    run = Run(work, seed=seed)
    spec = family.input_spec(surveyed, None, 0.0)
    folds = surveyed.folds(family.folds)
    material = gathered(surveyed.paths, folds, spec, None, run, family.source)
    every = family.heads(material, run, key_of({"seed": seed}))
    crossed = weights_of.cross_fit(material, every)
    weighing = weights_of.weighed(crossed)
    seconds, cpu_s = time.monotonic() - began, time.process_time() - cpu
    heads = every[-1]
    sums = {"flagship": weighing.weights} | {called(c): c for c in SUMS}
    mean, spread = weights_of.tensors(crossed.usual)
    patches = len(material.good) * material.judged[0].numel()
    alone = {
        "PaDiM": padim(heads, material), "PatchCore": patchcore(heads, material, run),
        "PatchCore 1 %": patchcore(heads, material, run, round(SHARE * patches)),
    }  # fmt: skip
    held = crossed.scores(weighing.weights, spoiled=False)
    drawn = crossed.scores(weighing.weights, spoiled=True)
    good_scores = np.full(len(surveyed.paths), -np.inf)
    np.maximum.at(good_scores, material.picture, held)
    del material
    reader, kernel, one = Reader(family, surveyed, run), networks.smoothing_kernel(), torch.ones(())
    scores: dict[str, list[float]] = {name: [] for name in (*sums, *alone)}
    maps: dict[str, list[NDArray[np.float32]]] = {name: [] for name in scores}
    kinds, masks, trivial = [], [], Trivial()
    listed = [(kind, path) for kind, paths in labelled(folder).kinds.items() for path in paths]
    for start in range(0, len(listed), BATCH):
        batch = listed[start : start + BATCH]
        images = [pictures.read(path) for _, path in batch]
        with torch.no_grad():
            f, counted = reader(heads, images)
            coarse = heads.generator.coarse(torch.nn.functional.avg_pool2d(f, 2))
            terms = torch.cat([heads.term(name, f, coarse) for name in networks.TERMS], 1)
            smooth = networks.smoothed(terms, kernel)
            gains = {name: torch.tensor(weights)[:, None, None] / spread for name, weights in sums.items()}
            fused = {name: networks.fused(smooth, mean, gain) for name, gain in gains.items()}
            fused |= {name: networks.smoothed(reference(f), kernel) for name, reference in alone.items()}
        for name, total in fused.items():
            score, anomaly = networks.finished(total, counted, one)
            scores[name] += score.tolist()
            maps[name] += list(anomaly.numpy())
        for (kind, path), image in zip(batch, images, strict=True):
            trivial.add(kind, image)
            kinds.append(kind)
            mask = np.zeros(image.shape[:2], np.uint8) if kind == "good" else mask_of(folder, kind, path)
            masks.append(None if mask is None else _shrunk(mask))
    good = np.array([kind == "good" for kind in kinds])
    promises = {}
    for wish in (scoring.Wish(rate, sure=sure) for sure in (False, True) for rate in (0.02, 0.05)):
        promise = scoring.promise(good_scores.tolist(), wish)
        flagged = np.array(scores["flagship"]) > promise.threshold
        promises[str(wish)] = {
            "kept": promise.kept,
            "false_rejects": float(flagged[good].mean()),
            "recall": float(flagged[~good].mean()),
            "drawn": float((drawn > promise.threshold).mean()),
        }
    return {
        "set": folder.name, "seed": seed, "input": [spec.height, spec.width], "pictures": len(surveyed.paths),
        "terms": called(weighing.weights), "drawn_auroc": {called(c): value for c, value in weighing.tried.items()},
        "train_s": seconds, "train_cpu_s": cpu_s, "load": os.getloadavg()[0], "promise": promises,
        "curve": escapes(np.array(scores["flagship"]), good), "trivial": trivial.auroc(), "methods": {name: _figures(name, scores, maps, masks, good) for name in scores},
    }  # fmt: skip


def escapes(scores: NDArray[np.float64], good: NDArray[np.bool_]) -> dict[str, float]:
    """Share of defective parts that pass where the threshold rejects each of RATES of the good ones."""
    thresholds = np.quantile(scores[good], 1 - np.array(RATES), method="higher")
    return {str(rate): float((scores[~good] <= at).mean()) for rate, at in zip(RATES, thresholds, strict=True)}


def _shrunk(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    share = cv2.resize(mask.astype(np.float32), (MAP_PX, MAP_PX), interpolation=cv2.INTER_AREA)
    return (share > 0).astype(np.uint8)


def _figures(
    name: str, scores: dict[str, list[float]], maps: dict[str, list[NDArray[np.float32]]],
    masks: list[NDArray[np.uint8] | None], good: NDArray[np.bool_],
) -> dict[str, float]:  # fmt: skip
    values = np.array(scores[name])
    figures = detection(values[good], values[~good]).to_json()
    known = [i for i, mask in enumerate(masks) if mask is not None]
    if any(masks[i].any() for i in known):  # type: ignore[union-attr]
        large = [cv2.resize(maps[name][i], (MAP_PX, MAP_PX), interpolation=cv2.INTER_LINEAR).astype(np.float32) for i in known]
        figures["aupro"] = aupro(large, [masks[i] for i in known])  # type: ignore[misc]
    return figures


def called(weights: Sequence[float]) -> str:
    """The name of a sum of terms."""
    return " + ".join(f"{w:g} {name}" for w, name in zip(weights, networks.TERMS, strict=True) if w)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--pictures", type=int, default=200)
    usual = fitting.FeatureAnogan()
    parser.add_argument("--backbone", default=usual.backbone)
    parser.add_argument("--side", type=int, default=usual.side)
    parser.add_argument("--prototypes", type=int, default=usual.prototypes)
    parser.add_argument("--steps", type=int, default=usual.steps)
    parser.add_argument("--out", type=Path, default=Path("detection.jsonl"))
    given = parser.parse_args()
    family = fitting.FeatureAnogan(
        side=given.side, prototypes=given.prototypes, steps=given.steps, backbone=given.backbone
    )  # fmt: skip
    for name, seed, folder, work in opened(given.sets, given.seeds, given.out):
        found = measured(folder, seed, given.pictures, family, work)
        with given.out.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(name, seed, {method: round(100 * f["auroc"], 2) for method, f in found["methods"].items()}, flush=True)


if __name__ == "__main__":
    main()
