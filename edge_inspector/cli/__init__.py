"""`edge-inspector`: one verb, one function. stdout is for data, stderr for people."""

from __future__ import annotations

import logging
import os
import sys
import threading
from importlib.metadata import version
from typing import Annotated

import typer

from edge_inspector.cli import asking, judging, offline, online, remote, service, teaching
from edge_inspector.cli.shown import complain
from edge_inspector.errors import EngineLost, InspectorError
from edge_inspector.threads import Thread

app = typer.Typer(
    name="edge-inspector",
    help="Visual inspection on the line: camera frames in, pass/fail per part over MQTT.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"edge-inspector {version('edge-inspector')}")  # noqa: T201 - data, for stdout
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="say which version this is")
    ] = False,
) -> None:
    """Visual inspection on the line: camera frames in, pass/fail per part over MQTT."""


for _verb in (
    online.init,
    online.check,
    online.run,
    online.demo,
    online.doctor,
    online.cameras,
    online.capture,
    online.build,
    online.watch,
    online.replay,
    online.schema,
):
    app.command()(_verb)
for _offline_verb in (
    offline.train,
    teaching.teach,
    judging.evaluate,
    offline.generate,
    judging.inspect,
    offline.bench,
    offline.keygen,
    offline.sign,
):
    app.command()(_offline_verb)


app.command()(remote.rollout)
app.command()(asking.trigger)
app.command()(asking.command)
app.add_typer(remote.app)
app.add_typer(service.app)


def main() -> None:
    """Entry point. Exit code 2: trouble, explained on stderr."""
    code: int | str | None = 2
    try:
        app()
    except SystemExit as end:
        code = end.code
    except EngineLost as error:
        complain(error)
        _leave(2)  # everything is closed by now; what CUDA would still tidy up aborts on a GPU that has failed
    except InspectorError as error:
        complain(error)
    except KeyboardInterrupt:
        code = 130
    if any(isinstance(thread, Thread) for thread in threading.enumerate()):
        _leave(
            code if isinstance(code, int) else 0
        )  # it is still within a driver or ONNX Runtime, whose tidying up would abort
    sys.exit(code)


def _leave(code: int) -> None:
    """End the process at once, without what libraries do at its end."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
