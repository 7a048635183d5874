"""Verbs for bundles: train, generate, bench, keygen, sign."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.progress import TaskID
from rich.table import Table

from edge_inspector.cli.regions import PolygonOption, RecipeOption, RectangleOption
from edge_inspector.cli.regions import given as region_given
from edge_inspector.cli.shown import (
    BundleArgument,
    JsonOption,
    TrustOption,
    err,
    out,
    phases,
    print_json,
    progress_bar,
)  # fmt: skip
from edge_inspector.errors import InspectorError
from edge_inspector.installation import install
from edge_inspector.scoring import NEXT_TO_NOTHING, Wish

if TYPE_CHECKING:
    from edge_inspector.frames import Pixels
    from edge_inspector.preprocess import Plan
    from edge_inspector.runtime import Engine
    from edge_inspector.training.data import Pictures
    from edge_inspector.training.orders import Order, Trained
    from edge_inspector.training.run import Progress as Step

_TRUST = Path("trust")
_KEY = Path("keys/signing.key")
_EXPECTED = 0.05
ExpectedOption = Annotated[
    float | None,
    typer.Option(min=0.0001, max=0.5, help="share of good parts rejected on average", show_default=str(_EXPECTED)),
]
AtMostOption = Annotated[
    float | None,
    typer.Option(
        "--at-most",
        "--alpha",
        min=0.0001,
        max=0.5,
        help="instead: share of good parts that is not exceeded, with 95 % confidence; --alpha is its old name",
    ),
]


def _trained(order: Order, run: Callable[..., Trained]) -> Trained:
    """Train with what the audit found, then the progress of each stage. The first Ctrl-C saves, the second ends at once."""
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: _asked(asked, before, number, frame))
    try:
        with progress_bar() as bar:
            tasks: dict[str, TaskID] = {}

            def step(now: Step) -> None:
                figures = "  ".join(f"{key} {value:.3g}" for key, value in now.figures.items())
                if now.stage not in tasks:
                    tasks[now.stage] = bar.add_task(now.stage, figures="")
                bar.update(tasks[now.stage], completed=now.step, total=now.steps, figures=figures)

            def audited(surveyed: Pictures) -> None:
                err.print(f"work in progress lies in {order.out}.training; Ctrl-C stops, the same command resumes")
                err.print(f"{len(surveyed.paths)} pictures of {surveyed.width_px}x{surveyed.height_px}")
                for remark in surveyed.remarks:
                    err.print(f"  {remark.level}: {remark}", style="yellow" if remark.level == "warning" else "", markup=False)

            return run(order, step, audited, lambda: bool(asked))
    except KeyboardInterrupt:
        err.print("stopped; the same command resumes")
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def _asked(asked: list[int], before: Any, number: int, frame: Any) -> None:
    if asked and callable(before):
        before(number, frame)
    asked.append(number)
    err.print("stopping; what is done is kept. Ctrl-C again ends at once")


class Family(str, Enum):
    """Networks that can be trained."""

    FEATURE_ANOGAN = "feature-anogan"
    FANOGAN = "fanogan"


def _family(name: Family, given: dict[str, Any]) -> Any:
    """The family with what was given; its own defaults for the rest. Raises InspectorError for options it does not have."""
    from edge_inspector.training.networks.fanogan_fit import Fanogan  # noqa: PLC0415
    from edge_inspector.training.networks.feature_fit import FeatureAnogan  # noqa: PLC0415

    kind = FeatureAnogan if name is Family.FEATURE_ANOGAN else Fanogan
    chosen = {key: value for key, value in given.items() if value is not None}
    foreign = sorted(set(chosen) - {field.name for field in dataclasses.fields(kind)})
    if foreign:
        options = ", ".join("--" + name.replace("side", "size").replace("_", "-") for name in foreign)
        raise InspectorError(f"{options}: {name.value} has no such setting", hint="edge-inspector train --help")
    return kind(**chosen)


def train(
    folder: Annotated[Path, typer.Argument(help="pictures of good parts only")],
    product: Annotated[str, typer.Option(help="what the pictures show; also the bundle's name")],
    name: Annotated[str | None, typer.Option(help="name of the bundle, if not the product")] = None,
    out_folder: Annotated[Path, typer.Option("--out", help="folder that takes the bundle")] = Path("bundles"),
    key: Annotated[Path, typer.Option(help="signing key")] = _KEY,
    release: Annotated[int, typer.Option(min=1)] = 1,
    family: Annotated[Family, typer.Option(help="feature-anogan finds most; fanogan is for comparison")] = (
        Family.FEATURE_ANOGAN
    ),
    size: Annotated[int | None, typer.Option(help="side of the network's input [256; fanogan 64]")] = None,
    backbone: Annotated[
        str | None,
        typer.Option(help="feature-anogan: lite0 (faster), lite2, or an ONNX file of feature maps", show_default="lite2"),
    ] = None,
    rectangle: RectangleOption = None,
    polygon: PolygonOption = None,
    recipe: RecipeOption = None,
    tile: Annotated[int | None, typer.Option(min=16, max=4096, help="side in px of squares that pictures are cut into")] = None,
    overlap: Annotated[float, typer.Option(min=0, max=0.5)] = 0.0,
    intensity_window: Annotated[tuple[int, int] | None, typer.Option(help="for 10 to 16 bit: black and white level")] = None,
    expected: ExpectedOption = None,
    at_most: AtMostOption = None,
    leave_out: Annotated[
        Path | None, typer.Option(help="a file with names of good pictures to leave out; they count as rejected")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 1,
    steps: Annotated[int | None, typer.Option(min=20, help="feature-anogan: steps of G and of D [400]")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="feature-anogan: an INT8 backbone, everything fitted to it")] = False,
    width: Annotated[int | None, typer.Option(min=4, max=64, help="fanogan: width of the network [64, the paper's]")] = None,
    gan_steps: Annotated[int | None, typer.Option(min=1, help="fanogan [800]")] = None,
    encoder_steps: Annotated[int | None, typer.Option(min=1, help="fanogan [2400]")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.1, help="what fitting may take; more steps, or fewer")] = None,
    latency_ms: Annotated[float | None, typer.Option(min=0.1, help="what judging a picture may take on this machine")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    restart: Annotated[bool, typer.Option("--restart", help="forget an interrupted run")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a bundle on pictures of good parts; audit them, calibrate, check and sign. Interrupted, it resumes."""
    from edge_inspector import signatures  # noqa: PLC0415 - verbs load what they need

    if os.environ.get("RANK", "0") != "0":
        out.quiet = err.quiet = True  # under torchrun the first process speaks
    signing, wanted = signatures.read_private_key(key), region_given(rectangle, polygon, recipe)
    try:
        from edge_inspector.training.orders import Order  # noqa: PLC0415
        from edge_inspector.training.orders import train as run  # noqa: PLC0415
    except ImportError as error:
        raise InspectorError(f"training is not installed: {error}", hint=install("train")) from error
    given = {
        "side": size, "backbone": backbone, "steps": steps, "int8": int8 or None,
        "width": width, "gan_steps": gan_steps, "encoder_steps": encoder_steps,
    }  # fmt: skip
    order = Order(
        folder=folder, out=out_folder / (name or product), product=product, name=name or product, key=signing,
        release=release, family=_family(family, given), seed=seed, roi=wanted.roi, tile=tile, overlap=overlap,
        intensity_window=intensity_window or wanted.window,
        wish=_wish(expected, at_most), leave_out=_names_in(leave_out), device=device, restart=restart, minutes=minutes,
        latency_ms=latency_ms, command=f"edge-inspector {shlex.join(sys.argv[1:])}",
    )  # fmt: skip
    _told(_trained(order, run), as_json=as_json)


