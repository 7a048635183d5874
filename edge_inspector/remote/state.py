"""What is on disk of remote configurations: the last good one, the one on trial, the audit trail."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any, Literal

from edge_inspector.errors import InspectorError
from edge_inspector.messages import ConfigEntry
from edge_inspector.remote import durable
from edge_inspector.results import Moment
from edge_inspector.schema import Field, Model, validate

log = logging.getLogger(__name__)


class Kept(Model):
    """A document with its origin."""

    line: dict[str, Any]
    source: Literal["file", "remote"]
    by: str


class Trial(Kept):
    """A document that is to be confirmed."""

    confirm_s: int
    boot: str
    """Of the machine; the deadline counts in that boot's seconds."""
    deadline_s: float
    deadline_at: Moment
    starts: int
    failures: tuple[str, ...]
    """That were there before."""


class State(Model):
    """What is on disk."""

    schema_: Literal["ei.remote.v1"] = Field("ei.remote.v1", alias="schema")
    seen: int = 0
    attempt: tuple[int, int] = (0, 0)
    """Version, and how often it was begun to be prepared."""
    good: Kept | None = None
    """None: the file, which no remote order has touched yet."""
    trial: Trial | None = None
    history: tuple[ConfigEntry, ...] = ()


def boot_time() -> tuple[str, float]:
    """This boot of the machine, and seconds since: no wall clock that may jump, and it goes on while the machine sleeps."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), time.clock_gettime(time.CLOCK_BOOTTIME)


def read(path: Path) -> State:
    """The state as it was written last; a damaged one is set aside."""
    try:
        return validate(State, json.loads(path.read_bytes()), str(path))
    except FileNotFoundError:
        return State()
    except (OSError, ValueError, InspectorError) as error:
        aside = path.with_name(f"remote.damaged-{int(time.time())}.json")
        log.error("%s is damaged (%s): set aside as %s, line.yaml is in force", path, error, aside.name)
        os.replace(path, aside)
        return State()


def write(path: Path, state: State) -> None:
    """Replace it, durably. Raises InspectorError; then the old one is still there."""
    try:
        durable.write(path, state.model_dump_json(by_alias=True).encode())
    except OSError as error:
        raise InspectorError(f"{path}: {error.strerror}", hint="check the state folder and its free space") from error
