"""What goes wrong between a client and its broker, in words, and what to do about it."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from paho.mqtt.reasoncodes import ReasonCode

TAKEN_OVER = 0x8E
TOO_LARGE = 0x95
_CLOSED = 0x80
"""What paho says where the connection just ended."""
_FIRST_S, _TAKEN_OVER_S = 0.2, 1.0
_UNREACHED_S, _LONGEST_S = 5.0, 60.0
STEADY_S = 5.0
"""A connection that stood for so long was a good one."""
_ALONE = 3.0
"""Times the last pause that it must have stood, too: another client of the same name waits as long as this one did."""


@dataclass(frozen=True)
class Trouble:
    """One thing wrong with a connection; `code` is that of health's cause."""

    code: str
    text: str


@dataclass(frozen=True)
class Ending:
    """How a connection ended."""

    stood_s: float | None
    """None: it never stood."""
    ours: bool
    """Whether we ended it."""
    code: int | None = None
    """Of the broker's DISCONNECT; None: the connection was closed without a word."""
    words: str = ""

    @property
    def may_be_a_message(self) -> bool:
        """Whether the broker may have closed it because of what was sent."""
        return not self.ours and self.stood_s is not None and self.code in (None, TOO_LARGE)


def words_of(reason: ReasonCode) -> str:
    """A reason as the standard names it, with its number."""
    return f"{reason.getName()} (0x{reason.value:02X})"


def is_closed(reason: ReasonCode) -> bool:
    """Whether paho says no more than that the connection ended."""
    return bool(reason.value == _CLOSED)


class Pause:
    """How long to wait before the next connection: longer each time, never for ever."""

    def __init__(self) -> None:
        self._unreached = self._short = 0
        self._last_s = 0.0

    def reset(self) -> None:
        """Begin anew: something was changed that may help."""
        self._unreached = self._short = 0
        self._last_s = 0.0

    def after(self, ending: Ending) -> float:
        """In seconds, with jitter."""
        return self._wait_s(ending) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter

    def _wait_s(self, ending: Ending) -> float:
        if ending.stood_s is None:
            self._unreached += 1
            return min(_FIRST_S * 2.0 ** min(self._unreached, 9), _UNREACHED_S)
        self._unreached = 0
        if ending.ours:
            return _FIRST_S
        if ending.stood_s > STEADY_S + _ALONE * self._last_s:
            self._short = 0
        first_s = _TAKEN_OVER_S if ending.code == TAKEN_OVER else _FIRST_S
        self._last_s = min(first_s * 2.0 ** min(self._short, 9), _LONGEST_S)
        self._short += 1
        return self._last_s


_HINTS = (
    ("certificate verify|certificate_verify",
     "TLS: the broker's certificate is not signed by broker.tls.ca_file, has expired, or is for another name than broker.host"),
    ("certificate.required|handshake.failure|bad.certificate|unknown.ca|certificate unknown",
     "TLS: the broker wants a client certificate that it trusts: broker.tls.cert_file and key_file"),
    ("wrong.version.number|record.layer|unexpected.eof|handshake operation",
     "TLS: broker.tls is set, and that port may speak MQTT without TLS: 1883 is usual without, 8883 with it"),
    ("ssl|tls", "TLS: check the files under broker.tls, and the broker's own"),
    ("identifier", "the broker refuses the client's name, or wants a shorter broker.keepalive_s"),
    ("authori[sz]ed|bad user",
     "are broker.username and the first line of broker.password_file right, and may this user connect, subscribe and publish?"),
    ("keep alive", "lower broker.keepalive_s"),
    ("name or service|name resolution|no address", "is broker.host right, and does this machine resolve names?"),
)  # fmt: skip


_WITH_TLS = (
    "TLS? broker.tls is set, and 1883 is usual without; or it wants a client certificate: broker.tls.cert_file and key_file"
)


def hint_of(words: str, *, tls: bool = False) -> str:
    """What to do about a refusal."""
    low = words.lower()
    for pattern, hint in _HINTS:
        if re.search(pattern, low):
            return hint
    if re.search("closed|reset|lost|no answer|timed out", low):
        wrong = _WITH_TLS if tls else "MQTT without TLS? For TLS (8883) set broker.tls"
        return f"is the broker running there, and does that port speak {wrong}"
    return "is the broker running there, and are user and password right? broker: in device.yaml"