def _names_in(file: Path | None) -> tuple[str, ...]:
    """The lines of a file, without empty ones and repetitions."""
    if file is None:
        return ()
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InspectorError(f"--leave-out {file}: {error}", hint="give a text file: one name on each line") from error
    return tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))


def _wish(expected: float | None, at_most: float | None) -> Wish:
    if expected is not None and at_most is not None:
        raise InspectorError(
            "--expected and --at-most: only one of them chooses the threshold",
            hint="the other rate is told with the bundle",
        )
    return Wish(at_most, sure=True) if at_most is not None else Wish(expected or _EXPECTED)


def _told(trained: Trained, *, as_json: bool) -> None:
    """What was made, for programs or people."""
    promise = trained.promise
    if as_json and not out.quiet:
        print_json({
            "bundle": str(trained.folder), "threshold": promise.threshold, "kept": promise.kept, "n": promise.n,
            "expected": promise.expected, "at_most": promise.at_most, "alpha": promise.alpha,
            "needed": promise.wish.needed, "found": dataclasses.asdict(trained.found) if trained.found else None,
            "parity": trained.parity,
            "key": trained.key_id, "audit": [remark.to_json() for remark in trained.remarks], "notes": trained.notes,
            "detection_limit": trained.limit.to_json(),
        })  # fmt: skip
        return
    for note in trained.notes:
        out.print(note, markup=False)
    out.print(f"detection limit: {trained.limit}")
    out.print(f"promise: {promise}", style="" if promise.kept else "yellow")
    if trained.found is not None:
        out.print(f"cost: {trained.found}", style="red" if trained.found.here < NEXT_TO_NOTHING else "")
    out.print(f"bundle {trained.folder}, signed by key {trained.key_id}")
    out.print(f"report: {trained.folder / 'report.html'}")


