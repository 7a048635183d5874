"""Verbs that judge pictures with a bundle: evaluate, inspect."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from edge_inspector.cli.regions import PolygonOption, RectangleOption, batch_of, region
from edge_inspector.cli.shown import (
    BundleArgument,
    JsonOption,
    TrustOption,
    complain,
    err,
    one_line,
    out,
    print_json,
    progress_bar,
)  # fmt: skip
from edge_inspector.errors import InspectorError, PictureError
from edge_inspector.frames import Frame, frozen, utc_now
from edge_inspector.results import Result, Verdict

if TYPE_CHECKING:
    from edge_inspector.inspector import View
    from edge_inspector.roi import Roi
    from edge_inspector.runtime import Engine
    from edge_inspector.training.evaluation import Evaluation, Wrong

_TRUST = Path("trust")


def evaluate(
    bundle: BundleArgument,
    folder: Annotated[Path, typer.Argument(help="labelled pictures: good/ and one subfolder for each kind of defect")],
    rectangle: RectangleOption = None,
    polygon: PolygonOption = None,
    save: Annotated[Path | None, typer.Option(help="write a picture of each part judged wrongly into this folder")] = None,
    trust: TrustOption = _TRUST,
    as_json: JsonOption = False,
) -> None:
    """AUROC, false rejects and escapes of a bundle on labelled pictures. Exit code 2: some pictures were not judged."""
    from edge_inspector.bundles import open_bundle  # noqa: PLC0415
    from edge_inspector.runtime import OnnxEngine  # noqa: PLC0415
    from edge_inspector.training.evaluation import evaluate as run  # noqa: PLC0415
    from edge_inspector.training.evaluation import labelled  # noqa: PLC0415

    total = sum(len(paths) for paths in labelled(folder).kinds.values())
    roi, opened, shown = region(rectangle, polygon), open_bundle(bundle, trust), Saved(save)
    with OnnxEngine(opened, batch=batch_of(opened)) as engine, progress_bar() as bar:
        task = bar.add_task("judging", total=total, figures="")
        found = run(engine, folder, lambda: bar.advance(task), roi, shown.wrong)
    for line in (*found.notes, *(f"not judged: {why}" for _, why in found.unreadable)):
        err.print(line, style="yellow", markup=False)
    if as_json:
        print_json(found.to_json())
    else:
        _print(found)
    raise typer.Exit(2 if found.unreadable or found.doubtful else 0)


def _print(found: Evaluation) -> None:
    """The figures for people."""
    table = Table(box=None, show_header=False)
    table.add_row("bundle", found.bundle)
    image = found.detection
    if image is None:
        table.add_row("image AUROC", "needs good and bad parts")
    else:
        table.add_row("image AUROC", f"{image.auroc:.4f}")
        table.add_row("average precision", f"{image.average_precision:.4f}")
        table.add_row("best F1", f"{image.max_f1:.4f}")
        for recall, fpr in image.fpr_at_recall.items():
            table.add_row(f"good parts rejected where {recall} % of defects are found", f"{fpr:.1%}")
    if found.aupro is not None:
        table.add_row("pixel AUROC, AUPRO to 30 %", f"{found.pixel_auroc:.4f}, {found.aupro:.4f}")
    table.add_row(f"at threshold {found.threshold:.4g}", "")
    table.add_row("  good parts rejected", str(found.false_reject))
    table.add_row("  defective parts passed", str(found.escape))
    for kind, rate in found.escape_by_kind.items():
        auroc = f", AUROC {found.auroc_by_kind[kind]:.4f}" if kind in found.auroc_by_kind else ""
        table.add_row(f"    {escape(kind)}", f"{rate}{auroc}")
    for trivial, auroc_ in found.trivial.items():
        table.add_row(f"AUROC of {trivial} alone", f"{auroc_:.4f}")
    out.print(table)


def inspect(
    bundle: BundleArgument,
    files: Annotated[list[Path], typer.Argument(help="picture files, or folders of them")],
    rectangle: RectangleOption = None,
    polygon: PolygonOption = None,
    trust: TrustOption = _TRUST,
    save: Annotated[Path | None, typer.Option(help="write a picture of each part that was judged into this folder")] = None,
    as_json: JsonOption = False,
) -> None:
    """Judge picture files. Exit code 0: all pass, 1: some do not, 2: trouble, or something was not judged."""
    from edge_inspector.bundles import open_bundle  # noqa: PLC0415
    from edge_inspector.runtime import OnnxEngine  # noqa: PLC0415

    opened, shown = open_bundle(bundle, trust), Saved(save)
    parts, left_out = _parts(files)
    with OnnxEngine(opened, batch=batch_of(opened)) as engine:
        judge = _Judge(engine, region(rectangle, polygon), explain=save is not None)
        results = []
        for number, (path, name) in enumerate(parts):
            result, views = judge.judged(number, path, name)
            results.append(result)
            if not as_json:
                out.print(one_line(result))
            for view in views:
                shown.view(name, view)
    if as_json:
        print_json([result.model_dump(mode="json", by_alias=True, exclude_none=True) for result in results])
    not_passed = any(result.verdict is not Verdict.PASS for result in results)
    raise typer.Exit(2 if judge.unreadable or left_out else int(not_passed))


def _parts(files: list[Path]) -> tuple[list[tuple[Path, str]], bool]:
    """Pictures with the names of their parts, and whether something that may be a part was left out; it is told."""
    from edge_inspector import pictures  # noqa: PLC0415

    paths: list[Path] = []
    left_out = False
    for given in files:
        listing = pictures.listed(given) if given.is_dir() else None
        paths += listing.taken if listing else [given]
        left_out |= bool(listing and listing.doubtful)
        for line in listing.told if listing else ():
            err.print(line, style="yellow", markup=False)
    folder = files[0] if len(files) == 1 and files[0].is_dir() else None
    within = paths if folder or len({path.name for path in paths}) < len(paths) else [Path(path.name) for path in paths]
    return list(zip(paths, pictures.part_names(within, folder), strict=True)), left_out


class _Judge:
    """Judges picture files as the line would judge the frames of a camera."""

    def __init__(self, engine: Engine, roi: Roi, *, explain: bool) -> None:
        """`explain`: parts that pass are explained, too."""
        from edge_inspector.inspector import Inspector  # noqa: PLC0415
        from edge_inspector.recipes import CameraRecipe, Recipe, RoiRecipe  # noqa: PLC0415

        self._manifest = manifest = engine.bundle.manifest
        rois = {"all": RoiRecipe(bundle=manifest.name, rectangle=roi.rectangle, polygon=roi.polygon)}
        recipe = Recipe(cameras={"file": CameraRecipe(rois=rois, intensity_window=manifest.training.intensity_window)})
        self._inspector = Inspector(recipe, {manifest.name: engine}, explain_all=explain)
        self.unreadable = 0

    def judged(self, number: int, path: Path, name: str) -> tuple[Result, tuple[View, ...]]:
        """The result for one file, and what explains it; one that cannot be read is undecided."""
        from edge_inspector.pictures import printable  # noqa: PLC0415

        now, began = utc_now(), time.perf_counter()
        found = self._inspector.inspect({"file": [self._frame(number, path, name)]})
        result = Result(
            station="file", trigger_id=printable(path), part_id=name, product=self._manifest.product, verdict=found.verdict,
            reason=found.reason, detail=found.detail, simulated=True, triggered_at=now, decided_at=utc_now(), expires_at=now,
            findings=found.findings,
            times_ms=found.times_ms.model_copy(update={"total": round((time.perf_counter() - began) * 1e3, 2)}),
        )  # fmt: skip
        return result, found.views

    def _frame(self, number: int, path: Path, name: str) -> Frame:
        from edge_inspector import pictures  # noqa: PLC0415
        from edge_inspector.cameras.folder import broken_frame  # noqa: PLC0415

        try:
            return Frame(frozen(pictures.read(path)), number, time.monotonic(), utc_now(), source_id=name)
        except PictureError as error:
            complain(error)
            self.unreadable += 1
            return broken_frame(number, name, error.message)


class Saved:
    """The folder that pictures of judged parts go into; every part has a file of its own."""

    def __init__(self, folder: Path | None) -> None:
        """Raises InspectorError where the folder cannot be made."""
        self._folder = folder
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InspectorError(f"{folder}: {error.strerror}", hint="give a folder that can be written with --save") from error
        self._names: set[str] = set()

    def view(self, name: str, view: View) -> None:
        """What `inspect` saw, and what the network made of it."""
        finding = view.finding
        title = f"{name}  {finding.verdict.value}  score {finding.score or 0:.3g}, threshold {finding.threshold:.3g}"
        self._write(name, (view.seen, view.anomaly, finding.threshold, finding.regions, view.expected, title, view.offset_px))

    def wrong(self, part: Wrong) -> None:
        """A part that `evaluate` found judged wrongly."""
        title = f"{part.name}  {part.kind}  score {part.score:.3g}, threshold {part.threshold:.3g}"
        self._write(part.name, (part.seen, part.anomaly, part.threshold, part.regions, None, title, part.offset_px))

    def _write(self, name: str, explained: tuple[Any, ...]) -> None:
        from edge_inspector import pictures  # noqa: PLC0415

        if self._folder is None:
            return
        plain = free = re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "part"
        number = 1
        while free in self._names:
            number += 1
            free = f"{plain}-{number}"
        self._names.add(free)
        pictures.write(self._folder / f"{free}.png", pictures.explanation(*explained))
