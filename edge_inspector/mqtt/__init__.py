"""The connection to the broker, what the broker allows, and what goes wrong with it, in words."""

from edge_inspector.mqtt.connection import (
    IN_FLIGHT,
    WILL_DELAY_S,
    Acknowledged,
    Connection,
    Event,
    Message,
    Refused,
    Will,
    Woken,
)
from edge_inspector.mqtt.credentials import blanks_of, read_password, tls_context
from edge_inspector.mqtt.limits import Limits
from edge_inspector.mqtt.probe import Probed, probe, tried
from edge_inspector.mqtt.trouble import TOO_LARGE, Trouble, hint_of

__all__ = [
    "IN_FLIGHT",
    "TOO_LARGE",
    "WILL_DELAY_S",
    "Acknowledged",
    "Connection",
    "Event",
    "Limits",
    "Message",
    "Probed",
    "Refused",
    "Trouble",
    "Will",
    "Woken",
    "blanks_of",
    "hint_of",
    "probe",
    "read_password",
    "tls_context",
    "tried",
]