def bench(
    bundle: BundleArgument,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="a device.yaml: its engine, beside ONNX Runtime")
    ] = None,
    trust: TrustOption = _TRUST,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    rounds: Annotated[int, typer.Option(min=10)] = 200,
    as_json: JsonOption = False,
) -> None:
    """Latency of a bundle on this machine: percentiles per stage, on the bundle's own samples."""
    from edge_inspector import health, preprocess  # noqa: PLC0415
    from edge_inspector.bundles import open_bundle  # noqa: PLC0415
    from edge_inspector.config import load_device, load_line  # noqa: PLC0415
    from edge_inspector.roi import Roi  # noqa: PLC0415
    from edge_inspector.runtime import OnnxEngine, opened, picture_of  # noqa: PLC0415
    from edge_inspector.wiring import batch_of, workshop_of  # noqa: PLC0415

    device = load_device(config) if config else None
    found = open_bundle(bundle, device.trust if device else trust, clock_ok=health.clock().ok)
    manifest = found.manifest
    image = picture_of(found, manifest.samples[0])
    height, width = image.shape[:2]
    plan = preprocess.Plan(manifest.input, Roi(), height, width, manifest.training.intensity_window)
    tiles = len(plan.tiles)
    runs: list[dict[str, Any]] = []
    if device is not None and device.config.engine.runtime != "onnxruntime":
        line = load_line(device.line_file) if device.line_file.exists() else None

        def batch_for(runtime: str) -> int:
            return max(tiles, batch_of(found, line, runtime) if line is not None else 1)

        with ExitStack() as stack:
            with progress_bar() as shown:  # empty, where an engine is there already
                tell = phases(shown)
                engine = stack.enter_context(opened(found, device.config.engine, workshop_of(device), batch_for, tell))
            runs.append(_measured(engine, plan, image, rounds))
    with OnnxEngine(found, batch=tiles, threads=threads) as reference:
        runs.append(_measured(reference, plan, image, rounds))
    if as_json:
        print_json({"bundle": manifest.name, "tiles": tiles, "threads": threads, "rounds": rounds, "runs": runs})
        return
    table = Table("engine", "stage", "median ms", "p95 ms", "p99 ms", box=None)
    for run in runs:
        for stage, figure in run["stages"].items():
            table.add_row(
                f"{run['runtime']} {run['precision']}, batch {run['batch']}",
                stage,
                *(f"{value:.2f}" for value in figure.values()),
            )
    out.print(f"{manifest.name}, {tiles} tile(s), {rounds} rounds, {threads} thread(s) for ONNX Runtime on the CPU")
    out.print(table)


