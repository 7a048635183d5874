"""Verbs for a device's line configuration over MQTT: remote show, diff, set, confirm, cancel, reset."""

from __future__ import annotations

import getpass
import json
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from edge_inspector.cli.shown import ConfigOption, JsonOption, err, out, print_json
from edge_inspector.config import Device, DeviceConfig, LineConfig, load_device, parse_line, read_document
from edge_inspector.errors import InspectorError
from edge_inspector.messages import AuditEntry, ConfigReported
from edge_inspector.remote.client import Difference, Remote, differences
from edge_inspector.schema import read_yaml, validate
from edge_inspector.signatures import read_private_key

app = typer.Typer(
    name="remote",
    help="See and change a device's line configuration over MQTT; it cannot be stranded by it.",
    no_args_is_help=True,
)
DeviceOption = Annotated[str | None, typer.Option("--device", help="SITE/LINE/DEVICE [the one of device.yaml]")]
BrokerOption = Annotated[str | None, typer.Option("--broker", help="HOST or HOST:PORT [the one of device.yaml]")]
KeyOption = Annotated[Path | None, typer.Option("--key", help="signs the order; needed where the device requires it")]
ByOption = Annotated[str | None, typer.Option("--by", help="for the audit trail [user@machine]")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="do not ask")]
_ANSWER_S = 8.0
_NOBODY = {"schema": "ei.device.v1", "identity": {"site": "x", "line": "x", "device": "x"}}
"""Where there is no device.yaml: all of it comes from options."""
_GOOD = ("trial", "committed", "cancelled", "reset")


@contextmanager
def _reached(
    config: Path, device: str | None, broker: str | None, key: Path | None = None, by: str | None = None
) -> Iterator[Remote]:
    """A connection to what the options name. Raises InspectorError."""
    from edge_inspector.wiring import connection_of, topics_of  # noqa: PLC0415 - loads OpenCV and ONNX Runtime

    found = _addressed(config, device, broker)
    name = re.sub(r"[^\x21-\x7e]", "-", by or f"{getpass.getuser()}@{socket.gethostname()}")
    signer = read_private_key(key) if key is not None else None
    topics, client = topics_of(found), f"remote-{socket.gethostname()}-{id(found):x}"
    with connection_of(found, client, Remote.subscriptions(topics)) as connection:
        connection.connected.wait(_ANSWER_S)
        yield Remote(connection, topics, by=name, key=signer)


def _addressed(config: Path, device: str | None, broker: str | None) -> Device:
    if config.exists() or not (device and broker):
        found = load_device(config)
    else:
        found = Device(validate(DeviceConfig, _NOBODY, "options"), Path())
    changes: dict[str, Any] = {}
    if device is not None:
        levels = device.split("/")
        if len(levels) != 3:
            raise InspectorError(
                f"--device {device}: SITE/LINE/DEVICE is expected", hint="as in --device plant-1/line-1/edge-1"
            )
        changes["identity"] = dict(zip(("site", "line", "device"), levels, strict=True))
    if broker is not None:
        host, _, port = broker.partition(":")
        if port and not port.isdigit():
            raise InspectorError(f"--broker {broker}: HOST or HOST:PORT is expected")
        changes["broker"] = {**found.config.broker.model_dump(exclude_none=True), "host": host, "port": int(port or 1883)}
    values = {**found.config.model_dump(mode="json", by_alias=True), **changes}
    return Device(validate(DeviceConfig, values, "options"), found.folder)


