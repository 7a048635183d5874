"""What verbs share in talking to people and programs."""

from __future__ import annotations

import json
import logging
import sys
import time
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

_LINES_EVERY_S = 10.0
out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)
COLOURS = {Verdict.PASS: "green", Verdict.FAIL: "red", Verdict.UNDECIDED: "yellow"}

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="the device.yaml")]
TrustOption = Annotated[Path, typer.Option(help="folder of public keys whose bundles may run")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON for programs")]
BundleArgument = Annotated[Path, typer.Argument(help="folder of the bundle")]


class _Lines(Progress):
    """Progress where no terminal is: a line every ten seconds, and one at the end of each stage."""

    def __init__(self) -> None:
        super().__init__(console=err, disable=True)
        self._told_s: dict[TaskID, float] = {}

    def add_task(self, description: str, *arguments: Any, **options: Any) -> TaskID:
        """Begin a stage."""
        task_id = super().add_task(description, *arguments, **options)
        self._told_s[task_id] = time.monotonic()
        return task_id

    def update(self, task_id: TaskID, **news: Any) -> None:
        """Take news of a stage, and tell them where it is time."""
        super().update(task_id, **news)
        self._tell(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Take one step of a stage, and tell it where it is time."""
        super().advance(task_id, advance)
        self._tell(task_id)

    def _tell(self, task_id: TaskID) -> None:
        task, now = self._tasks[task_id], time.monotonic()
        if now < self._told_s[task_id] + (0.0 if task.finished else _LINES_EVERY_S):
            return
        self._told_s[task_id] = now if not task.finished else float("inf")
        left = f", {_span(task.time_remaining)} left" if task.time_remaining and not task.finished else ""
        figures = f"  {task.fields['figures']}" if task.fields.get("figures") else ""
        took = f" in {_span(task.elapsed or 0.0)}" if task.finished else ""
        of = f" of {task.total:.0f}" if task.total is not None else ""
        err.print(f"{task.description}: {task.completed:.0f}{of}{took}{left}{figures}", markup=False)


def _span(seconds: float) -> str:
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s" if seconds >= 60 else f"{seconds:.0f} s"


def progress_bar() -> Progress:
    """Progress of long work on stderr: a bar for each stage, or lines where that is no terminal."""
    if not err.is_terminal:
        return _Lines()
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


def followed(result: Result) -> str:
    """A result among others: when and where it was decided, and its names."""
    at = f"{result.decided_at.astimezone():%Y-%m-%d %H:%M:%S}"
    names = (at, result.station, result.product or "-", result.trigger_id, result.result_id)
    return f"{escape('  '.join(names))}  {one_line(result)}"


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
