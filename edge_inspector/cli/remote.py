"""Verbs for changes over MQTT: remote show, diff, set, confirm, cancel, reset; rollout."""

from __future__ import annotations

import getpass
import json
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from edge_inspector.bundles import Manifest, looked_through, open_bundle
from edge_inspector.cli.shown import ConfigOption, JsonOption, err, out, phases, print_json, progress_bar
from edge_inspector.config import Device, DeviceConfig, LineConfig, load_device, parse_line, read_document
from edge_inspector.errors import InspectorError
from edge_inspector.messages import AuditEntry, BundleDesired, BundleReported, ConfigDesired, ConfigReported, Topics
from edge_inspector.mqtt import Connection
from edge_inspector.remote.client import CONFIGURATION, Difference, R, Remote, differences
from edge_inspector.schema import read_yaml, validate
from edge_inspector.signatures import Ed25519PrivateKey, read_private_key, trusted_keys

app = typer.Typer(
    name="remote",
    help="See and change a device's line configuration over MQTT; it cannot be stranded by it.",
    no_args_is_help=True,
)
DeviceOption = Annotated[str | None, typer.Option("--device", help="SITE/LINE/DEVICE (else that of device.yaml)")]
BrokerOption = Annotated[str | None, typer.Option("--broker", help="HOST or HOST:PORT (else that of device.yaml)")]
KeyOption = Annotated[Path | None, typer.Option("--key", help="signs it (else keys/orders.key beside device.yaml)")]
ByOption = Annotated[str | None, typer.Option("--by", help="for the audit trail (else user@machine)")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="do not ask")]
BundleOption = Annotated[str | None, typer.Option("--bundle", help="of this bundle, not of the line configuration")]
Reported = ConfigReported | BundleReported
ORDERS_KEY = Path("keys") / "orders.key"
_SHORTENED = "the broker takes no message as long as the device's report"
_ANSWER_S = 8.0
_STAYS = (
    "the order stays at the broker: the device takes it when it can; edge-inspector remote show tells, remote cancel ends it"
)
_NOBODY = {"schema": "ei.device.v1", "identity": {"site": "x", "line": "x", "device": "x"}}
"""Where there is no device.yaml: all of it comes from options."""
_GOOD = ("trial", "committed", "cancelled", "reset")


@dataclass(frozen=True)
class Address:
    """Which device, over which broker, and in whose name."""

    config: Path
    device: str | None
    broker: str | None
    key: Path | None = None
    by: str | None = None

    @contextmanager
    def reached(self, model: type[R], subject: str) -> Iterator[Remote[R]]:
        """A connection to it. Raises InspectorError."""
        with self.connected(f"remote-{secrets.token_hex(4)}", lambda topics: Remote.subscriptions(topics, subject)) as reached:
            yield Remote(*reached, model, subject, by=self.name, key=self.signer)

    @contextmanager
    def connected(self, client: str, subscriptions: Callable[[Topics], tuple[str, ...]]) -> Iterator[tuple[Connection, Topics]]:
        """A connection to its broker. Raises InspectorError."""
        from edge_inspector.wiring import connection_of, topics_of  # noqa: PLC0415 - loads OpenCV and ONNX Runtime

        found = _addressed(self.config, self.device, self.broker)
        topics = topics_of(found)
        with connection_of(found, client, subscriptions(topics), durable=False) as connection:
            yield connection, topics

    @property
    def name(self) -> str:
        """Who orders it."""
        return re.sub(r"[^\x21-\x7e]", "-", self.by or f"{_user()}@{socket.gethostname()}")[:128]

    @property
    def signer(self) -> Ed25519PrivateKey | None:
        """The key named, or that which `init` has put beside device.yaml. Raises SignatureError."""
        beside = self.config.parent / ORDERS_KEY
        key = self.key or (beside if os.path.exists(beside) else None)  # noqa: PTH110 - Path.exists raises where it may not look
        return read_private_key(key) if key is not None else None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in containers
        return f"user-{os.getuid()}"


