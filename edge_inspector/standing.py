"""What people ordered of each station, kept on disk: it holds through reloads, restarts and power cuts.

An order is on disk before it is answered. What cannot be read is not guessed: its stations wait until they are ordered anew.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from edge_inspector import durable
from edge_inspector.errors import InspectorError, SchemaError
from edge_inspector.messages import Cause
from edge_inspector.schema import Field, Model, read_json, validate

log = logging.getLogger(__name__)

MOST = 256
"""Stations whose orders are kept; of those that no configuration has any more, the oldest are forgotten."""
DOUBT = 256
"""Characters that are kept of why something is in doubt."""
_MAX_BYTES = 1 << 20


class Standing(Model):
    """What holds for one station until people order something else."""

    halted: bool = False
    product: str | None = Field(None, description="the product that was selected; none: the configuration's")
    doubt: str = Field("", description="why the last self-test failed; empty where it did not")
    lost: str = Field("", description="why it is not known which product was selected; empty where it is")


class _Document(Model):
    schema_: Literal["ei.orders.v1"] = Field("ei.orders.v1", alias="schema")
    stations: dict[str, Standing] = Field(default_factory=dict)


class Orders:
    """What was ordered of all stations. Written by any thread; `of` neither waits nor allocates."""

    def __init__(self, path: Path, stations: Iterable[str] = ()) -> None:
        """Read the file at `path`; where it cannot be read, nothing is known of any station. Never raises."""
        self.path = path
        self.failing = ""
        """Why what was ordered last is not on disk; empty where it is."""
        self._unread = ""
        self._changing = threading.Lock()
        self._by_station = self._read()
        self.use(stations)

    def use(self, stations: Iterable[str]) -> None:
        """From now on these are the stations of the line; what was ordered of others is kept as long as there is room."""
        names = list(stations)
        with self._changing:
            unknown = Standing(halted=True, lost=self._unread) if self._unread else Standing()
            known = {name: self._by_station.get(name, unknown) for name in names}
            others = {name: standing for name, standing in self._by_station.items() if name not in known}
            room = max(0, MOST - len(known))
            self._by_station = dict(list(others.items())[len(others) - min(room, len(others)) :]) | known

    def of(self, station: str) -> Standing:
        """What holds now."""
        return self._by_station[station]

    def change(self, station: str, **values: Any) -> Standing:
        """Order something of a station; when this returns it is on disk. Raises InspectorError, and then nothing changed."""
        with self._changing:
            before = self._by_station
            changed = self._by_station = {**before, station: before[station].model_copy(update=values)}
            try:
                self._write("nothing was changed")
            except InspectorError:
                self._by_station = before
                raise
            return changed[station]

    def insist(self, station: str, **values: Any) -> None:
        """Change what must hold although the disk is full: it holds at once. Raises InspectorError where it is not kept."""
        with self._changing:
            self._by_station = {**self._by_station, station: self._by_station[station].model_copy(update=values)}
            self._write("it holds until the next restart")

    def retry(self) -> None:
        """Write what could not be written before."""
        if not self.failing:
            return
        with self._changing:
            try:
                self._write("it holds until the next restart")
            except InspectorError as error:
                log.debug("%s", error)

    def causes(self) -> list[Cause]:
        """What is wrong with keeping them."""
        if not self.failing:
            return []
        text = f"what was ordered last would be forgotten at a restart: {self.failing}"
        return [Cause(code="orders_not_kept", severity="failure", thing="device", text=text)]

    def _read(self) -> dict[str, Standing]:
        try:
            data = self.path.read_bytes()
            return dict(validate(_Document, read_json(data, str(self.path), _MAX_BYTES), str(self.path)).stations)
        except FileNotFoundError:
            return {}
        except (OSError, SchemaError) as error:
            words = error.strerror if isinstance(error, OSError) else str(error).splitlines()[-1].strip()
            self._unread = f"{self.path.name} cannot be read: {words}"[:DOUBT]
            log.error("%s: what was ordered of the stations is not known", self._unread)
            return {}

    def _write(self, instead: str) -> None:
        """Raises InspectorError, which says what holds `instead`."""
        kept = {name: standing for name, standing in self._by_station.items() if standing != Standing()}
        data = _Document(stations=kept).model_dump_json(by_alias=True).encode()
        try:
            durable.write(self.path, data)
            self.failing = ""
        except OSError as error:
            self.failing = f"{self.path}: {error.strerror}"
            raise InspectorError(
                f"what was ordered cannot be kept, {instead}: {self.failing}", hint="is the disk full, or read-only?"
            ) from error
