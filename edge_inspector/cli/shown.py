"""What verbs share in talking to people and programs."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from edge_inspector import systemd
from edge_inspector.errors import InspectorError
from edge_inspector.results import Result, Verdict

out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)
COLOURS = {Verdict.PASS: "green", Verdict.FAIL: "red", Verdict.UNDECIDED: "yellow"}

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="the device.yaml")]
TrustOption = Annotated[Path, typer.Option(help="folder of public keys whose bundles may run")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON for programs")]
RectangleOption = Annotated[
    tuple[int, int, int, int] | None, typer.Option(metavar="X Y W H", help="what the recipe judges of each picture, in px")
]
BundleArgument = Annotated[Path, typer.Argument(help="folder of the bundle")]


def progress_bar() -> Progress:
    """Progress of long work, one line a stage, on stderr."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left:"),
        TimeRemainingColumn(), TextColumn("{task.fields[figures]}"), console=err,
    )  # fmt: skip


def phases(shown: Progress) -> Callable[[str, int, int], None]:
    """Tells phases of a build as lines of a progress bar."""
    tasks: dict[str, TaskID] = {}

    def tell(phase: str, step: int, steps: int) -> None:
        if phase not in tasks:
            for task in shown.tasks:  # one phase ends where the next begins
                shown.update(task.id, completed=task.total)
            tasks[phase] = shown.add_task(phase, figures="")
        shown.update(tasks[phase], completed=step, total=steps)

    return tell


def complain(error: InspectorError) -> None:
    """An error and its hint, for people."""
    err.print("error: ", error.message, sep="", style="red", markup=False)
    if error.hint:
        err.print("hint:  ", error.hint, sep="", markup=False)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def start_logging(*, verbose: bool = False) -> None:
    """Log to stderr; under systemd to its journal, with the fields that a record carries."""
    handler: logging.Handler = systemd.JournalHandler() if systemd.is_journal() else logging.StreamHandler()
    stamp = "" if systemd.is_journal() else "%(asctime)s %(levelname)s "
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, format=f"{stamp}%(threadName)s: %(message)s", handlers=[handler]
    )


def printable(text: str) -> str:
    """The same text for a terminal: separators of scanned codes by their pictures."""
    return "".join(chr(0x2400 + ord(letter)) if letter < " " else letter for letter in text)


def one_line(result: Result) -> str:
    """A result for people, with rich's colours."""
    colour = COLOURS[result.verdict]
    words = [f"[{colour}]{result.verdict.value:<9}[/{colour}]", f"{escape(printable(result.part_id or result.trigger_id)):<28}"]
    worst = max(result.findings, key=lambda f: f.score if f.score is not None else -1.0, default=None)
    if worst is not None and worst.score is not None:
        words.append(f"score {worst.score:6.2f} of {worst.threshold:.2f}")
    if worst is not None and worst.regions:
        region = worst.regions[0]
        words.append(f"at x {region.x_px} y {region.y_px}, {region.w_px}x{region.h_px} px")
    if result.verdict is Verdict.UNDECIDED:
        words.append(f"{result.reason.value}: {escape(printable(result.detail))}")
    words.append(f"[dim]{result.times_ms.total:.1f} ms[/dim]")
    return "  ".join(words)


def other_line(levels: tuple[str, ...], told: dict[str, Any]) -> str:
    """State, readiness, health or an alert for people, with rich's colours."""
    kind = levels[0]
    if kind == "state":
        words = f"online, version {told.get('version')}" if told.get("online") else "offline"
    elif kind == "ready":
        words = "ready" if told.get("ready") else f"not ready: {told.get('reason') or told.get('state')}"
    elif kind == "health":
        reasons = "; ".join(f"{reason['thing']}: {reason['text']}" for reason in told.get("reasons", ()))
        words = f"{told.get('status')}{': ' if reasons else ''}{reasons}"
    else:
        words = f"{told.get('change')} {told.get('code')}: {told.get('text')}"
    return f"[dim]{escape('/'.join(levels))}  {escape(words)}[/dim]"
