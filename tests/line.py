"""Real parts for tests: a Mosquitto, a device folder with the shipped bundle, the daemon as a process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from edge_inspector.config import BrokerConfig, Device, load_device
from edge_inspector.messages import Topics
from edge_inspector.mqtt import Connection, Message
from edge_inspector.results import Result
from edge_inspector.subscriber import Subscriber

ENGINES = Path(__file__).resolve().parents[1] / "engines"
TOPICS = Topics("plant", "line", "edge")
MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def needed(found: object, install: str) -> None:
    """Skip the test by name where something is not installed; in CI that is a failure."""
    if not found:
        message = f"not installed: {install}"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)


def preloadable(name: str, folder: Path) -> str:
    """Compile tests/NAME.c, a stand-in for a device, into a library for LD_PRELOAD."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    needed(compiler, "apt install gcc libc6-dev")
    library, source = folder / f"{name}.so", Path(__file__).with_name(f"{name}.c")
    command = [str(compiler), "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return str(library)


def until(condition: Callable[[], Any], timeout_s: float = 15.0, what: str = "condition") -> Any:
    """Wait until `condition` gives something true; fail the test when it does not in time."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"{what} not within {timeout_s} s")


class Mosquitto:
    """A real broker on a free port, persistent in `folder`; may be killed and started again."""

    def __init__(self, folder: Path, extra: str = "") -> None:
        self.folder, self.port = folder, free_port()
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o777)
        (folder / "mosquitto.conf").write_text(
            f"user root\nlistener {self.port} 127.0.0.1\nallow_anonymous true\npersistence true\npersistence_location {folder}/\n"
            f"max_queued_messages 100000\nset_tcp_nodelay true\n{extra}"
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Mosquitto:
        assert MOSQUITTO is not None
        self.process = subprocess.Popen(
            [MOSQUITTO, "-c", str(self.folder / "mosquitto.conf")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until(self._answers, what="mosquitto")
        return self

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 0.2):
                return True
        except OSError:
            return False

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(10)


UNSIGNED = "remote: {require_signature: false}\n"
"""Tests of other things need not sign what they order."""


def device_folder(folder: Path, port: int, line: str, *, extra: str = "") -> Path:
    """device.yaml, line.yaml, the shipped bundle and the key it is trusted by."""
    folder.mkdir(parents=True, exist_ok=True)
    unsigned = "" if "remote:" in extra else UNSIGNED
    (folder / "device.yaml").write_text(
        "schema: ei.device.v1\n"
        "identity: {site: plant, line: line, device: edge}\n"
        f"broker: {{host: 127.0.0.1, port: {port}, keepalive_s: 5}}\n"
        f"trust: {ENGINES / 'trust'}\nbundles: {ENGINES}\n{unsigned}"
        + ("" if "sources:" in extra else "sources: {folders: [/], hosts: [127.0.0.1]}\n")
        + extra
    )
    (folder / "line.yaml").write_text(line)
    return folder


RECORDING = f"dir://{ENGINES / 'recording'}"


def line_yaml(uri: str = RECORDING, trigger: str = "software", bundle: str = "paper", expires_ms: int = 5000) -> str:
    return f"""\
schema: ei.line.v1
version: 3
stations:
  sheet:
    trigger: {trigger}
    expires_ms: {expires_ms}
    product: paper
    products: {{paper: whole}}
    cameras: {{top: {{uri: "{uri}"}}}}
recipes:
  whole: {{cameras: {{top: {{rois: {{all: {{bundle: {bundle}}}}}}}}}}}
"""


class DaemonProcess:
    """`edge-inspector run` as a process."""

    def __init__(self, folder: Path, environment: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.environment = {**os.environ, **(environment or {})}
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def start(self) -> DaemonProcess:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "edge_inspector.cli", "run", "--config", str(self.folder / "device.yaml")],
                stdout=log, stderr=log, env=self.environment,
            )  # fmt: skip
        return self

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self, timeout_s: float = 10.0) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def __enter__(self) -> DaemonProcess:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@dataclass
class Listener:
    """An MQTT client that remembers everything it hears, by topic levels below the device."""

    connection: Connection
    heard: list[tuple[tuple[str, ...], dict[str, Any]]] = field(default_factory=list)

    def pump(self) -> None:
        while not self.connection.events.empty():
            event = self.connection.events.get()
            if isinstance(event, Message):
                self.connection.acknowledge(event.ack)
                levels = TOPICS.within(event.topic)
                if levels[0] not in ("trigger", "command") and levels[-1] not in (
                    "request",
                    "desired",
                    "confirm",
                ):  # said by tests
                    taken_back = not event.payload
                    self.heard.append((levels, {} if taken_back else json.loads(event.payload)))

    def of(self, *levels: str) -> list[dict[str, Any]]:
        self.pump()
        return [payload for found, payload in self.heard if found[: len(levels)] == levels]

    def say(self, payload: dict[str, Any] | bytes, *levels: str, retain: bool = False) -> None:
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        until(lambda: self.connection.publish(TOPICS.of(*levels), data, retain=retain) is not None, what="sending")


@contextmanager
def listening(port: int, client: str = "listener", protocol: str = "auto") -> Iterator[Listener]:
    config = BrokerConfig.model_validate({"host": "127.0.0.1", "port": port, "protocol": protocol})
    with Connection(config, client, subscriptions=[TOPICS.of("#")]) as connection:
        assert connection.connected.wait(10)
        yield Listener(connection)


@contextmanager
def subscribing(port: int, client: str = "mes", state: Path | None = None) -> Iterator[Subscriber]:
    config = BrokerConfig(host="127.0.0.1", port=port)
    with Connection(config, client, subscriptions=Subscriber.subscriptions(TOPICS, client)) as connection:
        yield Subscriber(connection, TOPICS, client=client, state=state, start="all")


def collected(subscriber: Subscriber, count: int, timeout_s: float = 30.0) -> list[Result]:
    """Results until there are `count`, or fail."""
    end = time.monotonic() + timeout_s
    found: list[Result] = []
    while time.monotonic() < end:
        for result in subscriber.results(timeout_s=0.5):
            found.append(result)
            if len(found) == count:
                return found
    raise AssertionError(f"{len(found)} of {count} results within {timeout_s} s")


def in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def loaded(folder: Path) -> Device:
    return load_device(folder / "device.yaml")


def filled(folder: Path) -> Path:
    """Write a file until the disk is full; returns it."""
    path = folder / "fill"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    return path
