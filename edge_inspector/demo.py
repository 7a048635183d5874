"""The line in one process, with its own broker: the shipped recording judged by the shipped bundle, over real MQTT."""

from __future__ import annotations

import asyncio
import csv
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from edge_inspector import daemon, messages
from edge_inspector.config import Device, load_device
from edge_inspector.errors import InspectorError
from edge_inspector.evidence import explanation_of
from edge_inspector.installation import install
from edge_inspector.messages import Ready
from edge_inspector.results import Result, Verdict
from edge_inspector.subscriber import Subscriber
from edge_inspector.wiring import connection_of, topics_of

RECORDING = "recording"
BUNDLE = "paper"
TRUTH = "truth.csv"
_STOP_S = 30.0
"""For so long the daemon may finish what it has begun."""

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
    expires_ms: 600000
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
            raise InspectorError(f"the demo's broker is not installed: {error}", hint=install("demo")) from error
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

    @property
    def judged(self) -> int:
        """Parts that passed or failed."""
        return self.verdicts[Verdict.PASS.value] + self.verdicts[Verdict.FAIL.value]


def truth(engines: Path) -> dict[str, str]:
    """Part -> kind ("good" or a defect) of the shipped recording."""
    with (engines / RECORDING / TRUTH).open() as file:
        return {row["part"]: row["kind"] for row in csv.DictReader(file)}


class _Waiting:
    """Why the next result has not come yet, as far as the line has said."""

    def __init__(self) -> None:
        self._ready: Ready | None = None

    def hear(self, levels: tuple[str, ...], payload: bytes) -> None:
        """Take what is no result."""
        if levels[0] == "ready":
            self._ready = messages.decode(Ready, payload, "/".join(levels))

    def text(self) -> str:
        """What is waited for. Raises InspectorError when it cannot come any more."""
        ready = self._ready
        if ready is None:
            return "the daemon starts"
        if ready.state == "error":
            raise InspectorError(f"station {ready.station} is not ready: {ready.reason}", hint="edge-inspector doctor")
        if not ready.ready:
            return f"station {ready.station} is not ready yet: {ready.reason}"
        return f"station {ready.station} is ready and judges a part; this machine takes its time"


class _Serving:
    """The daemon in a thread of its own. Use as a context manager; raises what ended the daemon."""

    def __init__(self, device: Device) -> None:
        self._device, self._stop = device, threading.Event()
        self._failure: InspectorError | None = None
        self._thread = threading.Thread(target=self._run, name="daemon")

    def _run(self) -> None:
        try:
            daemon.run(self._device, self._stop, threading.Event())
        except InspectorError as error:
            self._failure = error

    @property
    def lives(self) -> bool:
        """Whether results may still come."""
        return self._thread.is_alive()

    def __enter__(self) -> _Serving:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(_STOP_S)
        if self._failure is not None and error is None:
            raise self._failure


def _results(
    subscriber: Subscriber, serving: _Serving, waiting: _Waiting, on_wait: Callable[[str], None], told_every_s: float
) -> Iterator[Result]:
    """Results as long as the daemon lives; `on_wait` hears what is waited for whenever none came for a while."""
    while serving.lives:
        yield from subscriber.results(timeout_s=told_every_s)
        if serving.lives:
            on_wait(waiting.text())


def run(
    folder: Path,
    engines: Path,
    on_result: Callable[[Result, str, Path | None], None],
    on_wait: Callable[[str], None] = lambda _: None,
    told_every_s: float = 5.0,
) -> Summary:
    """Run the daemon on the recording to its end; `on_result` gets each result as it arrives over MQTT, the true kind,
    and the picture kept of a failed part; `on_wait` hears why none comes. Raises InspectorError.
    """
    began = time.monotonic()
    kinds = truth(engines)
    good = sum(kind == "good" for kind in kinds.values())
    summary = Summary(Counter(), 0, 0, good, len(kinds) - good, 0.0)
    client, waiting = "demo-subscriber", _Waiting()
    with EmbeddedBroker() as broker:
        device = prepare(folder, engines, broker.port)
        topics = topics_of(device)
        heard = dict.fromkeys((*Subscriber.subscriptions(topics, client), topics.of("ready", "+")))
        with connection_of(device, client, tuple(heard)) as connection, _Serving(device) as serving:
            subscriber = Subscriber(connection, topics, client=client, start="all", on_other=waiting.hear)
            for result in _results(subscriber, serving, waiting, on_wait, told_every_s):
                kind = kinds.get(result.part_id or "", "unknown")
                on_result(result, kind, explanation_of(folder / "state" / "evidence", result))
                summary.verdicts[result.verdict.value] += 1
                summary.false_rejects += kind == "good" and result.verdict is Verdict.FAIL
                summary.escapes += kind != "good" and result.verdict is Verdict.PASS
                if summary.parts == len(kinds):
                    break
    summary.wall_s = time.monotonic() - began
    return summary
