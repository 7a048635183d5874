"""Nobody is stranded by an update: an installation that release 0.1 made is started by this code."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from edge_inspector.schema import read_yaml
from tests.line import DaemonProcess, Mosquitto, collected, free_port, listening, subscribing, until

INSTALLATION = Path(__file__).parent / "cases" / "installation-0.1"


@pytest.fixture
def installation(tmp_path: Path, mosquitto: Mosquitto) -> Path:
    folder = tmp_path / "device"
    shutil.copytree(INSTALLATION, folder, ignore=shutil.ignore_patterns("make.py"))
    device = folder / "device.yaml"
    device.write_text(re.sub(r"port: \d+", f"port: {mosquitto.port}", device.read_text()))
    return folder


def stored(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Stream and numbers by station."""
    with closing(sqlite3.connect(folder / "state" / "outbox.db")) as database:
        streams = dict(database.execute("SELECT station, stream FROM streams").fetchall())
        rows = database.execute("SELECT station, seq FROM results ORDER BY seq").fetchall()
    return {station: (stream, [seq for at, seq in rows if at == station]) for station, stream in streams.items()}


def test_an_installation_of_release_0_1_goes_on_and_says_which_lines_it_needs(installation: Path, mosquitto: Mosquitto) -> None:
    before = stored(installation)
    stream, numbers = before["press"]
    assert len(numbers) > 20
    with listening(mosquitto.port) as listener, subscribing(mosquitto.port) as subscriber:
        with DaemonProcess(installation) as daemon:
            until(lambda: any(state["online"] for state in listener.of("state")), 60, "the daemon")
            results = collected(subscriber, len(numbers))
            assert [(result.stream, result.seq) for result in results] == [(stream, seq) for seq in numbers]
            heads = until(lambda: {head["stream"] for head in listener.of("head")}, what="heads")
            assert heads <= {stream for stream, _ in before.values()}
            told = until(lambda: listener.of("config", "reported"), what="a report")[-1]
            assert (told["version"], told["source"]) == (2, "remote")
            assert told["line"]["stations"]["belt"]["cameras"]["top"]["uri"] == "gst:***"
            until(lambda: listener.of("bundle", "tiny", "reported"), what="a report of the bundle")
            assert listener.of("bundle", "tiny", "reported")[-1]["release"] == 2
            for station, lines in (
                ("press", "add sources: {folders: [pictures]}"),
                ("belt", "add sources: {gst: {name: PIPELINE}}"),
            ):
                until(lambda s=station, w=lines: any(w in r["reason"] for r in listener.of("ready", s)), 30, lines)  # type: ignore[misc]
                assert not any(ready["ready"] for ready in listener.of("ready", station))
                assert lines in json.dumps(listener.of("health"))
            assert daemon.stop() == 0
        section = subprocess.run(
            [sys.executable, "-m", "edge_inspector.cli", "check", "--sources", "--config", str(installation / "device.yaml")],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        printed = read_yaml(section.encode(), "printed")
        assert isinstance(printed, dict)
        assert printed["sources"]["folders"] == ["pictures"]
        assert "# stations.belt.cameras.top.uri: gst:belt-top" in section
        with (installation / "device.yaml").open("a") as file:
            file.write(section)
        with DaemonProcess(installation) as daemon:
            until(lambda: listener.of("ready", "press")[-1]["ready"], 60, "press judges")
            new = [result for result in collected(subscriber, 4) if result.seq > numbers[-1]]  # the last one may come again
            assert {result.stream for result in new} == {stream}
            assert [result.seq for result in new] == [numbers[-1] + 1 + n for n in range(len(new))]
            assert daemon.stop() == 0


def test_a_device_without_any_source_starts_as_before(tmp_path: Path) -> None:
    """What `init` wrote then needs no new line."""
    (tmp_path / "device.yaml").write_text(
        f"schema: ei.device.v1\nidentity: {{site: a, line: b, device: c}}\nbroker: {{host: 127.0.0.1, port: {free_port()}}}\n"
    )
    (tmp_path / "line.yaml").write_text(
        "schema: ei.line.v1\nstations: {one: {product: p, products: {p: r}, cameras: {top: {uri: 'synthetic://?fps=5'}}}}\n"
        "recipes: {r: {cameras: {top: {rois: {all: {bundle: b}}}}}}\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "edge_inspector.cli", "check", "--sources", "--config", str(tmp_path / "device.yaml")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert read_yaml(done.stdout.encode(), "printed") == {"sources": {}}