def show(
    config: ConfigOption = Path("device.yaml"), device: DeviceOption = None, broker: BrokerOption = None,
    document: Annotated[bool, typer.Option("--document", help="print the document alone, as JSON: set takes it")] = False,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Which line configuration is in force, what is on trial, and who has changed what."""
    with _reached(config, device, broker) as remote:
        told = remote.reported(_ANSWER_S)
        topics, online = remote.topics, remote.online
    if document or as_json:
        print_json(told.line if document else told.model_dump(mode="json", by_alias=True))
        return
    if online is False:
        err.print("the device is offline: this is what it said last", style="yellow")
    where = "its own line.yaml" if told.source == "local" else "remote"
    out.print(f"[bold]{escape(topics.device_path)}[/bold]: version {told.version} ({told.hash}), {where}")
    _show_trial(told)
    if told.last is not None:
        _show_entry("last order", told.last)
    if told.history:
        table = Table(box=None, header_style="bold")
        for column in ("when (UTC)", "who", "version", "outcome", "why"):
            table.add_column(column, overflow="fold")
        for entry in told.history:
            version = "" if entry.version is None else str(entry.version)
            words = (f"{entry.at:%Y-%m-%d %H:%M:%S}", entry.by, version, entry.outcome.replace("_", " "), entry.reason)
            table.add_row(*(escape(word) for word in words))
        out.print(table)


def diff(
    file: Annotated[Path, typer.Argument(help="a line.yaml, or JSON")],
    config: ConfigOption = Path("device.yaml"), device: DeviceOption = None, broker: BrokerOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """What would change. Exit code 1: something would."""
    _, line = _read(file)
    with _reached(config, device, broker) as remote:
        found = _differences(remote.reported(_ANSWER_S), line)
    if as_json:
        print_json([{"path": d.path, "old": d.old, "new": d.new} for d in found])
    else:
        _show_differences(found)
    raise typer.Exit(1 if found else 0)


def set_(
    file: Annotated[Path, typer.Argument(help="a line.yaml, or JSON")],
    config: ConfigOption = Path("device.yaml"), device: DeviceOption = None, broker: BrokerOption = None,
    confirm_s: Annotated[int, typer.Option(min=0, max=86_400, help="on trial for so long; 0: none, for recipes only")] = 600,
    wait_s: Annotated[float, typer.Option(min=1, help="for the device to try it: engines may take minutes to build")] = 900.0,
    key: KeyOption = None, by: ByOption = None, yes: YesOption = False, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Send a line configuration: shown, tried beside what runs, then on trial until `remote confirm`; else rolled back."""
    document, line = _read(file)
    with _reached(config, device, broker, key, by) as remote:
        told = remote.reported(_ANSWER_S)
        found = _differences(told, line)
        if not as_json:
            _show_differences(found)
        if not found:
            err.print(f"nothing would change: version {told.version} says the same")
            return
        version = max(line.version, told.seen + 1)
        if version != line.version:
            err.print(f"sent as version {version}: versions up to {told.seen} are taken, {file} says {line.version}")
        _ask(f"send it to {remote.topics.device_path}?", yes=yes)
        remote.desire(document, version, confirm_s)
        with err.status("sent; the device tries it beside what runs"):
            told = remote.awaited(lambda now: now.last != told.last and _is_over(now), wait_s)
    _conclude(told, as_json=as_json)


def confirm(
    config: ConfigOption = Path("device.yaml"), device: DeviceOption = None, broker: BrokerOption = None,
    key: KeyOption = None, by: ByOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Keep the configuration that is on trial."""
    _decided(config, device, broker, key, by, "confirm", _on_trial, as_json=as_json)


def cancel(
    config: ConfigOption = Path("device.yaml"), device: DeviceOption = None, broker: BrokerOption = None,
    key: KeyOption = None, by: ByOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Take the configuration that is on trial, or being prepared, back at once."""
    _decided(config, device, broker, key, by, "cancel", _cancellable, as_json=as_json)


def reset(
    config: ConfigOption = Path("device.yaml"), device: DeviceOption = None, broker: BrokerOption = None,
    key: KeyOption = None, by: ByOption = None, yes: YesOption = False, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """From the remote configuration back to the device's own line.yaml."""
    _ask("put the device's own line.yaml in force again?", yes=yes)
    _decided(config, device, broker, key, by, "reset", _resettable, as_json=as_json)


for _verb in (show, diff, confirm, cancel, reset):
    app.command()(_verb)
app.command("set")(set_)


def _decided(
    config: Path, device: str | None, broker: str | None, key: Path | None, by: str | None,
    action: Literal["confirm", "cancel", "reset"], version_of: Callable[[ConfigReported], int], *, as_json: bool,
) -> None:  # fmt: skip
    with _reached(config, device, broker, key, by) as remote:
        told = remote.reported(_ANSWER_S)
        version = version_of(told)
        with err.status(f"{action} version {version}"):
            for wait_s in (1.0, 2.0, 4.0, 8.0, 0.0):
                remote.decide(version, action)
                told = remote.awaited(lambda now, before=told: now.last != before.last, 3 * _ANSWER_S)  # type: ignore[misc]
                if told.last is None or told.last.outcome != "too_early":
                    break
                time.sleep(wait_s)
    _conclude(told, as_json=as_json)


def _on_trial(told: ConfigReported) -> int:
    if told.trial is None:
        raise InspectorError("nothing is on trial", hint="edge-inspector remote show tells what became of the last one")
    return told.trial.version


def _cancellable(told: ConfigReported) -> int:
    if told.last is not None and told.last.outcome == "preparing" and told.last.version is not None:
        return told.last.version
    return _on_trial(told)


def _resettable(told: ConfigReported) -> int:
    if told.source == "local":
        raise InspectorError("the device's own line.yaml is in force already")
    return told.version


def _read(file: Path) -> tuple[dict[str, Any], LineConfig]:
    values = read_yaml(read_document(file), str(file))
    line = parse_line(values, str(file))
    assert isinstance(values, dict)
    return values, line


def _differences(told: ConfigReported, line: LineConfig) -> list[Difference]:
    """But for the version, which every order changes. Passwords are masked on both sides."""
    return [d for d in differences(told.line, line.document(masked=True)) if d.path != "version"]


def _show_differences(found: list[Difference]) -> None:
    for one in found:
        old, new = (json.dumps(value) if value is not None else "" for value in (one.old, one.new))
        words = [f"[red]- {escape(old)}[/red]" if old else "", f"[green]+ {escape(new)}[/green]" if new else ""]
        out.print(f"{escape(one.path)}:  " + "  ".join(word for word in words if word))


def _show_trial(told: ConfigReported) -> None:
    if told.trial is not None:
        out.print(
            f"on trial until {told.trial.deadline_at:%Y-%m-%d %H:%M:%S} UTC, then version {told.good_version} again, "
            "unless it is confirmed: edge-inspector remote confirm"
        )  # fmt: skip


def _show_entry(what: str, entry: AuditEntry) -> None:
    version = f"version {entry.version} " if entry.version is not None else ""
    reason = f": {entry.reason}" if entry.reason else ""
    out.print(escape(f"{what}: {version}of {entry.by} {entry.outcome.replace('_', ' ')}{reason}"))
    for fault in entry.faults:
        found = f" (found {fault.found})" if fault.found else ""
        suggestion = f"; {fault.suggestion}" if fault.suggestion else ""
        out.print(escape(f"  {fault.path or 'document'}: {fault.problem}{found}{suggestion}"))


def _is_over(told: ConfigReported) -> bool:
    return told.last is not None and told.last.outcome != "preparing"


def _conclude(told: ConfigReported, *, as_json: bool) -> None:
    """Say how it ended. Exit code 1: not as wanted."""
    assert told.last is not None
    if as_json:
        print_json(told.model_dump(mode="json", by_alias=True))
    else:
        _show_entry("the device", told.last)
        _show_trial(told)
    raise typer.Exit(0 if told.last.outcome in _GOOD else 1)


def _ask(question: str, *, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise InspectorError(f"{question} nobody is there to answer", hint="--yes answers")
    if not typer.confirm(question, err=True):
        raise typer.Exit(1)
