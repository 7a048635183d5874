"""The line measured on this machine: python -m tests.benchmarks.line throughput|latency|start|soak [--parts N] [--rounds N] [--threads N]

Ratios are taken in one run, against a bare loop that decodes and preprocesses the same files and has the shipped bundle judge
as many tiles for each as the daemon does, with the same ONNX Runtime threads. These spin while they wait for each other, so
that whatever else runs costs CPU twice: with --threads 1 the CPU beyond the engine is the daemon's own. Needs Mosquitto. No
speed is asserted: machines are noisy.
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
from tests.line import ENGINES, DaemonProcess, Mosquitto, collected, device_folder, line_yaml, listening, subscribing, until

THREADS = 2
WARM = 60
"""Parts after which a daemon is measured."""


def files(folder: Path, parts: int) -> Path:
    """The shipped recording, so often that it has so many parts."""
    folder.mkdir()
    recorded = sorted((ENGINES / "recording").glob("*.png"))
    for number in range(parts):
        path = recorded[number % len(recorded)]
        shutil.copy(path, folder / f"{number // len(recorded):03d}-{path.name}")
    return folder


def bare_loop(folder: Path, threads: int = THREADS) -> dict[str, float]:
    """Decode, preprocess, run: seconds and CPU seconds per part, and the CPU of the engine alone."""
    bundle = open_bundle(ENGINES / "paper", ENGINES / "trust")
    paths = sorted(folder.glob("*.png"))
    first = pictures.read(paths[0])
    plan = preprocess.Plan(bundle.manifest.input, Roi(), first.shape[0], first.shape[1])
    tiles, engine_cpu = len(plan.tiles), 0.0
    with OnnxEngine(bundle, batch=tiles, threads=threads) as engine:
        wall, cpu = time.perf_counter(), time.process_time()
        for path in paths:
            judged = plan.fill(pictures.read(path), engine.images, engine.valid)
            assert judged == engine.batch, "an engine that judges more than the part costs more than the daemon's"
            began = time.process_time()
            engine()
            engine_cpu += time.process_time() - began
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    n = len(paths)
    return {"wall": wall / n, "cpu": cpu / n, "engine_cpu": engine_cpu / n}


def threads_cpu_ms(pid: int) -> dict[str, float]:
    """CPU milliseconds of each thread of a process, by name; of those with one name together, as ONNX Runtime's are."""
    found: dict[str, float] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        name = (task / "comm").read_text().strip()
        found[name] = found.get(name, 0.0) + int((task / "schedstat").read_text().split()[0]) / 1e6
    return found


