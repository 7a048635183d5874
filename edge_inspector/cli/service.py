"""`edge-inspector service`: the daemon under systemd, one instance for each folder /etc/edge-inspector/NAME."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from edge_inspector.cli.shown import JsonOption, err, out, print_json
from edge_inspector.config import CREDENTIALS, Device
from edge_inspector.errors import InspectorError

app = typer.Typer(
    name="service", help="Run the line as a systemd service, with rights to nothing but cameras, GPU and its own state.",
    no_args_is_help=True,
)  # fmt: skip

CONFIGURATIONS = Path("/etc/edge-inspector")
UNITS = Path("/etc/systemd/system")
TEMPLATE = "edge-inspector@.service"
_JETSON = Path("/etc/nv_tegra_release")
_HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 - not used: what the unit does not see
_SHOWN = ("ActiveState", "SubState", "StatusText", "NRestarts", "MainPID", "ActiveEnterTimestamp", "UnitFileState")

NameArgument = Annotated[str, typer.Argument(help="instance: its folder is /etc/edge-inspector/NAME", metavar="NAME")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="say what would be done, and do nothing")]


@dataclass(frozen=True)
class _Plan:
    """What is to be written, then run."""

    files: dict[Path, str]
    folders: tuple[Path, ...]
    commands: tuple[tuple[str, ...], ...]

    def show(self) -> None:
        for path, text in self.files.items():
            err.print(f"would write {path}:")
            out.print(text, markup=False)
        for folder in self.folders:
            err.print(f"would make {folder}, for root only")
        for command in self.commands:
            err.print(f"would run: {shlex.join(command)}", markup=False)

    def carry_out(self) -> None:
        try:
            for path, text in self.files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            for folder in self.folders:
                folder.mkdir(mode=0o700, exist_ok=True)
                folder.chmod(0o700)
        except OSError as error:
            raise InspectorError(f"{error.filename}: {error.strerror}", hint="run it as root: sudo") from error
        for command in self.commands:
            _run(*command)


def _unit(instance: str) -> str:
    return TEMPLATE.replace("@", f"@{instance}")


def _run(*command: str) -> str:
    """What a command prints. Raises InspectorError with its own words."""
    if shutil.which(command[0]) is None:
        raise InspectorError(f"{command[0]} is not here", hint="this machine does not run systemd; --dry-run shows the unit")
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own arguments
    if done.returncode:
        words = (done.stderr or done.stdout).strip().replace("\n", "; ")
        raise InspectorError(f"{shlex.join(command)}: {words}", hint="run it as root: sudo" if os.getuid() else "")
    return done.stdout


def _no_user() -> Iterator[InspectorError]:
    if os.geteuid() != 0:
        hint = "run it as root: sudo; --dry-run shows what would be done"
        yield InspectorError("services are root's business", hint=hint)


def _checked_name(name: str) -> str:
    from pydantic import TypeAdapter, ValidationError  # noqa: PLC0415 - verbs load what they need

    from edge_inspector.recipes import Id  # noqa: PLC0415

    try:
        return str(TypeAdapter(Id).validate_python(name))
    except ValidationError as error:
        raise InspectorError(f"{name!r} is no name for a service", hint="small letters, digits and hyphens: press-1") from error


def _program() -> Path:
    """The program that the unit runs."""
    return Path(sys.executable).parent / "edge-inspector"


def _no_program() -> Iterator[InspectorError]:
    """Why the service could not run its own program."""
    program, package = _program(), Path(str(resources.files("edge_inspector")))
    hint = "install it elsewhere: python3 -m venv /opt/edge-inspector && /opt/edge-inspector/bin/pip install ."
    for path in dict.fromkeys((program, Path(sys.executable).resolve(), package.resolve())):
        if str(path).startswith(tuple(f"{folder}/" for folder in _HIDDEN)):
            yield InspectorError(f"{path}: the service sees no home and no /tmp", hint=hint)
    if not program.exists() or re.search(r"[\s%\"']", str(program)):
        yield InspectorError(f"{program}: not there, or no path for a unit", hint=hint)
    if shutil.which("systemctl") is None:
        yield InspectorError("systemctl is not here", hint="this machine does not run systemd")


def _no_documents(folder: Path) -> Iterator[InspectorError]:
    """Why the service could not begin with the documents of the device."""
    from edge_inspector.config import load_device, load_line  # noqa: PLC0415

    if not (folder / "device.yaml").exists():
        hint = f"edge-inspector init {folder}, or copy the folder that you have commissioned there"
        yield InspectorError(f"{folder / 'device.yaml'}: is not there", hint=hint)
        return
    try:
        device = load_device(folder / "device.yaml")
    except InspectorError as error:
        yield error
        return
    try:
        if device.line_file.exists():
            load_line(device.line_file)
        else:
            hint = "edge-inspector init writes a first one"
            yield InspectorError(f"{device.line_file}: is not there", hint=hint)
    except InspectorError as error:
        yield error
    yield from _no_state(folder, device)
    yield from _unreadable(folder, device)


def _no_state(folder: Path, device: Device) -> Iterator[InspectorError]:
    state = Path("/var/lib") / folder.relative_to("/etc")
    if device.state != state:
        yield InspectorError(
            f"{folder / 'device.yaml'}: state in {device.state}, but the service can write {state} only",
            hint="leave storage.folder out, and no link in the folder's path; move an older state there",
        )
    if (folder / "state" / "outbox.db").exists():
        yield InspectorError(
            f"{folder / 'state'}: results and orders of before", hint=f"take them along: mv {folder / 'state'} {state}"
        )


def _unreadable(folder: Path, device: Device) -> Iterator[InspectorError]:
    """What others can read and must not, and what the service's own user cannot read and must."""
    for key in (folder / "keys").glob("*.key"):
        if key.stat().st_mode & 0o077:
            yield InspectorError(f"{key}: others can read it", hint=f"chmod 600 {key}, or take it away")
    trusted = {device.trust, device.folder / device.config.remote.trust}
    looked_at = [folder.parent, folder, folder / "device.yaml", device.line_file, *sorted(trusted), device.bundles]
    for path in (*looked_at, *(key for place in trusted for key in place.rglob("*")), *device.bundles.rglob("*")):
        needed = 0o005 if path.is_dir() else 0o004
        if path.exists() and path.stat().st_mode & needed != needed:
            yield InspectorError(
                f"{path}: cannot be read by the service's own user",
                hint=f"chmod a+rX {path}; secrets belong into {folder / CREDENTIALS}",
            )


