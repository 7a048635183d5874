"""Messages that have to fit into what a broker takes: what matters least is left out, and that is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from edge_inspector.messages import (
    Alert,
    BundleReported,
    ConfigReported,
    Head,
    HealthMessage,
    Ready,
    ReplayEnd,
    Reply,
    StateMessage,
    decode,
    encode,
)
from edge_inspector.results import Result, fitted

_GIVEN_UP: dict[type[BaseModel], tuple[str, ...]] = {
    HealthMessage: ("cameras", "reasons"),
    StateMessage: ("capabilities", "engines"),
    ConfigReported: ("history", "last", "line"),
    BundleReported: ("history", "shadow", "last"),
    Alert: ("text",),
    Ready: ("reason",),
    Reply: ("error",),
    ReplayEnd: ("error",),
}
"""What each message gives up, in this order."""


def shortened(message: BaseModel, most_bytes: int) -> bytes | None:
    """The JSON of a message within so many bytes; None where even the shortest does not fit."""
    payload = encode(message)
    if len(payload) <= most_bytes:
        return payload
    steps = _head_steps if isinstance(message, Head) else _steps
    for smaller in steps(message):
        payload = encode(smaller)
        if len(payload) <= most_bytes:
            return payload
    return None


def shortened_result(payload: bytes, most_bytes: int) -> bytes | None:
    """The same for a stored result."""
    if len(payload) <= most_bytes:
        return payload
    return fitted(decode(Result, payload, "result"), most_bytes)


def _steps(message: BaseModel) -> list[BaseModel]:
    """Ever shorter forms of a message."""
    forms: list[BaseModel] = []
    said = {"shortened": True} if "shortened" in type(message).model_fields else {}
    for name in _GIVEN_UP.get(type(message), ()):
        while (value := getattr(message, name)) not in (None, "", (), {}):
            message = message.model_copy(update={name: _SHORTER[name](value), **said})
            forms.append(message)
    return forms


def _first_half(value: Any) -> Any:
    return value[: len(value) // 2]


_SHORTER: dict[str, Callable[[Any], Any]] = {
    "cameras": lambda cameras: dict(list(cameras.items())[: len(cameras) // 2]),
    "engines": lambda engines: dict(list(engines.items())[: len(engines) // 2]),
    "reasons": _first_half,  # the gravest come first
    "capabilities": _first_half,
    "text": _first_half,
    "reason": _first_half,
    "history": lambda entries: entries[(len(entries) + 1) // 2 :],  # the newest come last
    "line": lambda _: {},  # half a document would be another one
    "last": lambda _: None,
    "shadow": lambda _: None,
    "error": lambda error: error[: len(error) // 2] if isinstance(error, str) else _shorter_error(error),
}


def _shorter_error(error: Any) -> Any:
    """Without its hint, then with less of its message; a reply that is not ok always has one."""
    if error.hint:
        return error.model_copy(update={"hint": ""})
    return error.model_copy(update={"message": _first_half(error.message)}) if error.message else None


def _head_steps(head: BaseModel) -> list[BaseModel]:
    """With ever fewer gaps, the newest of them."""
    assert isinstance(head, Head)
    forms: list[BaseModel] = []
    while head.gaps:
        kept = head.gaps[(len(head.gaps) + 1) // 2 :]
        head = head.model_copy(update={"gaps": kept, "gaps_omitted": head.gaps_omitted + len(head.gaps) - len(kept)})
        forms.append(head)
    return forms
