"""Kills under load. Short by default; EDGE_INSPECTOR_LONG=1 runs the full counts and prints the figures (-s)."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from edge_inspector import messages
from edge_inspector.outbox import Outbox
from edge_inspector.results import Result, Verdict
from edge_inspector.subscriber import Subscriber
from tests.line import DaemonProcess, Mosquitto, device_folder, line_yaml, listening, subscribing, until

LONG = bool(os.environ.get("EDGE_INSPECTOR_LONG"))
SMALL_ROI = ", rectangle: {x_px: 8, y_px: 8, w_px: 104, h_px: 104}"


def small(line: str) -> str:
    """One tile per part, so that the rate does not depend on the network."""
    return line.replace("{bundle: paper}", f"{{bundle: paper{SMALL_ROI}}}")


def drained(subscriber: Subscriber, found: list[Result], stop: threading.Event) -> threading.Thread:
    def pull() -> None:
        while not stop.is_set():
            found.extend(subscriber.results(0.3))

    thread = threading.Thread(target=pull)
    thread.start()
    return thread


def on_disk(folder: Path) -> list[Result]:
    """What the outbox holds once the daemon is gone: every accepted result."""
    with Outbox(folder / "state", ["sheet"]) as outbox:
        rows = outbox.results("sheet", 1, outbox.head("sheet").hi, 1_000_000)
    return [messages.decode(Result, body, "x") for _, body in rows]


def test_kill_9_of_the_daemon_under_load_loses_no_result_and_no_trigger(tmp_path: Path, mosquitto: Mosquitto) -> None:
    kills = 20 if LONG else 4
    folder = device_folder(tmp_path / "device", mosquitto.port, small(line_yaml("synthetic://?seed=1", expires_ms=2000)))
    found: list[Result] = []
    stop = threading.Event()
    sent: list[str] = []
    with listening(mosquitto.port) as listener, subscribing(mosquitto.port) as subscriber:
        puller = drained(subscriber, found, stop)
        with DaemonProcess(folder) as daemon:
            for kill in range(kills + 1):
                online = len([s for s in listener.of("state") if s["online"]])
                if kill:
                    daemon.start()
                    until(lambda n=online: len([s for s in listener.of("state") if s["online"]]) > n, 20, "online")  # type: ignore[misc]
                until(lambda: listener.of("ready", "sheet") and listener.of("ready", "sheet")[-1]["ready"], 20, "ready")
                for _ in range(40):
                    sent.append(f"T-{len(sent)}")
                    listener.say({"trigger_id": sent[-1]}, "trigger", "sheet")
                    time.sleep(0.02)
                if kill < kills:
                    daemon.kill()
            # A trigger that the dead daemon had not acknowledged is delivered again by the broker.
            until(lambda: len({r.trigger_id for r in found}) == len(sent), 60, "all results")
            time.sleep(1.0)
            told = {v["trigger_id"]: v["verdict"] for v in listener.of("verdict", "sheet") if v["verdict"] == "pass"}
            assert daemon.stop() == 0
        stop.set()
        puller.join()
    accepted = on_disk(folder)
    assert [r.seq for r in accepted] == list(range(1, len(accepted) + 1))
    assert [r.result_id for r in found] == [r.result_id for r in accepted], "lost, doubled or out of order"
    assert sorted(r.trigger_id for r in accepted) == sorted(sent), "a trigger without, or with two results"
    passed = {r.trigger_id for r in accepted if r.verdict is Verdict.PASS}
    assert set(told) <= passed, "a part was passed without a record"
    interrupted = sum(r.reason.value == "interrupted" for r in accepted)
    print(f"\n{kills} kills, {len(sent)} triggers, {len(accepted)} results, {interrupted} interrupted, "
          f"{subscriber.replayed} replayed, {subscriber.duplicates} duplicates removed")  # fmt: skip


def test_broker_kills_and_an_outage_lose_nothing_and_keep_the_order(tmp_path: Path, mosquitto: Mosquitto) -> None:
    kills, outage_s = (5, 60.0) if LONG else (2, 4.0)
    folder = device_folder(tmp_path / "device", mosquitto.port, small(line_yaml("synthetic://?fps=50&seed=1", trigger="free")))
    found: list[Result] = []
    stop = threading.Event()
    with subscribing(mosquitto.port) as subscriber, DaemonProcess(folder) as daemon:
        puller = drained(subscriber, found, stop)
        until(lambda: len(found) > 50, 30, "first results")
        for _ in range(kills):
            mosquitto.kill()
            time.sleep(1.0)
            mosquitto.start()
            before = len(found)
            until(lambda n=before: len(found) > n + 50, 30, "results after a kill")  # type: ignore[misc]
        mosquitto.kill()
        time.sleep(outage_s)
        mosquitto.start()
        began, before = time.monotonic(), len(found)
        until(lambda: len(found) > before + 50 * outage_s, 60 + outage_s, "the backlog")
        drain_s = time.monotonic() - began
        assert daemon.stop() == 0
        with DaemonProcess(folder):  # sends what the stopped one could not
            time.sleep(3.0)
        time.sleep(2.0)
        stop.set()
        puller.join()
    accepted = on_disk(folder)
    seqs = [r.seq for r in found]
    # The daemon ends while parts still come: its last results wait on its disk for the next start.
    assert seqs == list(range(1, len(seqs) + 1)), "lost, doubled or out of order"
    assert len(seqs) > 50 * outage_s
    print(f"\n{kills} broker kills, {outage_s:.0f} s outage: {len(accepted)} accepted, {len(found)} received in order, "
          f"backlog drained in {drain_s:.1f} s, {subscriber.replayed} replayed, {subscriber.duplicates} duplicates removed")  # fmt: skip