def daemon_run(folder: Path, pictures_folder: Path, broker: Mosquitto, total: int, threads: int) -> dict[str, Any]:
    """The daemon over the same files through Mosquitto, after the first parts and while more come."""
    line = line_yaml(f"dir://{pictures_folder}?loop=1", trigger="free")
    device = device_folder(folder, broker.port, line, extra=f"engine: {{threads: {threads}}}\n")
    warm = min(WARM, total // 2)
    with subscribing(broker.port, f"bench-{folder.name}") as subscriber, DaemonProcess(device) as daemon:
        assert daemon.process is not None
        first = collected(subscriber, warm, 60)
        before = threads_cpu_ms(daemon.process.pid)
        rest = collected(subscriber, total - warm, 300)
        after = threads_cpu_ms(daemon.process.pid)
        daemon.stop()
    wall = (rest[-1].decided_at - first[-1].decided_at).total_seconds()
    # CPU is read when a result has arrived; up to a queue of parts may be ahead of it at both ends, which cancels.
    by_thread = {name: (cpu - before.get(name, 0.0)) / len(rest) for name, cpu in after.items()}
    return {"wall": wall / len(rest), "cpu": sum(by_thread.values()) / 1e3, "by_thread": by_thread}


def throughput(scratch: Path, broker: Mosquitto, parts: int = 480, rounds: int = 3, threads: int = THREADS) -> dict[str, Any]:
    """Daemon against bare loop, in turn: medians, and the daemon's CPU by thread."""
    folder = files(scratch / "files", parts)
    found, of_threads = [], []
    for number in range(rounds):
        bare = bare_loop(folder, threads)
        ours = daemon_run(scratch / f"device-{number}", folder, broker, parts, threads)
        of_threads.append(ours["by_thread"])
        found.append({
            "throughput_ratio": bare["wall"] / ours["wall"], "bare_ms": bare["wall"] * 1e3, "daemon_ms": ours["wall"] * 1e3,
            "engine_cpu_ms": bare["engine_cpu"] * 1e3,
            "cpu_ms_beyond_engine": (ours["cpu"] - bare["engine_cpu"]) * 1e3,
            "bare_cpu_ms_beyond_engine": (bare["cpu"] - bare["engine_cpu"]) * 1e3,
        })  # fmt: skip
    by_thread = {name: round(statistics.median(t.get(name, 0.0) for t in of_threads), 2) for name in of_threads[0]}
    medians = {key: round(statistics.median(one[key] for one in found), 3) for key in found[0]}
    return {**medians, "daemon_cpu_ms_by_thread": by_thread, "parts": parts, "rounds": rounds, "threads": threads}


def latency(scratch: Path, broker: Mosquitto, parts: int = 200, rounds: int = 1) -> dict[str, Any]:
    """Trigger sent -> verdict heard, -> result heard, at 5 triggers a second; and a bare publication with QoS 1."""
    device = device_folder(scratch / "device", broker.port, line_yaml(f"dir://{ENGINES / 'recording'}?loop=1"))
    verdicts, results = [], []
    with listening(broker.port) as listener, DaemonProcess(device):
        until(lambda: any(r["ready"] for r in listener.of("ready", "sheet")), 30, "ready")
        for n in range(parts * rounds):
            began = time.perf_counter()
            listener.say({"trigger_id": f"T-{n}"}, "trigger", "sheet")
            until(lambda n=n: len(listener.of("verdict")) > n, 10, "verdict")  # type: ignore[misc]
            verdicts.append((time.perf_counter() - began) * 1e3)
            until(lambda n=n: len(listener.of("result")) > n, 10, "result")  # type: ignore[misc]
            results.append((time.perf_counter() - began) * 1e3)
            time.sleep(0.1)
        acknowledged = _puback(broker, parts)
    figures = {"trigger_to_verdict": verdicts, "trigger_to_result": results, "publish_to_puback_of_the_broker": acknowledged}
    return {
        name: {"median_ms": round(float(np.median(v)), 1), "p99_ms": round(float(np.percentile(v, 99)), 1)}
        for name, v in figures.items()
    }


def _puback(broker: Mosquitto, parts: int) -> list[float]:
    """A bare publish with QoS 1 until its PUBACK: what this broker and machine need at least."""
    from edge_inspector.config import BrokerConfig
    from edge_inspector.mqtt import Acknowledged, Connection

    times = []
    with Connection(BrokerConfig(host="127.0.0.1", port=broker.port), "puback") as connection:
        connection.connected.wait(5)
        for _ in range(parts):
            began = time.perf_counter()
            token = connection.publish("bench", b"x" * 600)
            while not (isinstance(event := connection.events.get(timeout=5), Acknowledged) and event.token == token):
                pass
            times.append((time.perf_counter() - began) * 1e3)
    return times


def start(scratch: Path, broker: Mosquitto, parts: int = 0, rounds: int = 6) -> dict[str, Any]:
    """From exec to READY=1 and to the station being ready, warm after a first round; and resident memory then."""
    device = device_folder(scratch / "device", broker.port, line_yaml())
    ready, stations, memory = [], [], []
    for number in range(rounds):
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
        "exec_to_ready_s": round(statistics.median(ready[-5:]), 2), "exec_to_station_ready_s": round(statistics.median(stations[-5:]), 2),
        "resident_mb": round(statistics.median(memory), 1),
    }  # fmt: skip


def soak(scratch: Path, broker: Mosquitto, parts: int = 20000, rounds: int = 20) -> dict[str, Any]:
    """In so many rounds: slope of resident memory per result after warm-up, descriptors and threads at both ends."""
    recording = f"dir://{ENGINES / 'recording'}?loop=1"
    device = device_folder(scratch / "device", broker.port, line_yaml(recording, trigger="free"))
    points = []
    with subscribing(broker.port, "soak") as subscriber, DaemonProcess(device) as daemon:
        assert daemon.process is not None
        process = psutil.Process(daemon.process.pid)
        step = parts // rounds
        for done in range(step, parts + 1, step):
            collected(subscriber, step, 300)
            points.append((done, process.memory_info().rss, process.num_fds(), process.num_threads()))
        daemon.stop()
    warm = np.array(points[rounds // 10 :], dtype=float)
    slope = float(np.polyfit(warm[:, 0], warm[:, 1], 1)[0])
    return {
        "results": points[-1][0], "rss_slope_bytes_per_result": round(slope, 1),
        "rss_mb": [round(warm[0, 1] / 1e6, 1), round(points[-1][1] / 1e6, 1)],
        "descriptors": [int(warm[0, 2]), points[-1][2]], "threads": [int(warm[0, 3]), points[-1][3]],
    }  # fmt: skip


VERBS: dict[str, Callable[..., dict[str, Any]]] = {
    "throughput": throughput,
    "latency": latency,
    "start": start,
    "soak": soak,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=VERBS)
    parser.add_argument("--parts", type=int, help="of each round; of soak, in all")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, help="of ONNX Runtime, for throughput")
    given = parser.parse_args()
    what, asked = given.what, {key: value for key, value in vars(given).items() if key != "what" and value is not None}
    with tempfile.TemporaryDirectory(prefix="edge-inspector-") as folder:
        broker = Mosquitto(Path(folder) / "mosquitto").start()
        try:
            print(json.dumps({"what": what, "cores": os.cpu_count(), **VERBS[what](Path(folder), broker, **asked)}, indent=1))
        finally:
            broker.stop()


if __name__ == "__main__":
    main()
