"""Nothing grows with the number of results: no memory, no descriptor, no thread, no file.

Parts come at one station as fast as they are judged, at another one by triggers over MQTT; the quota is small, so that old results
are dropped all the time, as on a device that has run for months. Short by default; EDGE_INSPECTOR_LONG=1 judges 45,000 parts.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from edge_inspector.config import BrokerConfig
from edge_inspector.mqtt import Connection
from tests.line import TOPICS, DaemonProcess, Listener, Mosquitto, until
from tests.plant import Plant

LONG = bool(os.environ.get("EDGE_INSPECTOR_LONG"))
WARM, MEASURED = (5000, 45_000) if LONG else (1500, 3500)
"""Results until all buffers have been used once, from when the quota is reached; and results from then on."""
MOST_BYTES = 64 if LONG else 1000
"""That the process may grow by with each result; of few results buffers that come and go are more of each."""
PARTS = 8 if LONG else 4
"""Of the time. A leak grows in each of them; memory also steps up once, when a slow disk makes a queue longer than ever before."""
PATIENCE_S = 400.0 if LONG else 90.0
LOOK_S = 0.1
STATION = """\
  {name}:
    trigger: {trigger}
    expires_ms: 30000
    product: tiny
    products: {{tiny: whole}}
    cameras: {{top: {{uri: "dir://{pictures}?loop=1"}}}}
"""


def line(pictures: Path) -> str:
    stations = (("press", "software"), ("belt", "free"))
    told = "".join(STATION.format(name=name, trigger=trigger, pictures=pictures) for name, trigger in stations)
    recipe = "recipes:\n  whole: {cameras: {top: {rois: {all: {bundle: tiny}}}}}\n"
    return f"schema: ei.line.v1\nversion: 1\nstations:\n{told}{recipe}"


@dataclass(frozen=True)
class Look:
    """At a process, and at what it keeps."""

    results: int
    rss: int
    descriptors: int
    threads: int
    files: int


class Watch:
    """Looks at a daemon; it tells how many results there were once a second."""

    def __init__(self, daemon: DaemonProcess, listener: Listener, state: Path) -> None:
        assert daemon.process is not None
        self.process, self.listener, self.state = psutil.Process(daemon.process.pid), listener, state
        self.heads: dict[str, dict[str, int]] = {}

    def look(self) -> Look:
        self.listener.pump()
        self.heads |= {head["station"]: head for _, head in self.listener.heard}
        self.listener.heard.clear()
        results = sum(head["hi"] for head in self.heads.values())
        files = sum(len(names) for where, _, names in os.walk(self.state) if "evidence" not in where)  # has a quota of its own
        return Look(results, self.process.memory_info().rss, self.process.num_fds(), self.process.num_threads(), files)

    def drops(self) -> bool:
        """Whether the quota is reached."""
        self.look()
        return any(head["lo"] > 1 for head in self.heads.values())

    def during(self, results: int) -> list[Look]:
        """What is seen while there are so many more."""
        looks = [self.look()]

        def enough() -> bool:
            time.sleep(LOOK_S)
            looks.append(self.look())
            return looks[-1].results >= looks[0].results + results

        until(enough, PATIENCE_S, f"{results} results")
        return looks


def least(looks: list[Look], what: str) -> list[int]:
    """The least of a number in each part of the time: files and buffers come and go."""
    size = len(looks) // PARTS
    return [min(int(getattr(look, what)) for look in looks[n * size : (n + 1) * size]) for n in range(PARTS)]


def test_nothing_grows_with_the_number_of_results(tmp_path: Path, mosquitto: Mosquitto) -> None:
    plant = Plant(tmp_path, mosquitto.port)
    (plant.device / "line.yaml").write_text(line(tmp_path / "pictures"))
    with (plant.device / "device.yaml").open("a") as file:
        file.write("storage: {results_mb: 4, evidence_mb: 1}\n")
    config = BrokerConfig(host="127.0.0.1", port=mosquitto.port)
    with (
        Connection(config, "watch", subscriptions=[TOPICS.of("head", "+")]) as connection,
        DaemonProcess(plant.device) as daemon,
    ):
        watch = Watch(daemon, listener := Listener(connection), plant.device / "state")
        with plant.parts(listener, 0.02):
            until(watch.drops, PATIENCE_S, "as many results as are kept")
            watch.during(WARM)
            began = time.monotonic()
            looks = watch.during(MEASURED)
            took_s = time.monotonic() - began
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log
    count = looks[-1].results - looks[0].results
    memory = least(looks, "rss")
    each = statistics.median(after - before for before, after in zip(memory, memory[1:], strict=False)) / (count / PARTS)
    told = ", ".join(f"{rss / 1e6:.1f}" for rss in memory)
    print(f"\n{count} results at {count / took_s:.0f}/s: {told} MB, {each:.0f} bytes each")
    for what in ("descriptors", "threads", "files"):
        seen = least(looks, what)
        print(f"{what}: {seen[0]}, {seen[-1]}")
        assert seen[-1] <= seen[0], what
    assert each < MOST_BYTES