def _addressed(config: Path, device: str | None, broker: str | None) -> Device:
    if not config.exists() and not (device and broker):
        raise InspectorError(f"{config}: no such file", hint="name it with --config, or give --device and --broker")
    found = load_device(config) if config.exists() else Device(validate(DeviceConfig, _NOBODY, "options"), Path())
    changes: dict[str, Any] = {}
    if device is not None:
        levels = device.split("/")
        if len(levels) != 3:
            raise InspectorError(
                f"--device {device}: SITE/LINE/DEVICE is expected", hint="as in --device plant-1/line-1/edge-1"
            )
        changes["identity"] = dict(zip(("site", "line", "device"), levels, strict=True))
    if broker is not None:
        host, _, port = broker.partition(":") if broker.count(":") < 2 else (broker.strip("[]"), "", "")
        if port and not port.isdigit():
            raise InspectorError(f"--broker {broker}: HOST or HOST:PORT is expected")
        changes["broker"] = {**found.config.broker.model_dump(exclude_none=True), "host": host, "port": int(port or 1883)}
    values = {**found.config.model_dump(mode="json", by_alias=True), **changes}
    return Device(validate(DeviceConfig, values, "options"), found.folder)


def show(
    config: ConfigOption = Path("device.yaml"), device: DeviceOption = None, broker: BrokerOption = None,
    bundle: BundleOption = None,
    document: Annotated[bool, typer.Option("--document", help="print the line document alone, as JSON: set takes it")] = False,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """What is in force, what is on trial, and who has changed what."""
    with _asked(Address(config, device, broker), bundle) as remote:
        told = remote.reported(_ANSWER_S)
    if document and isinstance(told, ConfigReported):
        print_json(_line_of(told))
        return
    if as_json:
        print_json(told.model_dump(mode="json", by_alias=True))
        return
    if remote.online is False:
        err.print("the device is offline: this is what it said last", style="yellow")
    if told.shortened:
        err.print(f"{_SHORTENED}: part of the history may be missing", style="yellow")
    where = "the device's own" if told.source == "local" else "remote"
    out.print(f"[bold]{escape(remote.topics.device_path)}[/bold], {escape(remote.subject)}: version {_version(told)}, {where}")
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
    with Address(config, device, broker).reached(ConfigReported, CONFIGURATION) as remote:
        found = _differences(remote.reported(_ANSWER_S), line)
    if as_json:
        print_json([{"path": d.path, "old": d.old, "new": d.new} for d in found])
    else:
        _show_differences(found)
        if not found:
            err.print("no difference, but for what a report does not tell")
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
    with Address(config, device, broker, key, by).reached(ConfigReported, CONFIGURATION) as remote:
        told = remote.reported(_ANSWER_S)
        found = _differences(told, line)
        same = line.model_copy(update={"version": told.version}).reference().hash == told.hash
        if not as_json:
            _show_differences(found)
            if not found and not same:
                out.print("what differs is not told: the path, options or user of a stream")
        if same:
            err.print(f"nothing would change: version {told.version} says the same")
            if as_json:
                print_json(told.model_dump(mode="json", by_alias=True))
            return
        version = max(line.version, told.seen + 1)
        if version != line.version:
            err.print(f"goes as version {version}: versions up to {told.seen} are taken, {file} says {line.version}")
        _warn_offline(remote.online)
        _ask(f"send it to {remote.topics.device_path}?", yes=yes)
        remote.desire(ConfigDesired(by=remote.by, line={**document, "version": version}, confirm_s=confirm_s))
        with err.status("sent; the device tries it beside what runs"):
            told = remote.awaited(_answer_to(told, version, remote.by), wait_s, hint=_STAYS)
    _conclude(told, as_json=as_json)


def confirm(
    config: ConfigOption = Path("device.yaml"), device: DeviceOption = None, broker: BrokerOption = None,
    bundle: BundleOption = None, key: KeyOption = None, by: ByOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Keep what is on trial."""
    _decide(Address(config, device, broker, key, by), bundle, "confirm", as_json=as_json)


def cancel(
    config: ConfigOption = Path("device.yaml"), device: DeviceOption = None, broker: BrokerOption = None,
    bundle: BundleOption = None, key: KeyOption = None, by: ByOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Take what is on trial, or being tried, back at once."""
    _decide(Address(config, device, broker, key, by), bundle, "cancel", as_json=as_json)


def reset(
    config: ConfigOption = Path("device.yaml"), device: DeviceOption = None, broker: BrokerOption = None,
    bundle: BundleOption = None, key: KeyOption = None, by: ByOption = None, yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """From what is remote back to what the device has of its own: its line.yaml, or its bundle."""
    _ask(f"put the device's own {bundle or 'line.yaml'} in force again?", yes=yes)
    _decide(Address(config, device, broker, key, by), bundle, "reset", as_json=as_json)


for _verb in (show, diff, confirm, cancel, reset):
    app.command()(_verb)
app.command("set")(set_)


def rollout(
    bundle: Annotated[Path, typer.Argument(help="folder of the bundle, as you see it")],
    source: Annotated[str | None, typer.Option(help="where the device gets it: https://... or a folder there [BUNDLE]")] = None,
    config: ConfigOption = Path("device.yaml"), device: DeviceOption = None, broker: BrokerOption = None,
    shadow_parts: Annotated[int, typer.Option(min=0, help="so many parts are judged by both before the trial")] = 50,
    max_disagreements: Annotated[float, typer.Option(min=0, max=1, help="share of these that may be judged differently")] = 0.1,
    confirm_s: Annotated[int, typer.Option(min=1, max=604_800, help="on trial for so long, unless confirmed")] = 3600,
    confirm_parts: Annotated[int | None, typer.Option(min=20, help="confirmed by itself after so many parts on trial")] = None,
    wait_s: Annotated[float, typer.Option(min=1, help="for the device to come to the trial")] = 7200.0,
    key: KeyOption = None, by: ByOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Bring a release of a bundle to a device: fetched, verified, built, compared with the one in force, then on trial."""
    manifest = _sound(bundle, config)
    order = BundleDesired(
        by="?", bundle=manifest.name, release=manifest.release, source=source or str(bundle.resolve()),
        shadow_parts=shadow_parts, max_disagreements=max_disagreements, confirm_s=confirm_s, confirm_parts=confirm_parts,
    )  # fmt: skip
    with Address(config, device, broker, key, by).reached(BundleReported, f"bundle/{manifest.name}") as remote:
        before = remote.reported(_ANSWER_S)
        if order.release <= before.seen:
            raise InspectorError(
                f"release {order.release} of {manifest.name}: the device has seen releases up to {before.seen}",
                hint="give it a higher number: train --release",
            )
        _warn_offline(remote.online)
        remote.desire(order)
        with progress_bar() as shown:
            tell = phases(shown)

            def follow(now: BundleReported) -> None:
                if now.phase is not None and now.phase.total:
                    tell(now.phase.name, now.phase.done, now.phase.total)

            told = remote.awaited(_answer_to(before, order.release, remote.by), wait_s, follow, _STAYS)
    if told.shadow is not None and not as_json:
        shadow = told.shadow
        out.print(
            f"compared on {shadow.parts} parts: {shadow.disagreements} judged differently; networks take {shadow.new_ms} ms, "
            f"those in force {shadow.old_ms} ms"
        )  # fmt: skip
    _conclude(told, as_json=as_json)


def _sound(bundle: Path, config: Path) -> Manifest:
    """The manifest of a bundle that may be sent. Raises BundleError for one that no device would take."""
    trust = load_device(config).trust if config.exists() else None
    if not bundle.is_dir():
        raise InspectorError(f"{bundle}: No such file or directory", hint="the folder of a bundle is expected")
    if trust is not None and trusted_keys(trust):
        return open_bundle(bundle, trust).manifest
    manifest, signer = looked_through(bundle)
    err.print(f"signed by key {signer}; no trusted keys are here, so the device alone can tell whether it trusts it")
    return manifest


@contextmanager
def _asked(address: Address, bundle: str | None) -> Iterator[Remote[ConfigReported] | Remote[BundleReported]]:
    if bundle is None:
        with address.reached(ConfigReported, CONFIGURATION) as remote:
            yield remote
    else:
        with address.reached(BundleReported, f"bundle/{bundle}") as other:
            yield other


def _decide(address: Address, bundle: str | None, action: Literal["confirm", "cancel", "reset"], *, as_json: bool) -> None:
    with _asked(address, bundle) as remote:
        told: Reported = remote.reported(_ANSWER_S)
        version = {"confirm": _on_trial, "cancel": _cancellable, "reset": _resettable}[action](told)
        with err.status(f"{action} version {version}"):
            for wait_s in (1.0, 2.0, 4.0, 8.0, 0.0):
                remote.decide(version, action)
                told = remote.awaited(_answer_to(told, version, remote.by, any_version=action == "reset"), 3 * _ANSWER_S)
                if told.last is None or told.last.outcome != "too_early":
                    break
                time.sleep(wait_s)
    _conclude(told, as_json=as_json)


def _version(told: Reported) -> int | None:
    return told.version if isinstance(told, ConfigReported) else told.release


def _on_trial(told: Reported) -> int:
    if told.trial is None:
        raise InspectorError("nothing is on trial", hint="edge-inspector remote show tells what became of the last one")
    return told.trial.version


def _cancellable(told: Reported) -> int:
    if told.last is not None and told.last.outcome == "preparing" and told.last.version is not None:
        return told.last.version
    return _on_trial(told)


def _resettable(told: Reported) -> int:
    version = _version(told)
    if told.source == "local" or version is None:
        raise InspectorError("what the device has of its own is in force already")
    return version


def _read(file: Path) -> tuple[dict[str, Any], LineConfig]:
    values = read_yaml(read_document(file, "a line.yaml, or JSON, is expected"), str(file))
    line = parse_line(values, str(file))
    assert isinstance(values, dict)
    return values, line


def _differences(told: ConfigReported, line: LineConfig) -> list[Difference]:
    """But for the version, which every order changes. Of addresses both sides tell what a report does."""
    return [d for d in differences(_line_of(told), line.document(reported_only=True)) if d.path != "version"]


def _line_of(told: ConfigReported) -> dict[str, Any]:
    """The document in force. Raises InspectorError where the device had to leave it out."""
    if not told.line:
        raise InspectorError(
            f"{_SHORTENED}: the line document is missing",
            hint="raise the broker's packet limit (Mosquitto: max_packet_size), or look at line.yaml on the device",
        )
    return told.line


def _show_differences(found: list[Difference]) -> None:
    for one in found:
        old, new = (json.dumps(value) if value is not None else "" for value in (one.old, one.new))
        words = [f"[red]- {escape(old)}[/red]" if old else "", f"[green]+ {escape(new)}[/green]" if new else ""]
        out.print(f"{escape(one.path)}:  " + "  ".join(word for word in words if word))


def _show_trial(told: Reported) -> None:
    if told.trial is not None:
        good = told.good_version if isinstance(told, ConfigReported) else told.good_release
        option = "" if isinstance(told, ConfigReported) else f" --bundle {told.bundle}"
        out.print(
            f"on trial until {told.trial.deadline_at:%Y-%m-%d %H:%M:%S} UTC, then version {good} again, "
            f"unless it is confirmed: edge-inspector remote confirm{option}"
        )  # fmt: skip


def _show_entry(what: str, entry: AuditEntry) -> None:
    version = f"version {entry.version} " if entry.version is not None else ""
    reason = f": {entry.reason}" if entry.reason else ""
    out.print(escape(f"{what}: {version}of {entry.by} {entry.outcome.replace('_', ' ')}{reason}"))
    for fault in entry.faults:
        found = f" (found {fault.found})" if fault.found else ""
        suggestion = f"; {fault.suggestion}" if fault.suggestion else ""
        out.print(escape(f"  {fault.path or 'document'}: {fault.problem}{found}{suggestion}"))


def _answer_to(before: Reported, version: int, by: str, *, any_version: bool = False) -> Callable[[Reported], bool]:
    """Whether a report tells what became of our order; others may give some at the same time."""

    def is_it(now: Reported) -> bool:
        last = now.last
        if last is None or last == before.last or last.outcome == "preparing":
            return False
        return last.version == version or (last.by == by and (any_version or last.version is None))

    return is_it


def _warn_offline(online: bool | None) -> None:
    if online is False:
        err.print("the device is offline: the order waits at the broker until it is back", style="yellow")


def _conclude(told: Reported, *, as_json: bool) -> None:
    """Say how it ended. Exit code 1: not as wanted."""
    assert told.last is not None
    if as_json:
        print_json(told.model_dump(mode="json", by_alias=True))
    else:
        _show_entry("the device", told.last)
        if isinstance(told, ConfigReported) and told.promise:
            err.print(f"promise: {told.promise}", style="yellow", markup=False)
        _show_trial(told)
    raise typer.Exit(0 if told.last.outcome in _GOOD else 1)


def _ask(question: str, *, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise InspectorError(f"{question} nobody is there to answer", hint="--yes answers")
    if not typer.confirm(question, err=True):
        raise typer.Exit(1)