def _measured(engine: Engine, plan: Plan, image: Pixels, rounds: int) -> dict[str, Any]:
    """Percentiles of each stage; `infer` holds the copies, and where the engine has stages of its own they follow it."""
    stages: dict[str, list[float]] = {"preprocess": [], "infer": [], "total": []}
    for _ in range(rounds):
        began = time.perf_counter()
        plan.fill(image, engine.images, engine.valid)
        filled = time.perf_counter()
        engine()
        done = time.perf_counter()
        for stage, seconds in (("preprocess", filled - began), ("infer", done - filled), ("total", done - began)):
            stages[stage].append(seconds * 1e3)
    for _ in range(rounds):
        for stage, milliseconds in engine.stages_ms().items():
            stages.setdefault(f"infer: {stage}", []).append(milliseconds)
    figures = {
        stage: {f"p{p}_ms": round(float(np.percentile(times, p)), 3) for p in (50, 95, 99)} for stage, times in stages.items()
    }
    return {"runtime": engine.runtime, "precision": engine.precision, "batch": engine.batch, "stages": figures}


def generate(
    bundle: BundleArgument,
    out_folder: Annotated[Path, typer.Option("--out", help="folder for the pictures")],
    count: Annotated[int, typer.Option(min=1, max=10_000, help="pictures of each kind")] = 16,
    folder: Annotated[
        Path | None, typer.Option("--into", help="good pictures to draw defects into", show_default="the samples")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 1,
    trust: TrustOption = _TRUST,
    as_json: JsonOption = False,
) -> None:
    """Draw new good parts and latent walks (fanogan), and defects with masks into good pictures."""
    from edge_inspector import pictures  # noqa: PLC0415
    from edge_inspector.bundles import open_bundle  # noqa: PLC0415
    from edge_inspector.training.generation import generate as run  # noqa: PLC0415

    opened = open_bundle(bundle, trust)
    sources = pictures.listed(folder).taken if folder else ()
    with progress_bar() as bar:
        task = bar.add_task("drawing", total=None, figures="")
        made = run(opened, out_folder, count, seed, sources, lambda: bar.advance(task))
    if as_json:
        print_json({"good": made.good, "defects": made.defects, "folder": str(out_folder)})
        return
    if made.good:
        out.print(f"{made.good} good parts in {out_folder / 'test' / 'good'}; see drawn.png and walks.png beside it")
    else:
        out.print(
            f"{opened.manifest.name} draws no good parts: its family, {opened.manifest.network.split(':')[0]}, draws features"
        )
    out.print(f"{made.defects} defects with masks in {out_folder / 'test'} and {out_folder / 'ground_truth'}")


def keygen(
    private: Annotated[Path, typer.Argument(help="file for the private key")] = _KEY,
    trust: TrustOption = _TRUST,
    purposes: Annotated[
        str, typer.Option(help="what it is trusted for: one or more of bundle, configuration, confirm, command, label")
    ] = "bundle",
) -> None:
    """Make a signing key; its public half goes into the trust folder, with what it is trusted for."""
    from edge_inspector.signatures import PURPOSES, create_key  # noqa: PLC0415

    words = [word.strip() for word in purposes.split(",")]
    wanted = [purpose for purpose in PURPOSES if purpose in words]
    if strange := sorted(set(words) - set(wanted)):
        raise InspectorError(f"--purposes {purposes}: {', '.join(strange)}?", hint=f"there are: {','.join(PURPOSES)}")
    identity = create_key(private, trust, wanted)
    out.print(f"key {identity}, for {', '.join(wanted)}: keep {private} secret; copy the .pub in {trust} to devices that "
              "shall trust it")  # fmt: skip


def sign(bundle: BundleArgument, key: Annotated[Path, typer.Option(help="signing key")] = _KEY) -> None:
    """Sign a bundle after checking that its files are what its manifest says."""
    from edge_inspector.bundles import sign as run  # noqa: PLC0415
    from edge_inspector.signatures import read_private_key  # noqa: PLC0415

    out.print(f"signed by key {run(bundle, read_private_key(key))}")
