"""Verbs for bundles: train, evaluate, inspect, bench, keygen, sign."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from edge_inspector.cli.shown import BundleArgument, JsonOption, TrustOption, complain, err, one_line, out, print_json
from edge_inspector.errors import InspectorError

if TYPE_CHECKING:
    from edge_inspector.training.fit import Progress as Step
    from edge_inspector.training.orders import Order, Trained

_TRUST = Path("trust")
_KEY = Path("keys/signing.key")


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left:"),
        TimeRemainingColumn(), TextColumn("{task.fields[figures]}"), console=err,
    )  # fmt: skip


def _trained(order: Order, run: Callable[[Order, Callable[[Step], None]], Trained]) -> Trained:
    """Train with a bar for each stage."""
    err.print(f"sample sheets appear in {order.out}.training; Ctrl-C stops, the same command resumes")
    with _bar() as bar:
        tasks = {"GAN": bar.add_task("GAN", total=order.settings.gan_steps, figures=""),
                 "encoder": bar.add_task("encoder", total=order.settings.encoder_steps, figures="")}  # fmt: skip

        def step(now: Step) -> None:
            figures = "  ".join(f"{key} {value:.3g}" for key, value in now.figures.items())
            bar.update(tasks[now.stage], completed=now.step, figures=figures)

        try:
            return run(order, step)
        except KeyboardInterrupt:
            err.print("stopped; the same command resumes")
            raise


def train(
    folder: Annotated[Path, typer.Argument(help="pictures of good parts only")],
    product: Annotated[str, typer.Option(help="what the pictures show; also the bundle's name")],
    name: Annotated[str | None, typer.Option(help="name of the bundle, if not the product")] = None,
    out_folder: Annotated[Path, typer.Option("--out", help="folder that takes the bundle")] = Path("bundles"),
    key: Annotated[Path, typer.Option(help="signing key")] = _KEY,
    release: Annotated[int, typer.Option(min=1)] = 1,
    tile: Annotated[int | None, typer.Option(help="cut pictures into squares of so many pixels, for small defects")] = None,
    overlap: Annotated[float, typer.Option(min=0, max=0.5)] = 0.0,
    intensity_window: Annotated[tuple[int, int] | None, typer.Option(help="for 10 to 16 bit: black and white level")] = None,
    size: Annotated[int, typer.Option(help="side of the network's input: 32, 64 or 128")] = 64,
    width: Annotated[int, typer.Option(min=4, max=64, help="width of the network; the paper has 64")] = 16,
    gan_steps: Annotated[int, typer.Option(min=1)] = 800,
    encoder_steps: Annotated[int, typer.Option(min=1)] = 2400,
    seed: Annotated[int, typer.Option()] = 1,
    alpha: Annotated[float, typer.Option(min=0.0001, max=0.5, help="share of good parts that may be rejected")] = 0.05,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    restart: Annotated[bool, typer.Option("--restart", help="forget an interrupted run")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a bundle (f-AnoGAN) on pictures of good parts; calibrate, check and sign it. Interrupted, it resumes."""
    from edge_inspector import bundles  # noqa: PLC0415 - verbs load what they need

    signing = bundles.read_private_key(key)
    try:
        from edge_inspector.training.fit import Settings  # noqa: PLC0415
        from edge_inspector.training.orders import Order  # noqa: PLC0415
        from edge_inspector.training.orders import train as run  # noqa: PLC0415
    except ImportError as error:
        raise InspectorError(f"training is not installed: {error}", hint='pip install "edge-inspector[train]"') from error
    settings = Settings(size=size, width=width, gan_steps=gan_steps, encoder_steps=encoder_steps, seed=seed)
    order = Order(
        folder=folder, out=out_folder / (name or product), product=product, name=name or product, key=signing,
        release=release, settings=settings, tile=tile, overlap=overlap, intensity_window=intensity_window, alpha=alpha,
        device=device, restart=restart, command=f"edge-inspector {shlex.join(sys.argv[1:])}",
    )  # fmt: skip
    trained = _trained(order, run)
    for warning in trained.warnings:
        err.print(f"note: {warning}", style="yellow", markup=False)
    if as_json:
        print_json({
            "bundle": str(trained.folder), "threshold": trained.promise.threshold, "kept": trained.promise.kept,
            "held_out": trained.promise.n, "alpha": alpha, "parity": trained.parity, "key": trained.key_id,
        })  # fmt: skip
        return
    out.print(f"bundle {trained.folder}, signed by key {trained.key_id}")
    out.print(f"promise: {trained.promise}", style="" if trained.promise.kept else "yellow")
    out.print(f"report: {trained.folder / 'report.html'}")


