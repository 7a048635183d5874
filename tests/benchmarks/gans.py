"""f-AnoGAN and AnoGAN on real sets: python -m tests.benchmarks.gans SET... [--minutes 5] [--anogan-steps 100]

Each SET as in tests.benchmarks.detection. f-AnoGAN is trained with the product's defaults for so many minutes, on at most
--pictures good ones, and judges every test picture; AnoGAN searches latents of the same networks for at most 64 good and 64
bad ones, since it takes a second for each. One line of JSON for each set and seed is appended to --out; what is there is not
run again. No label is read before all scores are made.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_inspector import scoring
from edge_inspector.training import data, watching
from edge_inspector.training.evaluation import detection, labelled
from edge_inspector.training.networks import anogan
from edge_inspector.training.networks.fanogan_fit import Fanogan, Fitter, scored
from edge_inspector.training.run import Run
from tests.benchmarks.detection import opened

MOST = 64


def measured(folder: Path, given: argparse.Namespace, seed: int, work: Path) -> dict[str, Any]:
    """Train, score, then read the labels."""
    surveyed = data.survey(folder / "train" / "good")
    taken = np.unique(np.linspace(0, len(surveyed.paths) - 1, min(given.pictures, len(surveyed.paths))).round().astype(int))
    surveyed = dataclasses.replace(surveyed, paths=tuple(surveyed.paths[i] for i in taken))
    settings = Fanogan(width=given.width)
    spec = settings.input_spec(surveyed, None, 0.0)
    held = surveyed.folds(4) == 3
    tiles = data.load_tiles(surveyed.paths, spec, None)
    began, cpu = time.monotonic(), time.process_time()
    fitter = Fitter(tiles.of(~held).images, settings, Run(work, seed=seed, minutes=given.minutes), surveyed.digest)
    fitter.hurry()
    graph = fitter.graph()
    graph.balance(torch.from_numpy(tiles.of(~held).images))
    seconds, cpu_s = time.monotonic() - began, time.process_time() - cpu
    watched = watching.watch(fitter.drawn, tiles.of(~held).images, tiles.of(held).images)
    listed = [(kind, path) for kind, paths in labelled(folder).kinds.items() for path in paths]
    test = data.load_tiles([path for _, path in listed], spec, None)
    found = scored(graph, test, len(listed))
    good = np.array([kind == "good" for kind, _ in listed])
    rng = np.random.default_rng(seed)
    some = np.concatenate([rng.permutation(np.flatnonzero(group))[:MOST] for group in (good, ~good)])
    searched = anogan.scores(fitter.g, fitter.d, test.images[some], steps=given.anogan_steps, seed=seed)
    return {
        "set": folder.name, "seed": seed, "width": given.width, "pictures": len(surveyed.paths), "train_s": seconds, "train_cpu_s": cpu_s,
        "steps": [fitter.settings.gan_steps, fitter.settings.encoder_steps], **watched.figures(),
        "fanogan": detection(found[good], found[~good]).to_json(),
        "anogan_auroc": scoring.auroc(searched[good[some]], searched[~good[some]]),
        "fanogan_auroc_of_the_same": scoring.auroc(found[some][good[some]], found[some][~good[some]]),
    }  # fmt: skip


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--width", type=int, default=64, help="of the networks; 64 is the paper's, for a GPU")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--anogan-steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("gans.jsonl"))
    given = parser.parse_args()
    for name, seed, folder, work in opened(given.sets, given.seeds, given.out):
        found = measured(folder, given, seed, work)
        with given.out.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(name, seed, found, flush=True)


if __name__ == "__main__":
    main()
