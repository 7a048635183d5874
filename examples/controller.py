"""A controller's side of the handshake, for translation into a PLC's language. Its clock need not agree with the device's.

    python examples/controller.py HOST PORT SITE/LINE/DEVICE STATION WINDOW_MS

It triggers one part for each line on its input, and opens the diverter for good parts:

* Its timer starts at its own trigger. A verdict that comes after `window_ms` is not acted on, however long the network or the
  broker held it back, and whatever any clock says. `window_ms` is at most the station's `expires_ms`.
* Only a verdict on the last trigger counts, and only once: an answer to an earlier part is not this part's.
* Its session is not persistent: what was said while it was away is never delivered.
* No verdict in time means not ok: the diverter stays shut.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

log = logging.getLogger("controller")


class Controller:
    """One station's controller. Use as a context manager."""

    def __init__(
        self, host: str, port: int, device: str, station: str, window_ms: float, divert: Callable[[str], None]
    ) -> None:
        """`divert` opens the way for a good part; it gets the trigger's id."""
        self._address, self._root, self._station = (host, port), f"ei/v1/{device}", station
        self._window_s, self._divert = window_ms / 1000, divert
        self._lock = threading.Lock()
        self._trigger_id: str | None = None
        self._triggered_s = 0.0
        # MQTT 3.1.1, clean session: nothing is kept for us while we are away.
        self._client = paho.Client(CallbackAPIVersion.VERSION2, f"controller-{uuid.uuid4().hex[:8]}", clean_session=True)
        self._client.on_connect = lambda client, *_: client.subscribe(f"{self._root}/verdict/{station}", qos=1)
        self._client.on_message = lambda _client, _user, message: self._take(message.payload)

    def __enter__(self) -> Controller:
        """Connect; paho connects again by itself."""
        self._client.connect(*self._address, keepalive=10)
        self._client.loop_start()
        return self

    def __exit__(self, *_: object) -> None:
        """Disconnect."""
        self._client.disconnect()
        self._client.loop_stop()

    @property
    def is_connected(self) -> bool:
        """Whether a verdict could arrive."""
        return self._client.is_connected()

    def trigger(self, part_id: str | None = None) -> str:
        """A part is in view; returns the trigger's id, which never repeats: not a counter that begins at 1 again."""
        trigger_id = uuid.uuid4().hex
        with self._lock:  # before it is sent: the answer may be quick
            self._trigger_id, self._triggered_s = trigger_id, time.monotonic()
        request: dict[str, Any] = {"trigger_id": trigger_id}
        if part_id is not None:
            request["part_id"] = part_id
        self._client.publish(f"{self._root}/trigger/{self._station}", json.dumps(request), qos=1)
        return trigger_id

    def _take(self, payload: bytes) -> None:
        verdict = json.loads(payload)
        with self._lock:
            is_last = verdict["trigger_id"] == self._trigger_id
            waited_s = time.monotonic() - self._triggered_s
            if is_last:
                self._trigger_id = None  # once
        in_time = waited_s <= self._window_s and verdict["expires_in_ms"] > 0
        log.info("%s %s after %.0f ms", verdict["trigger_id"], verdict["verdict"], waited_s * 1e3)
        if is_last and in_time and verdict["verdict"] == "pass":
            self._divert(verdict["trigger_id"])


def main() -> None:
    """Trigger a part for each line of the input."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    host, port, device, station, window_ms = sys.argv[1:6]
    with Controller(
        host, int(port), device, station, float(window_ms), lambda name: log.info("%s: diverter opens", name)
    ) as one:
        for line in sys.stdin:
            one.trigger(line.strip() or None)


if __name__ == "__main__":
    main()
