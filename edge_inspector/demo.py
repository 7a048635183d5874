"""The line in one process, with its own broker: the shipped recording judged by the shipped bundle, over real MQTT."""

from __future__ import annotations

import asyncio
import csv
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from edge_inspector import daemon
from edge_inspector.config import Device, load_device
from edge_inspector.errors import InspectorError
from edge_inspector.evidence import explanation_of
from edge_inspector.results import Result, Verdict
from edge_inspector.subscriber import Subscriber
from edge_inspector.wiring import connection_of, topics_of

RECORDING = "recording"
BUNDLE = "paper"
TRUTH = "truth.csv"

_DEVICE = """\
schema: ei.device.v1
identity: {{site: demo, line: paper, device: here}}
broker: {{host: 127.0.0.1, port: {port}, protocol: "3.1.1"}}
storage: {{folder: state}}
trust: {trust}
bundles: {bundles}
sources: {{folders: ["{recording}"]}}
"""
_LINE = """\
schema: ei.line.v1
version: 1
stations:
  sheet:
    trigger: free
    expires_ms: 5000
    product: recycled-paper
    products: {{recycled-paper: paper}}
    cameras:
      top: {{uri: "dir://{recording}"}}
recipes:
  paper:
    cameras:
      top:
        rois:
          sheet: {{bundle: {bundle}}}
"""


class EmbeddedBroker:
    """amqtt (MQTT 3.1.1) on a thread of its own. Use as a context manager; for trials, not for a line."""

    def __init__(self) -> None:
        """Nothing listens before `with`."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="embedded-broker", daemon=True)

    def __enter__(self) -> EmbeddedBroker:
        """Listen on 127.0.0.1. Raises InspectorError when amqtt is not installed."""
        try:
            from amqtt.broker import Broker  # noqa: PLC0415 - an extra
            from amqtt.contexts import BrokerConfig, ListenerConfig  # noqa: PLC0415
        except ImportError as error:
            raise InspectorError(
                f"the demo's broker is not installed: {error}", hint='pip install "edge-inspector[demo]"'
            ) from error
        logging.getLogger("amqtt").setLevel(logging.ERROR)
        logging.getLogger("transitions").setLevel(logging.ERROR)
        plugins = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
        config = BrokerConfig(listeners={"default": ListenerConfig(bind=f"127.0.0.1:{self.port}")}, plugins=plugins)
        self._thread.start()

        async def start() -> Broker:
            broker = Broker(config)
            await broker.start()
            return broker

        self._broker = asyncio.run_coroutine_threadsafe(start(), self._loop).result(10)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop listening."""
        asyncio.run_coroutine_threadsafe(self._broker.shutdown(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()


def assets(start: Path) -> Path:
    """The `engines` folder with the shipped bundle and recording: of this source tree. Raises InspectorError."""
    folder = start / "engines"
    if not (folder / BUNDLE / "manifest.json").is_file():
        raise InspectorError(
            f"{folder}: the demo's bundle and recording are not there",
            hint="run the demo in a clone of the repository: make demo",
        )
    return folder


def prepare(folder: Path, engines: Path, port: int) -> Device:
    """Write the demo's device.yaml and line.yaml into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    fill = {"port": port, "trust": engines / "trust", "bundles": engines, "recording": engines / RECORDING}
    (folder / "device.yaml").write_text(_DEVICE.format(**fill))
    (folder / "line.yaml").write_text(_LINE.format(recording=engines / RECORDING, bundle=BUNDLE))
    return load_device(folder / "device.yaml")


@dataclass
class Summary:
    """What the demo counted."""

    verdicts: Counter[str]
    false_rejects: int
    escapes: int
    good: int
    bad: int
    wall_s: float

    @property
    def parts(self) -> int:
        """Results counted."""
        return sum(self.verdicts.values())


def truth(engines: Path) -> dict[str, str]:
    """Part -> kind ("good" or a defect) of the shipped recording."""
    with (engines / RECORDING / TRUTH).open() as file:
        return {row["part"]: row["kind"] for row in csv.DictReader(file)}


def run(folder: Path, engines: Path, on_result: Callable[[Result, str, Path | None], None]) -> Summary:
    """Run the daemon on the recording to its end; `on_result` gets each result as it arrives over MQTT, the true kind,
    and the picture kept of a failed part. Raises InspectorError.
    """
    began = time.monotonic()
    kinds = truth(engines)
    verdicts: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    stop, failures = threading.Event(), []
    with EmbeddedBroker() as broker:
        device = prepare(folder, engines, broker.port)
        topics = topics_of(device)
        client = "demo-subscriber"

        def serve() -> None:
            try:
                daemon.run(device, stop, threading.Event())
            except InspectorError as error:
                failures.append(error)

        thread = threading.Thread(target=serve, name="daemon")
        with connection_of(device, client, Subscriber.subscriptions(topics, client)) as connection:
            subscriber = Subscriber(connection, topics, client=client, start="all")
            thread.start()
            try:
                for result in subscriber.results(timeout_s=20.0):
                    kind = kinds.get(result.part_id or "", "unknown")
                    on_result(result, kind, explanation_of(folder / "state" / "evidence", result))
                    verdicts[result.verdict.value] += 1
                    wrong["false_reject"] += kind == "good" and result.verdict is Verdict.FAIL
                    wrong["escape"] += kind != "good" and result.verdict is Verdict.PASS
                    if sum(verdicts.values()) == len(kinds) or failures:
                        break
            finally:
                stop.set()
                thread.join(10)
    if failures:
        raise failures[0]
    good = sum(kind == "good" for kind in kinds.values())
    return Summary(verdicts, wrong["false_reject"], wrong["escape"], good, len(kinds) - good, time.monotonic() - began)