def _refusals(folder: Path) -> Iterator[InspectorError]:
    """All that `install` refuses, in the order in which it would."""
    yield from _no_user()
    yield from _no_program()
    try:
        yield from _no_documents(folder)
    except PermissionError as error:  # who is not root may not look everywhere
        yield InspectorError(f"{error.filename}: {error.strerror}", hint="run it as root: sudo")


def _secrets(name: str) -> list[Path]:
    """Files that only root reads, and systemd hands over. Raises InspectorError."""
    found = sorted((CONFIGURATIONS / name / CREDENTIALS).glob("*"))
    for path in found:
        if not path.is_file() or re.search(r"[\s%:\"']", path.name):
            raise InspectorError(
                f"{path}: no plain file with a plain name", hint="systemd hands over files of that folder only"
            )
    return found


def _group_of(name: str) -> list[str]:
    """The unit's line for the group that may read its pictures. Raises InspectorError."""
    from edge_inspector.config import load_device  # noqa: PLC0415 - verbs load what they need

    document = CONFIGURATIONS / name / "device.yaml"
    group = load_device(document).config.storage.evidence_group if document.exists() else None
    return [f"Group={group}"] if group is not None else []


def _plan(name: str) -> _Plan:
    templates = resources.files("edge_inspector.cli").joinpath("templates")
    text = templates.joinpath(TEMPLATE).read_text().replace("/opt/edge-inspector/bin/edge-inspector", str(_program()))
    files = {UNITS / TEMPLATE: text}
    secrets = [f"LoadCredential={CREDENTIALS}_{path.name}:{path}" for path in _secrets(name)]
    files[UNITS / f"{_unit(name)}.d" / "credentials.conf"] = "\n".join(["[Service]", *secrets, ""])
    files[UNITS / f"{_unit(name)}.d" / "evidence.conf"] = "\n".join(["[Service]", *_group_of(name), ""])
    if _JETSON.exists():
        files[UNITS / f"{TEMPLATE}.d" / "jetson.conf"] = templates.joinpath("jetson.conf").read_text()
    return _Plan(
        files, (CONFIGURATIONS / name / CREDENTIALS,),
        (("systemctl", "daemon-reload"), ("systemctl", "enable", _unit(name)), ("systemctl", "restart", _unit(name))),
    )  # fmt: skip


