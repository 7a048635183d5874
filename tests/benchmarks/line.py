"""The line measured on this machine: python -m tests.benchmarks.line throughput|latency|start|soak [--json]

Ratios are taken in one run, against a bare loop that decodes and preprocesses the same files and runs the shipped bundle
with the same ONNX Runtime threads. Needs Mosquitto. Nothing here asserts: machines are noisy.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from edge_inspector import pictures, preprocess
from edge_inspector.bundles import open_bundle
from edge_inspector.roi import Roi
from edge_inspector.runtime import OnnxEngine
from tests.faults.test_kills import small
from tests.line import ENGINES, DaemonProcess, Mosquitto, collected, device_folder, line_yaml, listening, subscribing, until

THREADS = 2
COPIES = 8


def files(folder: Path) -> Path:
    """The shipped recording, COPIES times."""
    folder.mkdir()
    for copy in range(COPIES):
        for path in sorted((ENGINES / "recording").glob("*.png")):
            shutil.copy(path, folder / f"{copy}-{path.name}")
    return folder


def bare_loop(folder: Path) -> dict[str, float]:
    """Decode, preprocess, run: seconds and CPU seconds per part, and the CPU of the engine alone."""
    bundle = open_bundle(ENGINES / "paper", ENGINES / "trust")
    paths = sorted(folder.glob("*.png"))
    with OnnxEngine(bundle, batch=4, threads=THREADS) as engine:
        plans: dict[tuple[int, ...], preprocess.Plan] = {}
        engine_cpu = 0.0
        wall, cpu = time.perf_counter(), time.process_time()
        for path in paths:
            image = pictures.read(path)
            plan = plans.get(image.shape)
            if plan is None:
                plan = plans[image.shape] = preprocess.Plan(bundle.manifest.input, Roi(), image.shape[0], image.shape[1])
            plan.fill(image, engine.images, engine.valid)
            began = time.process_time()
            engine()
            engine_cpu += time.process_time() - began
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    n = len(paths)
    return {"wall": wall / n, "cpu": cpu / n, "engine_cpu": engine_cpu / n}


def daemon_run(folder: Path, pictures_folder: Path, broker: Mosquitto) -> dict[str, float]:
    """The daemon over the same files through Mosquitto, from the 60th result to the last."""
    device = device_folder(folder, broker.port, line_yaml(f"dir://{pictures_folder}", trigger="free"))
    total = 60 * COPIES
    with subscribing(broker.port, f"bench-{folder.name}") as subscriber, DaemonProcess(device) as daemon:
        assert daemon.process is not None
        process = psutil.Process(daemon.process.pid)
        first = collected(subscriber, 60, 60)
        cpu = sum(process.cpu_times()[:2])
        rest = collected(subscriber, total - 60, 300)
        cpu = sum(process.cpu_times()[:2]) - cpu
        daemon.stop()
    wall = (rest[-1].decided_at - first[-1].decided_at).total_seconds()
    # CPU is read when a result has arrived; up to a queue of parts may be ahead of it at both ends, which cancels.
    return {"wall": wall / len(rest), "cpu": cpu / len(rest)}


def throughput(scratch: Path, broker: Mosquitto) -> dict[str, Any]:
    """Daemon against bare loop, in turn."""
    folder = files(scratch / "files")
    rounds = []
    for number in range(3):
        bare = bare_loop(folder)
        ours = daemon_run(scratch / f"device-{number}", folder, broker)
        rounds.append({
            "throughput_ratio": bare["wall"] / ours["wall"], "bare_ms": bare["wall"] * 1e3, "daemon_ms": ours["wall"] * 1e3,
            "cpu_ms_beyond_engine": (ours["cpu"] - bare["engine_cpu"]) * 1e3,
            "bare_cpu_ms_beyond_engine": (bare["cpu"] - bare["engine_cpu"]) * 1e3,
        })  # fmt: skip
    return {key: round(statistics.median(r[key] for r in rounds), 3) for key in rounds[0]} | {"rounds": len(rounds)}


def latency(scratch: Path, broker: Mosquitto) -> dict[str, Any]:
    """Trigger sent -> verdict heard, and -> trigger acknowledged (it is journalled), at 5 triggers a second."""
    device = device_folder(scratch / "device", broker.port, line_yaml(f"dir://{ENGINES / 'recording'}?loop=1"))
    verdicts, results, acknowledged = [], [], []
    with listening(broker.port) as listener, DaemonProcess(device):
        until(lambda: any(r["ready"] for r in listener.of("ready", "sheet")), 30, "ready")
        for n in range(200):
            began = time.perf_counter()
            listener.say({"trigger_id": f"T-{n}"}, "trigger", "sheet")
            until(lambda n=n: len(listener.of("verdict")) > n, 10, "verdict")  # type: ignore[misc]
            verdicts.append((time.perf_counter() - began) * 1e3)
            until(lambda n=n: len(listener.of("result")) > n, 10, "result")  # type: ignore[misc]
            results.append((time.perf_counter() - began) * 1e3)
            time.sleep(0.1)
        acknowledged = _puback(broker)
    figures = {"trigger_to_verdict": verdicts, "trigger_to_result": results, "publish_to_puback_of_the_broker": acknowledged}
    return {
        name: {"median_ms": round(float(np.median(v)), 1), "p99_ms": round(float(np.percentile(v, 99)), 1)}
        for name, v in figures.items()
    }


def _puback(broker: Mosquitto) -> list[float]:
    """A bare publish with QoS 1 until its PUBACK: what this broker and machine need at least."""
    from edge_inspector.config import BrokerConfig
    from edge_inspector.mqtt import Acknowledged, Connection

    times = []
    with Connection(BrokerConfig(host="127.0.0.1", port=broker.port), "puback") as connection:
        connection.connected.wait(5)
        for _ in range(200):
            began = time.perf_counter()
            token = connection.publish("bench", b"x" * 600)
            while not (isinstance(event := connection.events.get(timeout=5), Acknowledged) and event.token == token):
                pass
            times.append((time.perf_counter() - began) * 1e3)
    return times


def start(scratch: Path, broker: Mosquitto) -> dict[str, Any]:
    """From exec to READY=1 and to the station being ready, warm; and resident memory then."""
    device = device_folder(scratch / "device", broker.port, line_yaml())
    ready, stations, memory = [], [], []
    for number in range(6):
        address = scratch / f"notify-{number}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener, listening(broker.port, f"l{number}") as heard:
            listener.bind(str(address))
            heard.of("ready")
            heard.heard.clear()
            began = time.perf_counter()
            with DaemonProcess(device, {"NOTIFY_SOCKET": str(address)}) as daemon:
                listener.recv(4096)
                ready.append(time.perf_counter() - began)
                until(lambda h=heard: any(r["ready"] for r in h.of("ready", "sheet")[-1:]), 20, "ready")  # type: ignore[misc]
                stations.append(time.perf_counter() - began)
                assert daemon.process is not None
                time.sleep(1.0)
                memory.append(psutil.Process(daemon.process.pid).memory_info().rss / 1e6)
                daemon.stop()
    return {
        "exec_to_ready_s": round(statistics.median(ready[1:]), 2), "exec_to_station_ready_s": round(statistics.median(stations[1:]), 2),
        "resident_mb": round(statistics.median(memory), 1),
    }  # fmt: skip


def soak(scratch: Path, broker: Mosquitto) -> dict[str, Any]:
    """20,000 results: slope of resident memory per result after warm-up, descriptors and threads at both ends."""
    recording = f"dir://{ENGINES / 'recording'}?loop=1"
    device = device_folder(scratch / "device", broker.port, small(line_yaml(recording, trigger="free")))
    points = []
    with subscribing(broker.port, "soak") as subscriber, DaemonProcess(device) as daemon:
        assert daemon.process is not None
        process = psutil.Process(daemon.process.pid)
        for done in range(1000, 20001, 1000):
            collected(subscriber, 1000, 300)
            points.append((done, process.memory_info().rss, process.num_fds(), process.num_threads()))
        daemon.stop()
    warm = np.array(points[2:], dtype=float)
    slope = float(np.polyfit(warm[:, 0], warm[:, 1], 1)[0])
    return {
        "results": points[-1][0], "rss_slope_bytes_per_result": round(slope, 1),
        "rss_mb": [round(points[2][1] / 1e6, 1), round(points[-1][1] / 1e6, 1)],
        "descriptors": [points[2][2], points[-1][2]], "threads": [points[2][3], points[-1][3]],
    }  # fmt: skip


VERBS: dict[str, Callable[[Path, Mosquitto], dict[str, Any]]] = {
    "throughput": throughput,
    "latency": latency,
    "start": start,
    "soak": soak,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=VERBS)
    what = parser.parse_args().what
    with tempfile.TemporaryDirectory(prefix="edge-inspector-") as folder:
        broker = Mosquitto(Path(folder) / "mosquitto").start()
        try:
            print(json.dumps({"what": what, "cores": os.cpu_count(), **VERBS[what](Path(folder), broker)}, indent=1))
        finally:
            broker.stop()


if __name__ == "__main__":
    main()
