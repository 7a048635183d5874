"""What teaching brings: python -m tests.benchmarks.teaching SET... [--pictures 200] [--draws 5] [--out teaching.jsonl]

Each SET is a folder in MVTec layout. A bundle is trained by the product's own defaults; then it is shown 1, 5, 10 and 20
defective test pictures, without masks, and 20 good test pictures, several draws of each, by the product's own command. Every
line tells what the bundle finds and rejects among the test pictures that were not shown, before and after. What is in --out is
not run again; --table prints it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_inspector import bundles, pictures, signatures
from edge_inspector.errors import TrainingError
from edge_inspector.runtime import OnnxEngine
from edge_inspector.runtime.engine import picture_score
from edge_inspector.training import orders
from edge_inspector.training.evaluation import labelled
from edge_inspector.training.networks.feature_fit import FeatureAnogan
from edge_inspector.training.teaching import lesson

SHOWN = (1, 5, 10, 20)


def scores(folder: Path, trust: Path, paths: list[Path]) -> NDArray[np.float64]:
    """Scores of pictures as multiples of a bundle's threshold."""
    opened = bundles.open_bundle(folder, trust)
    with OnnxEngine(opened, threads=1) as engine:
        found = [picture_score(engine, pictures.read(path)) for path in paths]
    return np.array(found) / opened.manifest.threshold


def trained(good: Path, most: int, family: FeatureAnogan, work: Path) -> Path:
    """A bundle of the family; of more pictures so many are taken, evenly."""
    listed = sorted(good.iterdir())
    some = work / "good"
    some.mkdir()
    for i in np.unique(np.linspace(0, len(listed) - 1, min(most, len(listed))).round().astype(int)):
        (some / listed[i].name).symlink_to(listed[i].resolve())
    signatures.create_key(work / "key", work / "trust")
    key = signatures.read_private_key(work / "key")
    order = orders.Order(folder=some, out=work / "bundle", product="set", name="set", key=key, family=family)
    return orders.train(order).folder


def lessons(draws: int, bad: list[Path], good: list[Path]) -> Iterator[tuple[str, int, int, list[Path]]]:
    """What is shown: its option, how many, the draw, and the pictures."""
    for draw in range(draws):
        for option, count, paths in (*(("defects", count, bad) for count in SHOWN), ("good", 20, good)):
            if count <= len(paths) // 2:
                chosen = np.random.default_rng((draw, count)).choice(len(paths), count, replace=False)
                yield option, count, draw, [paths[i] for i in sorted(chosen)]


def measured(folder: Path, most: int, draws: int, family: FeatureAnogan) -> Iterator[dict[str, Any]]:
    """Train on one set, then a line for each lesson."""
    kinds = labelled(folder).kinds
    good = list(kinds["good"])
    bad = [path for kind, paths in kinds.items() if kind != "good" for path in paths]
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        bundle, trust = trained(folder / "train" / "good", most, family, work), work / "trust"
        before = dict(zip([*good, *bad], scores(bundle, trust, [*good, *bad]), strict=True))
        for option, count, draw, chosen in lessons(draws, bad, good):
            shown, out = work / "shown", work / "taught"
            shutil.rmtree(shown, ignore_errors=True)
            shutil.rmtree(out, ignore_errors=True)
            shown.mkdir()
            for number, path in enumerate(chosen):
                (shown / f"{number:03d}{path.suffix}").symlink_to(path.resolve())
            key = signatures.read_private_key(work / "key")
            order = lesson.Order(
                bundle, trust, out, key, shown if option == "defects" else None, shown if option == "good" else None,
                accept_loss=True,
            )  # fmt: skip
            began = time.monotonic()
            refused, weight = "", 0.0
            try:
                weight = lesson.teach(order).weight
            except TrainingError as error:
                refused = error.message
            seconds = time.monotonic() - began
            rest = [path for path in [*good, *bad] if path not in set(chosen)]
            after = before if refused else dict(zip(rest, scores(out, trust, rest), strict=True))
            line: dict[str, Any] = {
                "set": folder.name, "shown": option, "count": count, "draw": draw, "weight": weight,
                "refused": refused, "seconds": seconds,
            }  # fmt: skip
            for name, paths in (("rejected", good), ("found", bad)):
                of = [path for path in rest if path in set(paths)]
                line[name] = [float(np.mean([those[path] > 1 for path in of])) for those in (before, after)]
            missed = [path for path in rest if path in set(bad) and before[path] <= 1]
            line["missed_found"] = float(np.mean([after[path] > 1 for path in missed])) if missed else None
            yield line


def table(out: Path) -> None:
    """Mean and worst case over draws."""
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    print("| set | shown | found before -> after (worst change) | rejected before -> after | refused | s |")
    for name, option, count in sorted({(line["set"], line["shown"], line["count"]) for line in lines}):
        some = [line for line in lines if (line["set"], line["shown"], line["count"]) == (name, option, count)]
        found, rejected = (100 * np.array([line[key] for line in some]) for key in ("found", "rejected"))
        worst = (found[:, 1] - found[:, 0]).min()
        print(
            f"| {name} | {count} {option} | {found[:, 0].mean():.1f} -> {found[:, 1].mean():.1f} ({worst:+.1f})"
            f" | {rejected[:, 0].mean():.1f} -> {rejected[:, 1].mean():.1f}"
            f" | {sum(bool(line['refused']) for line in some)} of {len(some)}"
            f" | {np.median([line['seconds'] for line in some]):.0f} |"
        )


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", type=Path)
    parser.add_argument("--pictures", type=int, default=200)
    usual = FeatureAnogan()
    parser.add_argument("--side", type=int, default=usual.side)
    parser.add_argument("--prototypes", type=int, default=usual.prototypes)
    parser.add_argument("--steps", type=int, default=usual.steps)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("teaching.jsonl"))
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        table(given.out)
        return
    family = FeatureAnogan(side=given.side, prototypes=given.prototypes, steps=given.steps)
    for folder in given.sets:
        done = given.out.read_text() if given.out.exists() else ""
        if f'"set": "{folder.name}"' in done:
            continue
        lines = list(measured(folder, given.pictures, given.draws, family))
        with given.out.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        print(folder.name, "done", flush=True)


if __name__ == "__main__":
    main()
