"""What README, ARCHITECTURE and the demo's page say is so: links, verbs, options, and the Python example."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from edge_inspector.cli import app
from edge_inspector.config import load_device
from tests.line import DaemonProcess, Mosquitto, device_folder, line_yaml, until

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "ARCHITECTURE.md",
    ROOT / "SECURITY.md",
    ROOT / "engines" / "README.md",
    ROOT / "systemd" / "README.md",
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_exists_with_its_options(page: Path) -> None:
    group = typer.main.get_command(app)
    verbs = group.commands  # type: ignore[attr-defined]
    for line in re.findall(r"^(?:sudo )?(?:\S*/)?edge-inspector (.+)$", page.read_text(), re.MULTILINE):
        words = shlex.split(line, comments=True)
        assert words[0] in verbs, line
        verb = verbs[words[0]]
        verb = verb.commands[words[1]] if hasattr(verb, "commands") else verb
        known = {option for parameter in verb.params for option in parameter.opts}
        assert {word for word in words[1:] if word.startswith("--")} <= known, line


def test_the_documents_examples_are_valid(tmp_path: Path) -> None:
    """README's wires, and all that `init` leaves commented out of device.yaml and line.yaml."""
    found = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(found) == 2
    (tmp_path / "device.yaml").write_text(
        (ROOT / "edge_inspector" / "cli" / "templates" / "device.yaml").read_text() + found[0]
    )
    assert load_device(tmp_path / "device.yaml").config.sources.hosts[1] == "10.1.0.0/24"
    device = (ROOT / "edge_inspector" / "cli" / "templates" / "device.yaml").read_text()
    (tmp_path / "device.yaml").write_text(
        re.sub(r"^(\s*)# (?=[a-z_ ]+: |  )", r"\1", device.split("# outputs:")[0], flags=re.MULTILINE)
    )
    load_device(tmp_path / "device.yaml")
    (tmp_path / "device.yaml").write_text(device + found[1])
    assert set(load_device(tmp_path / "device.yaml").config.outputs) == {"press-1"}
    commented = "outputs:" + re.sub(r"^# ", "", device.split("# outputs:")[1], flags=re.MULTILINE)
    (tmp_path / "device.yaml").write_text(device + commented)
    assert load_device(tmp_path / "device.yaml").config.outputs["press-1"].heartbeat is not None


def test_the_python_example_runs(tmp_path: Path, mosquitto: Mosquitto) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml(trigger="free"))
    with DaemonProcess(folder) as daemon:
        until(lambda: "ready: sheet" in daemon.log, what="ready")
        example = f"import pathlib\npath = pathlib.Path({str(folder / 'device.yaml')!r})\n{code.group(1)}"
        with subprocess.Popen([sys.executable, "-u", "-c", example], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(60)]  # it waits for more, for ever
            assert process.poll() is None
            process.kill()
    assert lines[0].startswith("paper-001 pass below_threshold") or lines[0].startswith("paper-001 fail")
