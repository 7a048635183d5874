"""Does each trigger get exactly one result, and was the frame judged that part's? python -m tests.faults.oracle [--count 10000]

Parts come by at random intervals. The camera is a GigE Vision simulator that writes the number of the part in front of it into the
pixels; the daemon, a process of its own, judges with a network whose score is that number; so the result says what was judged. On
the way: triggers published twice, frames before the trigger (a camera that runs free), kill -9 of the daemon, a camera that
freezes or dies. What is asserted: one result for each trigger id, and no finding of another part's number.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.line import DaemonProcess, Listener, Mosquitto, device_folder, listening, subscribing, until
from tests.test_aravis import Simulator
from tests.tiny import coded_bundle

MODES = {"free": "", "software": "?trigger=software", "hardware": "?trigger=Line0"}
EXPIRES_MS, IN_VIEW_MS = 1000, 200
LINE = """\
schema: ei.line.v1
version: 1
stations:
  press:
    trigger: {trigger}
    hardware: {{announced: true, tolerance_ms: 100, debounce_ms: 200}}
    expires_ms: {expires}
    in_view_ms: {in_view}
    product: coded
    products: {{coded: whole}}
    cameras: {{top: {{uri: "aravis://127.0.0.1{option}", width: 64, height: 64, fps: 50, exposure_us: 1000, timeout_ms: 600}}}}
recipes:
  whole: {{cameras: {{top: {{rois: {{all: {{bundle: coded}}}}}}}}}}
"""


class Belt:
    """Moves parts, tells of them, and does harm."""

    def __init__(self, mode: str, camera: Simulator, daemon: DaemonProcess, listener: Listener, seed: int) -> None:
        self.mode, self.camera, self.daemon, self.listener = mode, camera, daemon, listener
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()

    def bring(self, part: int) -> None:
        """One part in front of the camera for as long as the configuration says, and then a while."""
        self.camera.tell(f"part {part}")
        told = {"trigger_id": f"T-{part}", "part_id": f"P-{part}"}
        self.listener.say(told, "trigger", "press")
        if self.mode == "hardware" and self.random.random() > 0.03:
            self.camera.say("pulse")
            self.camera.done()
        if self.random.random() < 0.1:
            self.done["told twice"] += 1
            time.sleep(self.random.uniform(0, 0.05))
            self.listener.say(told, "trigger", "press")
        self.harm()
        # The simulator answers its line within 40 ms: parts on it need to be further apart than the debounce time by that.
        time.sleep((IN_VIEW_MS + (100 if self.mode == "hardware" else 0)) / 1000 + self.random.expovariate(20))

    def harm(self) -> None:
        """Now and then."""
        chance = self.random.random()
        assert self.camera.process is not None
        if chance < 0.004:
            self.done["daemon killed"] += 1
            self.daemon.kill()
            threading.Timer(self.random.uniform(0, 0.5), self.daemon.start).start()
        elif chance < 0.012:
            self.done["camera frozen"] += 1
            self.camera.process.send_signal(signal.SIGSTOP)
            time.sleep(self.random.uniform(0.1, 1.5))
            self.camera.process.send_signal(signal.SIGCONT)
        elif chance < 0.015:
            self.done["camera killed"] += 1
            self.camera.stop()
            time.sleep(self.random.uniform(0.0, 1.0))
            self.camera.start()


def run(mode: str, count: int, folder: Path, seed: int = 1) -> dict[str, Any]:
    """`count` parts come by; returns what the oracle found. `violations` is empty where all promises were kept."""
    broker, camera = Mosquitto(folder / "mosquitto").start(), Simulator()
    camera.start()
    coded_bundle(folder / "bundles")
    trigger = "hardware" if mode == "hardware" else "software"
    line = LINE.format(trigger=trigger, option=MODES[mode], expires=EXPIRES_MS, in_view=IN_VIEW_MS)
    device = device_folder(folder / "device", broker.port, line)
    text = (device / "device.yaml").read_text().splitlines()
    text = [row for row in text if not row.startswith(("trust:", "bundles:"))]
    (device / "device.yaml").write_text("\n".join([*text, f"trust: {folder}/bundles/trust", f"bundles: {folder}/bundles", ""]))
    try:
        with DaemonProcess(device) as daemon, listening(broker.port) as listener, subscribing(broker.port) as subscriber:
            until(lambda: [r for r in listener.of("ready", "press") if r["ready"]], 60, "ready")
            belt = Belt(mode, camera, daemon, listener, seed)
            results = []
            for part in range(1, count + 1):
                belt.bring(part)
                results += list(subscriber.results(timeout_s=0.0))
                listener.heard.clear()
            wanted = {f"T-{part}" for part in range(1, count + 1)}
            end = time.monotonic() + 60
            while {r.trigger_id for r in results} < wanted and time.monotonic() < end:
                results += list(subscriber.results(timeout_s=0.5))
            results += list(subscriber.results(timeout_s=3.0))  # no second one comes late
    finally:
        camera.stop()
        broker.stop()
    return judged(mode, wanted, results) | {"faults": dict(belt.done)}


def judged(mode: str, wanted: set[str], results: list[Any]) -> dict[str, Any]:
    """What the oracle says."""
    counted = Counter(result.trigger_id for result in results)
    violations = [f"{name}: {counted[name]} results" for name in sorted(wanted) if counted[name] != 1]
    violations += [f"{name}: never triggered" for name in counted if name not in wanted]
    for result in results:
        scores = {finding.score for finding in result.findings if finding.score is not None}
        if scores - {float(result.trigger_id[2:])} or (result.verdict.value == "pass" and not scores):
            violations.append(f"{result.trigger_id}: {result.verdict.value} by the image of part {scores}")
    reasons = Counter(f"{result.verdict.value}: {result.reason.value}" for result in results)
    return {"mode": mode, "triggers": len(wanted), "results": len(results), "reasons": dict(reasons), "violations": violations}


def main() -> None:
    """All modes, shared out evenly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    broken = False
    for mode in given.modes:
        with tempfile.TemporaryDirectory() as folder:
            found = run(mode, given.count // len(given.modes), Path(folder), given.seed)
        print(json.dumps(found), flush=True)
        broken |= bool(found["violations"])
    sys.exit(broken)


if __name__ == "__main__":
    main()