def evaluate(
    bundle: BundleArgument,
    folder: Annotated[Path, typer.Argument(help="labelled pictures: good/ and one subfolder for each kind of defect")],
    trust: TrustOption = _TRUST,
    as_json: JsonOption = False,
) -> None:
    """AUROC, false rejects and escapes of a bundle on labelled pictures, with confidence intervals."""
    from edge_inspector.bundles import open_bundle  # noqa: PLC0415
    from edge_inspector.runtime import OnnxEngine  # noqa: PLC0415
    from edge_inspector.training.evaluation import evaluate as run  # noqa: PLC0415
    from edge_inspector.training.evaluation import labelled  # noqa: PLC0415

    total = sum(len(paths) for paths in labelled(folder).values())
    with OnnxEngine(open_bundle(bundle, trust), batch=4) as engine, _bar() as bar:
        task = bar.add_task("judging", total=total, figures="")
        found = run(engine, folder, lambda: bar.advance(task))
    if as_json:
        print_json(found.to_json())
        return
    table = Table(box=None, show_header=False)
    table.add_row("bundle", found.bundle)
    table.add_row("image AUROC", "needs good and bad parts" if found.auroc is None else f"{found.auroc:.4f}")
    table.add_row(f"at threshold {found.threshold:.4g}", "")
    table.add_row("  good parts rejected", str(found.false_reject))
    table.add_row("  defective parts passed", str(found.escape))
    for kind, rate in found.escape_by_kind.items():
        table.add_row(f"    {escape(kind)}", str(rate))
    out.print(table)


def inspect(
    bundle: BundleArgument,
    files: Annotated[list[Path], typer.Argument(help="picture files, or folders of them")],
    trust: TrustOption = _TRUST,
    save: Annotated[Path | None, typer.Option(help="write a picture for each failed part into this folder")] = None,
    as_json: JsonOption = False,
) -> None:
    """Judge picture files. Exit code 0: all pass, 1: some do not, 2: trouble."""
    from edge_inspector import pictures  # noqa: PLC0415
    from edge_inspector.bundles import open_bundle  # noqa: PLC0415
    from edge_inspector.cameras.folder import broken_frame  # noqa: PLC0415
    from edge_inspector.errors import PictureError  # noqa: PLC0415
    from edge_inspector.frames import Frame, frozen, utc_now  # noqa: PLC0415
    from edge_inspector.inspector import Inspector  # noqa: PLC0415
    from edge_inspector.recipes import CameraRecipe, Recipe, RoiRecipe  # noqa: PLC0415
    from edge_inspector.results import Result, Verdict  # noqa: PLC0415
    from edge_inspector.runtime import OnnxEngine  # noqa: PLC0415

    opened = open_bundle(bundle, trust)
    name, window = opened.manifest.name, opened.manifest.training.intensity_window
    recipe = Recipe(cameras={"file": CameraRecipe(rois={"whole": RoiRecipe(bundle=name)}, intensity_window=window)})
    paths = [path for given in files for path in (pictures.listed(given) if given.is_dir() else [given])]
    results, not_passed, unreadable = [], 0, 0
    with OnnxEngine(opened, batch=4) as engine:
        inspector = Inspector(recipe, {name: engine})
        for number, path in enumerate(paths):
            now = utc_now()
            try:
                frame = Frame(frozen(pictures.read(path)), number, time.monotonic(), now, source_id=path.stem)
            except PictureError as error:
                complain(error)
                unreadable += 1
                frame = broken_frame(number, path.stem, error.message)
            found = inspector.inspect({"file": [frame]})
            result = Result(
                station="file", trigger_id=str(path), part_id=path.name, product=opened.manifest.product,
                verdict=found.verdict, reason=found.reason, detail=found.detail, simulated=True, triggered_at=now,
                decided_at=utc_now(), expires_at=now, findings=found.findings, times_ms=found.times_ms,
            )  # fmt: skip
            not_passed += found.verdict is not Verdict.PASS
            if as_json:
                results.append(result.model_dump(mode="json", by_alias=True, exclude_none=True))
            else:
                out.print(one_line(result))
            if save is not None and found.views:
                save.mkdir(parents=True, exist_ok=True)
                view = found.views[0]
                title, finding = f"{path.name}  {found.verdict.value}", view.finding
                picture = pictures.explanation(
                    view.seen, view.anomaly, finding.threshold, finding.regions, view.expected, title, view.offset_px
                )
                pictures.write(save / f"{path.stem}.png", picture)
    if as_json:
        print_json(results)
    raise typer.Exit(2 if unreadable else 1 if not_passed else 0)


