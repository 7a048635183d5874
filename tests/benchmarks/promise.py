"""Is the promise kept? python -m tests.benchmarks.promise FOLDER [--splits 50] [--pictures 150] [--side 128] [--steps 40]

Good parts of FOLDER/train/good and FOLDER/test/good are thrown together. For each random split some are trained on, as
`train` does (folds, weights, threshold), and the rest are judged by the network for all: is the share rejected above the
promised one? Defective pictures are judged as well, for the recall. Features are computed once; the defaults here are
smaller than the product's, so that hundreds of splits can be afforded: worse networks, which a promise must survive. One
line of JSON a split is appended to --out, and what is there is not run again. --table prints what --out holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edge_inspector import scoring
from edge_inspector.training import data
from edge_inspector.training.evaluation import labelled
from edge_inspector.training.networks import feature_anogan as networks
from edge_inspector.training.networks import feature_fit as fitting
from edge_inspector.training.networks import feature_weights as weights_of
from edge_inspector.training.networks.feature_material import WITHHELD, Material, Store, gathered, parts
from edge_inspector.training.normals import Usual
from edge_inspector.training.run import Run, key_of

WISHES = tuple(scoring.Wish(rate, sure=sure) for sure in (False, True) for rate in (0.02, 0.05))


def part_of(material: Material, index: Tensor, folds: np.ndarray) -> Material:
    """Some of the pictures, of one tile each."""
    drawn = (WITHHELD * index[:, None] + torch.arange(WITHHELD)).flatten()
    return Material(
        material.good.some(index), material.jittered.some(index), material.spoiled.some(index),
        material.withheld.some(drawn), material.judged[index], material.shown[index], {}, folds, np.arange(len(index)),
        np.ones(len(index), bool),
        material.extractor,
    )  # fmt: skip


@torch.no_grad()
def judged(
    heads: networks.Heads,
    weighing: weights_of.Weighing,
    usual: Usual,
    store: Store,
    counted: Tensor,
    index: Tensor,
) -> np.ndarray:
    """Scores of tiles by one network."""
    mean, spread = weights_of.tensors(usual)
    gain = torch.tensor(weighing.weights)[:, None, None] / spread
    found = []
    for some in parts(index):
        total = networks.fused(weights_of.term_maps(heads, store, some), mean, gain)
        found.append(networks.finished(total, counted[some, None], torch.ones(()))[0].numpy())
    return np.concatenate(found)


def main() -> None:
    """Split, train, judge, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--splits", type=int, default=50)
    parser.add_argument("--pictures", type=int, default=150)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--prototypes", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("promise.jsonl"))
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        summary(given.out)
        return
    family = fitting.FeatureAnogan(side=given.side, prototypes=given.prototypes, steps=given.steps)
    with tempfile.TemporaryDirectory() as scratch:
        pool, bad = Path(scratch) / "pool", Path(scratch) / "bad"
        kinds = {kind: list(paths) for kind, paths in labelled(given.folder).kinds.items()}
        goods = sorted((given.folder / "train" / "good").iterdir()) + kinds.pop("good")
        for where, paths in (
            (pool, goods),
            (bad, [p for k in kinds.values() for p in k][:: max(1, sum(map(len, kinds.values())) // 100)]),
        ):
            where.mkdir()
            for number, path in enumerate(paths):
                (where / f"{number:05d}{path.suffix}").symlink_to(path.resolve())
        work = Path(scratch) / "work"
        work.mkdir()
        run = Run(work)
        surveyed = data.survey(pool)
        spec = family.input_spec(surveyed, None, 0.0)
        material = gathered(surveyed.paths, surveyed.folds(family.folds), spec, None, run, family.source)
        defective = gathered(sorted(bad.iterdir()), np.zeros(len(list(bad.iterdir())), np.intp), spec, None, run, family.source)
        known = given.out.read_text().splitlines() if given.out.exists() else []
        done = sum(json.loads(line)["set"] == given.folder.name for line in known)
        for split in range(done, given.splits):
            rng = np.random.default_rng(split)
            index = np.sort(rng.permutation(len(goods))[: given.pictures])
            rest = torch.from_numpy(np.setdiff1d(np.arange(len(goods)), index))
            some = dataclasses.replace(surveyed, paths=tuple(surveyed.paths[i] for i in index))
            ours = part_of(material, torch.from_numpy(index), some.folds(family.folds))
            every = family.heads(ours, Run(Path(tempfile.mkdtemp(dir=work)), seed=split), key_of({"split": split}))
            crossed = weights_of.cross_fit(ours, every)
            weighing = weights_of.weighed(crossed)
            judge = every[-1], weighing, crossed.usual
            held = crossed.scores(weighing.weights, spoiled=False).tolist()
            fresh = judged(*judge, material.good, material.judged, rest)
            wrong = judged(*judge, defective.good, defective.judged, torch.arange(len(defective.judged)))
            line: dict[str, object] = {
                "set": given.folder.name,
                "split": split,
                "n": len(held),
                "fresh": len(fresh),
                "terms": list(weighing.terms),
            }
            for wish in WISHES:
                made = scoring.promise(held, wish)
                line[str(wish)] = {
                    "kept": made.kept, "false_rejects": float((fresh > made.threshold).mean()),
                    "recall": float((wrong > made.threshold).mean()),
                }  # fmt: skip
            with given.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
    summary(given.out)


def summary(out: Path) -> None:
    """For each set and wish: good parts rejected on average, in how many splits more than was asked for, defects found."""
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    print("| set |", " | ".join(str(wish) for wish in WISHES), "|")
    for name in dict.fromkeys(line["set"] for line in lines):
        cells = []
        for wish in WISHES:
            found = [line[str(wish)] for line in lines if line["set"] == name]
            rejected, recall = (100 * np.mean([split[key] for split in found]) for key in ("false_rejects", "recall"))
            above = sum(split["false_rejects"] > wish.rate for split in found)
            cells.append(f"{rejected:.1f} %, more in {above} of {len(found)}, {recall:.0f} % found")
        print(f"| {name} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