@app.command()
def install(name: NameArgument, dry_run: DryRunOption = False) -> None:
    """Write the unit, enable it, start it, and wait until it is up. Again after changing credentials/: start anew.

    With --dry-run all that would be refused is said. Exit code 1: something would.
    """
    folder = CONFIGURATIONS / _checked_name(name)
    plan, refusals = _plan(name), list(_refusals(folder))
    if dry_run:
        plan.show()
        for refusal in refusals:
            err.print(f"would be refused: {refusal}", markup=False)
        raise typer.Exit(1 if refusals else 0)
    for refusal in refusals:
        raise refusal
    try:
        plan.carry_out()
    except InspectorError as error:
        said = _run("journalctl", "--unit", _unit(name), "--lines", "8", "--output", "cat", "--no-pager")
        raise InspectorError(error.message, hint=f"it said:\n{said}" if said.strip() else error.hint) from error
    told = _told(_unit(name))
    out.print(f"{_unit(name)}: {told['ActiveState']}: {told['StatusText'] or 'starting'}", markup=False)
    err.print(f"what it says: journalctl -fu {_unit(name)}; what is wrong with the line: edge-inspector check")


def _told(unit: str) -> dict[str, str]:
    text = _run("systemctl", "show", "-p", ",".join(_SHOWN), unit)
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def _instances() -> list[str]:
    listed = _run("systemctl", "list-units", "--all", "--plain", "--no-legend", "--full", _unit("*"))
    names = [line.split()[0] for line in listed.splitlines() if line.strip()]
    return [unit.removeprefix("edge-inspector@").removesuffix(".service") for unit in names]


@app.command()
def status(name: Annotated[str | None, typer.Argument(metavar="[NAME]")] = None, as_json: JsonOption = False) -> None:
    """What systemd knows of each instance, with what the daemon says of itself. Exit code 1: one is not up."""
    told: dict[str, dict[str, Any]] = {one: _told(_unit(one)) for one in ([name] if name else _instances())}
    if as_json:
        print_json(told)
    elif not told:
        err.print(f"no instance is installed: edge-inspector service install NAME, for a folder {CONFIGURATIONS}/NAME")
    else:
        table = Table("instance", "state", "at boot", "starts again", "since", "says", box=None)
        for one, facts in told.items():
            colour = "green" if facts["ActiveState"] == "active" else "red"
            table.add_row(
                one, f"[{colour}]{facts['ActiveState']} ({facts['SubState']})[/]", facts["UnitFileState"], facts["NRestarts"],
                facts["ActiveEnterTimestamp"], escape(facts["StatusText"]),
            )  # fmt: skip
        out.print(table)
    raise typer.Exit(0 if told and all(facts["ActiveState"] == "active" for facts in told.values()) else 1)


@app.command()
def uninstall(name: NameArgument, dry_run: DryRunOption = False) -> None:
    """Stop the service and forget it. Its configuration and its results stay."""
    unit, others = _unit(_checked_name(name)), []
    if not dry_run:
        others = [one for one in _instances() if one != name]
    plan = _Plan({}, (), (("systemctl", "disable", "--now", unit),))
    if dry_run:
        plan.show()
        err.print(f"would remove {UNITS / TEMPLATE}, unless another instance is there")
        return
    for refusal in _no_user():
        raise refusal
    plan.carry_out()
    for drop_in in ("credentials.conf", "evidence.conf"):
        (UNITS / f"{unit}.d" / drop_in).unlink(missing_ok=True)
    if not others:
        (UNITS / TEMPLATE).unlink(missing_ok=True)
        (UNITS / f"{TEMPLATE}.d" / "jetson.conf").unlink(missing_ok=True)
        _run("systemctl", "daemon-reload")
    out.print(f"{unit}: gone. Still there: {CONFIGURATIONS / name}, /var/lib/edge-inspector/{name}")
