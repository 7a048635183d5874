"""Verbs for the device: init, check, run, demo, doctor, watch, schema."""

from __future__ import annotations

import faulthandler
import json
import logging
import secrets
import shlex
import signal
import tempfile
import threading
import time
from dataclasses import asdict
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from edge_inspector.cli.shown import (
    ConfigOption,
    JsonOption,
    complain,
    err,
    followed,
    one_line,
    other_line,
    out,
    phases,
    print_json,
    progress_bar,
    start_logging,
)
from edge_inspector.errors import InspectorError
from edge_inspector.installation import install, program


def init(
    folder: Annotated[Path, typer.Argument(help="where to put the configuration")] = Path(),
) -> None:
    """Write a commented device.yaml and line.yaml, and two keys that this device trusts: of bundles and of orders."""
    from edge_inspector.signatures import BUNDLES, ORDERS, create_key  # noqa: PLC0415 - verbs load what they need

    device = f"edge-{secrets.token_hex(3)}"  # two of one name on one broker would take each other's orders
    for name in ("device.yaml", "line.yaml"):
        if (folder / name).exists():
            raise InspectorError(f"{folder / name}: exists already", hint="init never overwrites; choose another folder")
    try:
        for part in ("bundles", "trust", "keys"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        for name in ("device.yaml", "line.yaml"):
            text = resources.files("edge_inspector.cli").joinpath(f"templates/{name}").read_text()
            (folder / name).write_text(text.replace("edge-1", device))
    except OSError as error:
        raise InspectorError(f"{folder}: {error.strerror}", hint="choose a folder that can be written") from error
    for name, purposes in (("signing", BUNDLES), ("orders", ORDERS)):
        key = folder / "keys" / f"{name}.key"
        if not key.exists():
            create_key(key, folder / "trust", purposes)
    err.print(
        f"wrote {folder / 'device.yaml'} (device {device}), {folder / 'line.yaml'} and, in {folder / 'keys'}, two keys that"
    )
    err.print("this device trusts: signing.key signs bundles, orders.key what is changed and commanded from afar")
    here = program()
    enter = f"cd {shlex.quote(str(folder))} && " if folder != Path() else ""
    for step in (
        "next:",
        f"  {enter}{here} train PICTURES_OF_GOOD_PARTS --product my-product   # makes bundles/my-product",
        f"  {here} check   # says what is missing",
        f"  {here} run",
    ):
        err.print(step, markup=False)


def check(
    config: ConfigOption = Path("device.yaml"),
    sources: Annotated[
        bool, typer.Option("--sources", help="print the section of device.yaml that lists all cameras of the line")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Validate the configuration and everything it names: broker, cameras, bundles. Prints every fault."""
    from edge_inspector.checks import check_device, sources_section  # noqa: PLC0415

    logging.basicConfig(level=logging.CRITICAL)  # every fault is printed below
    if sources:
        print(sources_section(config), end="")  # noqa: T201 - to be put into a file as it is
        return
    findings = check_device(config)
    if as_json:
        print_json([{"thing": f.thing, "ok": f.ok, "text": f.text, "hint": f.hint} for f in findings])
    else:
        for finding in findings:
            out.print(f"[green]ok[/green]     {escape(finding.thing)}: {escape(finding.text)}" if finding.ok
                      else f"[red]fault[/red]  {escape(finding.thing)}: {escape(finding.text)}")  # fmt: skip
            if finding.hint:
                out.print(f"         hint: {escape(finding.hint)}")
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)


def cameras(as_json: JsonOption = False) -> None:
    """List the cameras that answer on every stack (V4L2, libaravis, pylon, GenTL). Their URIs go into line.yaml.

    A GenTL camera's producer goes into device.yaml, under sources.gentl: line.yaml then says ?producer=NAME.
    """
    from edge_inspector.cameras.sources import search  # noqa: PLC0415

    listed, missing = search()
    if as_json:
        print_json([asdict(found) for found in listed])
    for found in () if as_json else listed:
        out.print(f"[bold]{escape(found.uri)}[/]", soft_wrap=True)
        known = (found.model, f"serial {found.serial}" if found.serial else "", found.details)
        out.print(f"    {escape(', '.join(text for text in known if text))}", soft_wrap=True)
        out.print(f"    {escape(' '.join(found.formats) or 'in use: its pixel formats cannot be asked for')}", soft_wrap=True)
    for error in missing:
        complain(error)
    if not listed:
        err.print("no camera answers; network streams (rtsp://, http://) cannot be looked for")
        raise typer.Exit(1)


def capture(
    camera: Annotated[str, typer.Argument(help="a camera's URI, or STATION/CAMERA of line.yaml with all its settings")],
    out_folder: Annotated[Path, typer.Option("--out", help="folder for the pictures: what train reads")],
    count: Annotated[int, typer.Option(min=1, max=100_000, help="pictures to store")] = 200,
    every_s: Annotated[float, typer.Option("--every", min=0, help="seconds between two")] = 0.5,
    config: ConfigOption = Path("device.yaml"),
    as_json: JsonOption = False,
) -> None:
    """Take pictures of good parts for training. Near copies are left out; Ctrl-C ends, the same command goes on."""
    from edge_inspector import capture as taking  # noqa: PLC0415
    from edge_inspector.cameras import Camera, open_source  # noqa: PLC0415
    from edge_inspector.config import CameraConfig, load_device, load_line  # noqa: PLC0415
    from edge_inspector.door import typed  # noqa: PLC0415
    from edge_inspector.schema import validate  # noqa: PLC0415
    from edge_inspector.wiring import door_of  # noqa: PLC0415

    if "://" in camera or camera.startswith("gst:"):
        settings, admit = validate(CameraConfig, {"uri": camera}, "camera"), typed(Path.cwd())
    else:
        device = load_device(config)
        station, _, name = camera.partition("/")
        known = {f"{s}/{c}": made for s, of in load_line(device.line_file).stations.items() for c, made in of.cameras.items()}
        if f"{station}/{name}" not in known:
            raise InspectorError(f"no camera {camera!r} in {device.line_file}", hint=f"there are: {', '.join(known)}")
        settings, admit = known[camera], door_of(device).admit
    stop, missed, told = threading.Event(), 0, ""
    logging.getLogger("edge_inspector").addHandler(logging.NullHandler())  # what goes wrong is told once, below
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    album = taking.Album(out_folder)
    try:
        triggered = "trigger=software" in settings.uri.lower()
        make = partial(open_source, settings, admit)
        with Camera("capture", settings, make, on_demand=triggered) as source, progress_bar() as shown:
            task = shown.add_task("pictures", total=count, figures="")
            for taken in taking.capture(source, album, count=count, every_s=every_s, ended=stop.is_set):
                missed += taken.path is None
                shown.update(task, completed=taken.kept, figures=f"sharpness {taken.sharpness:.1e}")
                words = "; ".join(text for text in (taken.why_not, *taken.hints) if text)
                if words and words != told:
                    shown.console.print(f"  {words}", soft_wrap=True)
                told = words
    finally:
        signal.signal(signal.SIGINT, before)
    if as_json:
        print_json({"folder": str(out_folder), "stored": album.kept, "left_out": missed})
        return
    out.print(f"{album.kept} pictures in {out_folder}, {missed} frames left out (copies or broken ones)")
    if not album.kept:
        raise typer.Exit(1)
    out.print(f"next: {program()} train {out_folder} --product my-product")


def run(config: ConfigOption = Path("device.yaml"), verbose: Annotated[bool, typer.Option("--verbose", "-v")] = False) -> None:
    """Run the daemon. SIGTERM stops it, SIGHUP reads line.yaml again."""
    from edge_inspector import daemon  # noqa: PLC0415
    from edge_inspector.config import load_device  # noqa: PLC0415

    start_logging(verbose=verbose)
    faulthandler.enable()  # when the watchdog ends us, every thread says where it was
    device = load_device(config)
    stop, reload = threading.Event(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    signal.signal(signal.SIGHUP, lambda *_: reload.set())
    log = logging.getLogger("edge_inspector")
    daemon.run(
        device, stop, reload,
        on_ready=lambda now: log.info("started: stations %s; configuration version %d", ", ".join(now.stations), now.version),
    )  # fmt: skip


def replay(
    name: Annotated[
        str,
        typer.Argument(
            help="a result's id (STREAM-SEQ), or a part's or trigger's: its newest result", metavar="RESULT_OR_PART"
        ),
    ],
    config: ConfigOption = Path("device.yaml"),
    as_json: JsonOption = False,
) -> None:
    """Judge a part again from its kept frames, explain any difference. Exit code 0: same verdict, 1: another, 2: trouble."""
    from edge_inspector.config import load_device  # noqa: PLC0415
    from edge_inspector.replay import replay as again  # noqa: PLC0415

    logging.basicConfig(level=logging.ERROR)
    with progress_bar() as shown:
        tell = phases(shown)
        judged = again(load_device(config), name, lambda bundle, phase, step, steps: tell(f"{bundle}: {phase}", step, steps))
    then, now = judged.then, judged.now
    if as_json:
        print_json({
            "then": then.model_dump(mode="json", by_alias=True, exclude_none=True),
            "now": {"verdict": now.verdict.value, "reason": now.reason.value, "detail": now.detail,
                    "findings": [f.model_dump(mode="json", exclude_none=True) for f in now.findings]},
            "same_verdict": judged.is_same, "reasons": judged.reasons,
            "earlier": [result.result_id for result in judged.earlier],
        })  # fmt: skip
    else:
        if judged.earlier:
            others = ", ".join(result.result_id for result in judged.earlier)
            out.print(
                f"{escape(name)} was judged {len(judged.earlier) + 1} times; this is the last time ({escape(others)} before)"
            )
        out.print(f"then  {one_line(then)}")
        result = then.model_copy(
            update={"verdict": now.verdict, "reason": now.reason, "detail": now.detail, "findings": now.findings,
                    "times_ms": now.times_ms}
        )  # fmt: skip
        out.print(f"now   {one_line(result)}")
        for reason in judged.reasons:
            out.print(f"      {escape(reason)}")
        if not judged.reasons:
            out.print("      the same recipe, networks and scores")
    raise typer.Exit(0 if judged.is_same else 1)


def demo(
    folder: Annotated[Path, typer.Argument(help="where to keep pictures of failed parts")] = Path("demo-out"),
    engines: Annotated[Path | None, typer.Option(help="the folder that holds the demo's bundle and recording")] = None,
) -> None:
    """Run the whole line on a shipped recording: camera, network, outbox and MQTT, in this process.

    Exit code 2: trouble, or no part was judged.
    """
    from edge_inspector import demo as line  # noqa: PLC0415
    from edge_inspector.results import Result  # noqa: PLC0415

    logging.basicConfig(level=logging.ERROR)
    where = engines or line.assets(Path(__file__).resolve().parents[2])
    kept: list[Path] = []

    def show(result: Result, kind: str, picture: Path | None) -> None:
        out.print(f"{one_line(result)}  [dim]in truth: {escape(kind)}[/dim]")
        if picture is not None:
            kept.append(picture)

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="run-") as scratch:
        summary = line.run(Path(scratch), where.resolve(), show, lambda what: err.print(f"waiting: {escape(what)}"))
        pictures = folder / "failed"
        pictures.mkdir(exist_ok=True)
        for old in pictures.glob("*.jpg"):
            old.unlink()
        saved = [p.replace(pictures / f"{p.parent.name}.jpg") for p in kept if p.exists()]
    counts = ", ".join(f"{summary.verdicts[v]} {v}" for v in ("pass", "fail", "undecided"))
    out.print()
    out.print(f"[bold]{summary.parts} parts in {summary.wall_s:.1f} s: {counts}[/bold]")
    out.print(f"against the truth: {summary.false_rejects} of {summary.good} good parts rejected, "
              f"{summary.escapes} of {summary.bad} defective parts passed")  # fmt: skip
    out.print(f"{len(saved)} pictures of failed parts (seen, anomaly map, expected): {pictures}")
    if not summary.judged:
        raise InspectorError("the demo judged no part", hint="why stands beside each part above; edge-inspector doctor")
    out.print()
    out.print("go on with your own parts:")
    here = program()
    for step in (
        f"{here} init my-line && cd my-line      # configuration and signing keys",
        f"{install('train')}      # what training needs",
        f"{here} train PICTURES --product my-product      # from pictures of good parts only",
        "edit device.yaml (broker) and line.yaml (camera: v4l2:///dev/video0, rtsp://...), then",
        f"{here} check && {here} run",
    ):
        out.print(f"  {step}", markup=False)
    out.print("  as a service: see systemd/README.md")


def doctor(config: ConfigOption = Path("device.yaml"), as_json: JsonOption = False) -> None:
    """Look at this machine, and at the broker of device.yaml: what works, what is missing, what to install."""
    from edge_inspector.checks import check_machine  # noqa: PLC0415

    findings = check_machine(config)
    if as_json:
        print_json([{"thing": f.thing, "ok": f.ok, "needed": f.needed, "text": f.text, "hint": f.hint} for f in findings])
    else:
        table = Table(box=None, header_style="bold")
        for column in ("", "what", "found", "what to do"):
            table.add_column(column, overflow="fold")
        for f in findings:
            mark = "[green]ok[/green]" if f.ok else "[red]missing[/red]" if f.needed else "[yellow]not here[/yellow]"
            table.add_row(mark, escape(f.thing), escape(f.text), escape(f.hint))
        out.print(table)
    raise typer.Exit(0 if all(f.ok or not f.needed for f in findings) else 1)


def build(
    bundle: Annotated[str, typer.Argument(help="name of a bundle of this device, or its folder")],
    precision: Annotated[
        Literal["auto", "fp32", "fp16", "int8"] | None, typer.Option(show_default="what device.yaml says")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, max=64, help="tiles judged together", show_default="what line.yaml needs")
    ] = None,
    config: ConfigOption = Path("device.yaml"),
    again: Annotated[bool, typer.Option("--again", help="also where an engine is there already")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compile a bundle for this device's GPU with TensorRT and compare it with ONNX Runtime; the daemon does so by itself."""
    from edge_inspector import health  # noqa: PLC0415
    from edge_inspector.bundles import open_bundle  # noqa: PLC0415
    from edge_inspector.config import load_device, load_line  # noqa: PLC0415
    from edge_inspector.frames import utc_now  # noqa: PLC0415
    from edge_inspector.wiring import batch_of, workshop_of  # noqa: PLC0415

    logging.basicConfig(level=logging.INFO, format="%(message)s")  # why it is built
    device = load_device(config)
    folder = Path(bundle) if Path(bundle).is_dir() else device.bundles / bundle
    opened = open_bundle(folder, device.trust, clock_ok=health.clock().ok)
    if batch is None:
        line = load_line(device.line_file) if device.line_file.exists() else None
        batch = batch_of(opened, line, "tensorrt") if line is not None else 1
    wanted, began = precision or device.config.engine.precision, utc_now()
    with progress_bar() as shown:
        _, record = workshop_of(device).engine(opened, wanted, batch, phases(shown), again=again)
    if as_json:
        print_json(record.model_dump(mode="json", by_alias=True))
        return
    what = f"{record.bundle} release {record.release}, {record.precision}, batch {record.batch}"
    at = record.built_at or began
    out.print(f"{what}: {'built' if at >= began else f'there already, built {at:%Y-%m-%d %H:%M} UTC'} in {record.build_s} s "
              f"on {record.gpu} (compute capability {record.compute_capability}), TensorRT {record.tensorrt}")  # fmt: skip
    out.print(f"differs from ONNX Runtime by at most {record.parity['largest']:.2%} of the threshold on "
              f"{record.parity['frames']:.0f} frames near it, {record.parity['flips']:.0f} verdicts flip")  # fmt: skip


def watch(
    config: ConfigOption = Path("device.yaml"),
    station: Annotated[str | None, typer.Option(help="only this station")] = None,
    state: Annotated[Path | None, typer.Option(help="remember here what was seen, and go on from there")] = None,
    start: Annotated[str, typer.Option(help="all: from the oldest result kept; new: from now on")] = "new",
    seconds: Annotated[float, typer.Option(help="stop after so long; 0: never")] = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Follow results over MQTT: each once and in order, missed ones replayed; and alerts and readiness."""
    from edge_inspector.config import load_device  # noqa: PLC0415
    from edge_inspector.subscriber import Subscriber  # noqa: PLC0415
    from edge_inspector.wiring import connection_of, topics_of  # noqa: PLC0415

    if start not in ("all", "new"):
        raise InspectorError(f"--start {start!r}: must be all or new")
    begin: Literal["all", "new"] = "all" if start == "all" else "new"
    device = load_device(config)
    topics = topics_of(device)
    client = f"watch-{secrets.token_hex(4)}"  # processes in containers share their numbers
    others = (topics.of("alert", "+"), topics.of("health"))

    told: dict[tuple[str, ...], str] = {}

    def other(levels: tuple[str, ...], payload: bytes) -> None:
        try:
            line = other_line(levels, json.loads(payload)) if payload else ""
        except ValueError:
            return
        if not as_json and line and told.get(levels) != line:  # health comes every ten seconds
            err.print(line, soft_wrap=True)
        told[levels] = line

    end = time.monotonic() + (seconds or float("inf"))
    with connection_of(device, client, (*Subscriber.subscriptions(topics, client), *others), durable=False) as connection:
        if not connection.connected.wait(6.0):
            err.print(f"no broker yet: {connection.refusal or connection.endpoint}; waiting", style="yellow")
        subscriber = Subscriber(connection, topics, client=client, state=state, start=begin, on_other=other)
        try:
            while time.monotonic() < end:
                for result in subscriber.results(timeout_s=min(1.0, max(0.1, end - time.monotonic()))):
                    if station in (None, result.station):
                        print(result.payload().decode(), flush=True) if as_json else out.print(followed(result))  # noqa: T201
                    if time.monotonic() > end:
                        break
        finally:
            subscriber.save()


def schema(
    name: Annotated[str | None, typer.Argument(help="one of them; none: list them")] = None,
) -> None:
    """Print the JSON Schema of a document or message."""
    from edge_inspector.documents import SCHEMAS  # noqa: PLC0415
    from edge_inspector.schema import json_schema  # noqa: PLC0415

    if name is None:
        for known in SCHEMAS:
            out.print(known)
    elif name in SCHEMAS:
        print_json(json_schema(SCHEMAS[name]))
    else:
        raise InspectorError(f"no schema {name!r}", hint=f"there are: {', '.join(SCHEMAS)}")
