"""The verb that teaches a bundle what people have seen since."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from edge_inspector.cli.shown import BundleArgument, JsonOption, TrustOption, out, phases, print_json, progress_bar
from edge_inspector.errors import InspectorError
from edge_inspector.installation import install

if TYPE_CHECKING:
    from edge_inspector.training.teaching.lesson import Learned


def teach(
    bundle: BundleArgument,
    defects: Annotated[Path | None, typer.Option(help="pictures of defects to find; subfolders name kinds")] = None,
    good: Annotated[Path | None, typer.Option(help="pictures of good parts: a new lot, another lamp")] = None,
    masks: Annotated[Path | None, typer.Option(help="where the defects are, NAME_mask.png; not needed")] = None,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="folder of the new release", show_default="beside it, NAME-RELEASE")
    ] = None,
    key: Annotated[Path, typer.Option(help="signing key")] = Path("keys/signing.key"),
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="even where new good parts cost drawn defects that are found now")
    ] = False,
    trust: TrustOption = Path("trust"),
    as_json: JsonOption = False,
) -> None:
    """Teach a bundle a handful of defects or good parts, from what training left in BUNDLE.teach: a new release in seconds."""
    from edge_inspector.bundles import signed_manifest  # noqa: PLC0415 - verbs load what they need
    from edge_inspector.signatures import read_private_key  # noqa: PLC0415

    try:
        from edge_inspector.training.teaching.lesson import Order  # noqa: PLC0415
        from edge_inspector.training.teaching.lesson import teach as run  # noqa: PLC0415
    except ImportError as error:
        raise InspectorError(f"teaching is not installed: {error}", hint=install("teach")) from error
    signing, manifest = read_private_key(key), signed_manifest(bundle, trust)
    order = Order(
        bundle=bundle, trust=trust, key=signing, defects=defects, good=good, masks=masks, accept_loss=accept_loss,
        out=out_folder or bundle.parent / f"{manifest.name}-{manifest.release + 1}",
        command=f"edge-inspector {shlex.join(sys.argv[1:])}",
    )  # fmt: skip
    with progress_bar() as bar:
        learned = run(order, phases(bar))
    _told(learned, manifest.release, as_json=as_json)


def _told(learned: Learned, before: int, *, as_json: bool) -> None:
    """What was learned, for programs or people."""
    promise = learned.promise
    if as_json:
        print_json({
            "bundle": str(learned.folder), "release": learned.release, "threshold": promise.threshold, "n": promise.n,
            "kept": promise.kept, "expected": promise.expected, "at_most": promise.at_most, "weight": learned.weight,
            "changes": [dataclasses.asdict(change) for change in learned.changes], "notes": learned.notes,
            "key": learned.key_id,
        })  # fmt: skip
        return
    for note in learned.notes:
        out.print(note, style="yellow", markup=False)
    table = Table("", f"release {before}", f"release {learned.release}", box=None)
    for change in learned.changes:
        table.add_row(change.name, str(change.before), str(change.after))
    out.print(table)
    out.print(f"promise: {promise}", style="" if promise.kept else "yellow")
    out.print(f"bundle {learned.folder}, release {learned.release}, signed by key {learned.key_id}")
    out.print(f"report: {learned.folder / 'report.html'}")
