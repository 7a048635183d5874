"""A device with a bundle of its own, parts that come by, and releases that may come over MQTT."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_inspector import pictures, signatures
from edge_inspector.results import Result
from tests.line import UNSIGNED, Listener, device_folder, subscribing, until
from tests.tiny import picture, tiny_bundle

LINE = """\
schema: ei.line.v1
version: 1
stations:
  press:
    trigger: software
    expires_ms: {expires_ms}
    product: tiny
    products: {{tiny: whole}}
    cameras: {{top: {{uri: "dir://{pictures}?loop=1"}}}}
recipes:
  whole: {{cameras: {{top: {{rois: {{all: {{bundle: tiny}}}}}}}}}}
"""
LEVELS = (130, 140, 150, 250)
"""Of the parts that come by: three good ones and a bad one."""


class Plant:
    """A device with a bundle of its own, parts that come by, and releases that may come."""

    def __init__(self, folder: Path, port: int, *, expires_ms: int = 2000) -> None:
        self.made = folder / "made"
        (folder / "pictures").mkdir(parents=True)
        for number, level in enumerate(LEVELS):
            pictures.write(folder / "pictures" / f"{number}.png", picture(level, size=64))
        tiny_bundle(self.made)
        line = LINE.format(pictures=folder / "pictures", expires_ms=expires_ms)
        self.device = device_folder(folder / "device", port, line)
        text = (self.device / "device.yaml").read_text().splitlines()[:3]
        (self.device / "device.yaml").write_text(
            "\n".join(
                [
                    *text,
                    f"trust: {self.made / 'trust'}",
                    f"bundles: {self.made}",
                    "sources: {folders: [/], hosts: [127.0.0.1]}",
                    UNSIGNED,
                ]
            )  # fmt: skip
        )
        self._number = itertools.count()

    def release(self, number: int, **changes: Any) -> Path:
        """A new release, made and signed where the device can read it."""
        return tiny_bundle(self.made, place=f"release-{number}", release=number, **changes).folder

    def resigned(self, folder: Path, **changes: Any) -> Path:
        """The manifest with changes, signed anew, whatever it says."""
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))
        data = (folder / "manifest.json").read_bytes()
        signature = signatures.sign(data, signatures.read_private_key(self.made / "keys" / "signing.key"))
        (folder / "signature").write_text(signature.model_dump_json())
        return folder

    @contextmanager
    def parts(self, listener: Listener, every_s: float = 0.03) -> Iterator[list[str]]:
        """Parts come by all the time; gives the ids of their triggers."""
        stop, sent = threading.Event(), list[str]()

        def come() -> None:
            while not stop.wait(every_s):
                name = f"T-{next(self._number)}"
                listener.say({"trigger_id": name}, "trigger", "press")
                sent.append(name)

        thread = threading.Thread(target=come)
        thread.start()
        try:
            yield sent
        finally:
            stop.set()
            thread.join()


def want(listener: Listener, release: int, source: Path | str, **more: Any) -> None:
    order = {"by": "anna", "bundle": "tiny", "release": release, "source": str(source), "shadow_parts": 12, **more}
    listener.say(order, "bundle", "tiny", "desired", retain=True)


def reported(listener: Listener) -> dict[str, Any]:
    return (listener.of("bundle", "tiny", "reported") or [{}])[-1]


def ended(listener: Listener, release: int, *outcomes: str, timeout_s: float = 30.0) -> dict[str, Any]:
    """The report in which a release has come to one of these outcomes."""

    def found() -> dict[str, Any] | None:
        told = reported(listener)
        last = told.get("last") or {}
        return told if last.get("version") == release and last.get("outcome") in outcomes else None

    try:
        return until(found, timeout_s)  # type: ignore[no-any-return]
    except AssertionError:
        raise AssertionError(f"not {outcomes}: {reported(listener)}") from None


def ready(listener: Listener) -> None:
    until(lambda: any(r["ready"] for r in listener.of("ready", "press")), what="ready")


def releases(results: list[Result]) -> list[int]:
    return [result.findings[0].bundle.release for result in results]


@contextmanager
def drained(port: int) -> Iterator[list[Result]]:
    """All results as a subscriber gets them, each once and in order."""
    found, stop = list[Result](), threading.Event()

    def pull() -> None:
        with subscribing(port) as subscriber:
            while not stop.is_set():
                found.extend(subscriber.results(timeout_s=0.5))

    thread = threading.Thread(target=pull)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
