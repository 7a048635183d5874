"""Whose orders and commands are carried out."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from edge_inspector import messages, signatures
from edge_inspector.config import Device
from edge_inspector.errors import Fault, InspectorError, SchemaError, SignatureError
from edge_inspector.frames import utc_now
from edge_inspector.messages import Command, Confirm, Order
from edge_inspector.results import rfc3339
from edge_inspector.schema import read_json, validate
from edge_inspector.signatures import ORDERS, Purpose, TrustedKey

O = TypeVar("O", bound=Order)  # noqa: E741 - an order
COMMAND_EXPIRES_S = 3600
"""A signed command may be valid for so long: what was carried out has to be remembered as long."""
_SHOWN = 128
_READ_EVERY_S = 1.0
_SIGN = "sign it: --key KEY, or keys/orders.key beside device.yaml, with a key that this device trusts"


@dataclass
class Trust:
    """Keys that must have signed. `unmarked`: what a key is trusted for whose file names no purposes."""

    folder: Path
    unmarked: tuple[Purpose, ...]
    _read: tuple[float, dict[str, TrustedKey]] = (float("-inf"), {})

    def keys(self) -> dict[str, TrustedKey]:
        """By id, as they were within the last second: who sends wrong orders costs no disk. Raises SignatureError."""
        at, keys = self._read
        if time.monotonic() - at > _READ_EVERY_S:
            at, keys = self._read = time.monotonic(), signatures.trusted_keys(self.folder, self.unmarked)
        return keys


def trust_of(device: Device) -> Trust | None:
    """Whose orders a device carries out; None: unsigned ones, too.

    A key without purposes signs orders where it lies in a folder of its own, bundles where it lies with the keys of
    bundles; there it also signs what it has always signed, where device.yaml has always required signatures.
    """
    remote = device.config.remote
    if not remote.require_signature:
        return None
    folder = device.path(remote.trust) or device.folder
    if folder.resolve() != device.trust.resolve():
        return Trust(folder, ORDERS)
    always = "require_signature" in remote.model_fields_set
    return Trust(folder, ("bundle", "configuration", "confirm") if always else ("bundle",))


@dataclass(frozen=True)
class Authority:
    """Takes orders for one device (SITE/LINE/DEVICE). `trust`: who must have signed; None: unsigned ones are taken.

    `opened`: commands that need no signature.
    """

    device: str
    trust: Trust | None = None
    opened: tuple[str, ...] = ()

    @staticmethod
    def of(device: Device) -> Authority:
        """As device.yaml says."""
        identity, remote = device.config.identity, device.config.remote
        path = f"{identity.site}/{identity.line}/{identity.device}"
        return Authority(path, trust_of(device), tuple(remote.open_commands))

    def read(self, payload: bytes, topic: str) -> tuple[dict[str, Any], str]:
        """An order's values, and who it says it is from. Raises SchemaError."""
        values = _object(payload, topic)
        return values, re.sub(r"[^\x21-\x7e]", "-", str(values.get("by", "unknown")))[:_SHOWN]

    def checked(self, model: type[O], values: dict[str, Any], subject: str = "") -> O:
        """An order that is meant for this device and signed as it must be; a confirmation also for this subject.

        Raises SchemaError, SignatureError or InspectorError.
        """
        order = validate(model, values, "order")
        self._refuse_foreign(order.device)
        named = order.subject if isinstance(order, Confirm) else subject
        if named not in ("", subject):
            raise InspectorError(f"for {named}, this is {subject}")
        if self.trust is not None:
            missing = [] if order.device else ["device"]
            missing += [] if named == subject else ["subject"]
            self._verify(order, values, missing, _purpose(order), _SIGN)
        return order

    def command(self, name: str, payload: bytes, topic: str, session: str) -> tuple[Command, bool]:
        """A command that is meant for this device, now, and by whom it must be; whether it had to be signed.

        Raises SchemaError, SignatureError or InspectorError.
        """
        values = _object(payload, topic)
        command = validate(Command, values, topic)
        self._refuse_foreign(command.device)
        _refuse_old(command, name, session)
        if self.trust is None or name in self.opened:
            return command, False
        given = {"device": command.device, "command": command.command, "session": command.session,
                 "expires_at": command.expires_at}  # fmt: skip
        line = f"remote: {{open_commands: [{', '.join((*self.opened, name))}]}}"
        hint = f"sign it, as edge-inspector command does; or let everybody give it, in device.yaml: {line}"
        self._verify(command, values, [key for key, value in given.items() if not value], "command", hint)
        return command, True

    def _refuse_foreign(self, device: str) -> None:
        if device not in ("", self.device):
            raise InspectorError(f"for {device}, this is {self.device}")

    def _verify(self, order: Order | Command, values: dict[str, Any], missing: list[str], purpose: Purpose, hint: str) -> None:
        assert self.trust is not None
        if order.signature is None:
            raise SignatureError("not signed, which this device requires", hint=hint)
        if missing:
            raise SignatureError(f"signed, but without {' and '.join(missing)}: it could be used elsewhere", hint=hint)
        signatures.verify(order.signature, messages.signed_bytes(values), self.trust.keys(), purpose)


def _object(payload: bytes, topic: str) -> dict[str, Any]:
    values = read_json(payload, topic)
    if not isinstance(values, dict):
        raise SchemaError(topic, [Fault("", "an object is expected")])
    return values


def _purpose(order: Order) -> Purpose:
    """What a key must be trusted for: to go back to the device's own changes as much as a new configuration."""
    return "confirm" if isinstance(order, Confirm) and order.action != "reset" else "configuration"


def _refuse_old(command: Command, name: str, session: str) -> None:
    """Refuse a command that was given for another topic or session, or whose time is over or far away."""
    if command.command not in ("", name):
        raise InspectorError(f"command {command.command} came as {name}")
    if command.session not in ("", session):
        raise InspectorError(
            f"for session {command.session}, this is {session}", hint="take the session from the topic state, and order again"
        )
    if command.expires_at is None:
        return
    now = utc_now()
    left = command.expires_at - now
    if not timedelta(0) < left <= timedelta(seconds=COMMAND_EXPIRES_S):
        raise InspectorError(
            f"expires_at is {command.expires_at.isoformat()}; here it is {rfc3339(now)}",
            hint=f"it must be within {COMMAND_EXPIRES_S} s from now; do the clocks agree?",
        )
