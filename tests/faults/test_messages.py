"""Fuzzed messages on every topic that the daemon listens to: it goes on, and nothing of its state changes.

Short by default; EDGE_INSPECTOR_LONG=1 sends 5,000.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import psutil
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.line import RECORDING, DaemonProcess, Mosquitto, device_folder, line_yaml, listening, until

LONG = bool(os.environ.get("EDGE_INSPECTOR_LONG"))
BATCH = 20
FLAT_BYTES = 10e6
"""2 kB of each of 5,000 messages; what the daemon takes for its first part is in it."""
TOPIC = st.sampled_from([
    ("trigger", "nowhere"), ("trigger", "sheet"), ("replay", "sheet", "request"), ("command", "halt"), ("command", "x"),
    ("config", "desired"), ("config", "confirm"), ("bundle", "paper", "desired"), ("bundle", "paper", "confirm"),
    ("bundle", "glass", "desired"),
])  # fmt: skip
FIELDS = (
    "trigger_id", "part_id", "product", "expires_at", "request_id", "client", "stream", "lo", "hi", "station", "by", "line", "bundle",
    "release", "source", "version", "action", "confirm_s", "signature", "device", "schema", "stations", "recipes", "subject",
)  # fmt: skip
SCALAR = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=40),
    st.sampled_from(["sheet", "paper", "confirm", "reset"]),
)
VALUE = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=6),
    max_leaves=12,
)
PAYLOAD = st.one_of(
    st.binary(max_size=200),
    st.dictionaries(st.sampled_from(FIELDS), VALUE, max_size=10).map(lambda values: json.dumps(values).encode()),
    VALUE.map(lambda value: json.dumps(value).encode()),
)


def harmless(topic: tuple[str, ...], payload: bytes) -> bool:
    """Whether it is no order by chance that is as it should be: of a trigger an id is enough, of a command that and a station."""
    try:
        values: Any = json.loads(payload)
    except ValueError:
        return True
    if not isinstance(values, dict):
        return True
    return not (topic == ("trigger", "sheet") and "trigger_id" in values) and topic[0] != "command"


def test_fuzzed_messages_end_nothing_and_change_nothing(tmp_path: Path, mosquitto: Mosquitto) -> None:
    batches, sent = (280 if LONG else 30), 0
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml(f"{RECORDING}?loop=1"))
    with listening(mosquitto.port) as listener, DaemonProcess(folder) as daemon:
        until(lambda: listener.of("config", "reported") and listener.of("ready", "sheet")[-1]["ready"], what="ready")
        assert daemon.process is not None
        process = psutil.Process(daemon.process.pid)

        def state() -> dict[str, Any]:
            told = listener.of("config", "reported")[-1]
            bundle = listener.of("bundle", "paper", "reported")[-1]
            keep = ("version", "seen", "source", "trial", "history", "line", "release")
            return {"config": {k: told.get(k) for k in keep}, "bundle": {k: bundle.get(k) for k in keep},
                    "ready": listener.of("ready", "sheet")[-1]["state"], "files": sorted(p.name for p in (folder / "state").iterdir())}  # fmt: skip

        @settings(max_examples=batches, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(st.tuples(TOPIC, PAYLOAD, st.booleans()), min_size=BATCH, max_size=BATCH))
        def flood(messages: list[tuple[tuple[str, ...], bytes, bool]]) -> None:
            nonlocal sent
            for topic, payload, retain in messages:
                if harmless(topic, payload):
                    listener.say(payload, *topic, retain=retain and topic[-1] == "desired")
                    sent += 1
            listener.pump()  # it hears what it says: its own queue is bounded too
            time.sleep(0.05)

        before, memory = state(), process.memory_info().rss
        flood()
        listener.say({"trigger_id": "after"}, "trigger", "sheet")
        until(lambda: any(r["trigger_id"] == "after" for r in listener.of("result", "sheet")), 60, "a part after the flood")
        time.sleep(1.0)
        assert daemon.process.poll() is None
        assert state() == before
        grown = process.memory_info().rss - memory
        assert grown < FLAT_BYTES, f"grew by {grown / 1e6:.0f} MB"
        assert "Traceback" not in daemon.log
    print(f"\n{sent} messages, grown by {grown / 1e6:.1f} MB")
    assert sent >= (5000 if LONG else 500)
