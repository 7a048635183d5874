"""Whose orders are carried out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from edge_inspector import messages, signatures
from edge_inspector.errors import Fault, InspectorError, SchemaError, SignatureError
from edge_inspector.messages import Confirm, Order
from edge_inspector.schema import read_json, validate

O = TypeVar("O", bound=Order)  # noqa: E741 - an order
_SHOWN = 128


@dataclass(frozen=True)
class Authority:
    """Takes orders for one device (SITE/LINE/DEVICE). `trust`: keys that must have signed; None: unsigned ones are taken."""

    device: str
    trust: Path | None = None

    def read(self, payload: bytes, topic: str) -> tuple[dict[str, Any], str]:
        """An order's values, and who it says it is from. Raises SchemaError."""
        values = read_json(payload, topic)
        if not isinstance(values, dict):
            raise SchemaError(topic, [Fault("", "an object is expected")])
        return values, re.sub(r"[^\x21-\x7e]", "-", str(values.get("by", "unknown")))[:_SHOWN]

    def checked(self, model: type[O], values: dict[str, Any], subject: str = "") -> O:
        """An order that is meant for this device and signed as it must be; a confirmation also for this subject.

        Raises SchemaError, SignatureError or InspectorError.
        """
        order = validate(model, values, "order")
        if order.device not in ("", self.device):
            raise InspectorError(f"for {order.device}, this is {self.device}")
        named = order.subject if isinstance(order, Confirm) else subject
        if named not in ("", subject):
            raise InspectorError(f"for {named}, this is {subject}")
        if self.trust is not None:
            if order.signature is None or not order.device or named != subject:
                raise SignatureError(
                    "not signed for this device and purpose, which device.yaml requires", hint="sign it: --key"
                )
            signatures.verify(order.signature, messages.signed_bytes(values), signatures.trusted_keys(self.trust))
        return order
