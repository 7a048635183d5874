"""How good a bundle is on labelled pictures: AUROC, and false rejects and escapes at its threshold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_inspector import pictures, scoring
from edge_inspector.errors import InspectorError
from edge_inspector.runtime import Engine
from edge_inspector.training import calibrate


@dataclass(frozen=True)
class Rate:
    """k of n, with its exact 95 % confidence interval."""

    k: int
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """Exact 95 % confidence interval."""
        return scoring.interval(self.k, self.n)

    def __str__(self) -> str:
        low, high = self.interval
        share = f"{self.k / self.n:.1%}" if self.n else "none"
        return f"{share} ({self.k} of {self.n}; 95 % interval {low:.1%} to {high:.1%})"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"k": self.k, "n": self.n, "rate": self.k / self.n if self.n else None, "interval95": self.interval}


@dataclass(frozen=True)
class Evaluation:
    """The figures. `auroc` is None without both good and bad parts."""

    bundle: str
    threshold: float
    auroc: float | None
    false_reject: Rate
    escape: Rate
    escape_by_kind: dict[str, Rate]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "bundle": self.bundle,
            "threshold": self.threshold,
            "auroc": self.auroc,
            "false_reject": self.false_reject.to_json(),
            "escape": self.escape.to_json(),
            "escape_by_kind": {kind: rate.to_json() for kind, rate in self.escape_by_kind.items()},
        }


def labelled(folder: Path) -> dict[str, list[Path]]:
    """Pictures by kind: subfolder names of FOLDER/test or FOLDER; `good` are the good parts. Raises InspectorError."""
    root = folder / "test" if (folder / "test").is_dir() else folder
    kinds = {p.name: pictures.listed(p) for p in sorted(root.iterdir()) if p.is_dir()} if root.is_dir() else {}
    if not kinds:
        raise InspectorError(
            f"{folder}: no labelled pictures", hint="expected subfolders: good/ and one for each kind of defect"
        )
    return kinds


def evaluate(engine: Engine, folder: Path, tick: Callable[[], None] = lambda: None) -> Evaluation:
    """Judge every labelled picture with an open engine. Raises InspectorError, PictureError."""
    manifest = engine.bundle.manifest
    found = {kind: calibrate.scores(engine, paths, tick) for kind, paths in labelled(folder).items()}
    good = found.pop("good", [])
    bad = [score for scores in found.values() for score in scores]

    def escaped(scores: list[float]) -> Rate:
        return Rate(sum(not score > manifest.threshold for score in scores), len(scores))

    return Evaluation(
        bundle=f"{manifest.name}-{manifest.release}",
        threshold=manifest.threshold,
        auroc=scoring.auroc(good, bad) if good and bad else None,
        false_reject=Rate(len(good) - escaped(good).k, len(good)),
        escape=escaped(bad),
        escape_by_kind={kind: escaped(scores) for kind, scores in found.items()},
    )