def bench(
    bundle: BundleArgument,
    trust: TrustOption = _TRUST,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    rounds: Annotated[int, typer.Option(min=10)] = 200,
    as_json: JsonOption = False,
) -> None:
    """Latency of a bundle on this machine: percentiles per stage, on the bundle's own samples."""
    from edge_inspector import pictures, preprocess  # noqa: PLC0415
    from edge_inspector.bundles import open_bundle  # noqa: PLC0415
    from edge_inspector.roi import Roi  # noqa: PLC0415
    from edge_inspector.runtime import OnnxEngine  # noqa: PLC0415

    opened = open_bundle(bundle, trust)
    manifest = opened.manifest
    image = pictures.read(opened.folder / manifest.samples[0].file)
    height, width = image.shape[:2]
    plan = preprocess.Plan(manifest.input, Roi(), height, width, manifest.training.intensity_window)
    stages: dict[str, list[float]] = {"preprocess": [], "infer": [], "total": []}
    with OnnxEngine(opened, batch=len(plan.tiles), threads=threads) as engine:
        for _ in range(rounds):
            began = time.perf_counter()
            plan.fill(image, engine.images, engine.valid)
            filled = time.perf_counter()
            engine()
            done = time.perf_counter()
            for stage, seconds in (("preprocess", filled - began), ("infer", done - filled), ("total", done - began)):
                stages[stage].append(seconds * 1e3)
    figures = {
        stage: {f"p{p}_ms": round(float(np.percentile(times, p)), 3) for p in (50, 95, 99)} for stage, times in stages.items()
    }
    if as_json:
        print_json({"bundle": manifest.name, "tiles": len(plan.tiles), "threads": threads, "rounds": rounds, **figures})
        return
    table = Table("stage", "median ms", "p95 ms", "p99 ms", box=None)
    for stage, figure in figures.items():
        table.add_row(stage, *(f"{value:.2f}" for value in figure.values()))
    out.print(f"{manifest.name}, {len(plan.tiles)} tile(s), {threads} thread(s), {rounds} rounds, ONNX Runtime on the CPU")
    out.print(table)


def keygen(
    private: Annotated[Path, typer.Argument(help="file for the private key")] = _KEY,
    trust: TrustOption = _TRUST,
) -> None:
    """Make a signing key; its public half goes into the trust folder."""
    from edge_inspector.bundles import create_key  # noqa: PLC0415

    identity = create_key(private, trust)
    out.print(f"key {identity}: keep {private} secret; copy the .pub in {trust} to devices that shall trust it")


def sign(bundle: BundleArgument, key: Annotated[Path, typer.Option(help="signing key")] = _KEY) -> None:
    """Sign a bundle after checking that its files are what its manifest says."""
    from edge_inspector.bundles import read_private_key  # noqa: PLC0415
    from edge_inspector.bundles import sign as run  # noqa: PLC0415

    out.print(f"signed by key {run(bundle, read_private_key(key))}")
