"""edge-inspector: visual inspection on the line, from camera to MQTT.

Importing the package loads nothing heavy; each name below is loaded when it is first used.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_inspector.bundles import open_bundle
    from edge_inspector.cameras import Camera
    from edge_inspector.config import load_device, load_line
    from edge_inspector.errors import InspectorError
    from edge_inspector.frames import Frame, Trigger
    from edge_inspector.inspector import Inspector
    from edge_inspector.recipes import Recipe
    from edge_inspector.results import Result, Verdict
    from edge_inspector.subscriber import Subscriber

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
"""ONNX Runtime 1.32 for Linux reports its use to its maker unless it is told not to before it is loaded."""
_HOMES = {
    "Camera": "cameras",
    "Frame": "frames",
    "Inspector": "inspector",
    "InspectorError": "errors",
    "Recipe": "recipes",
    "Result": "results",
    "Subscriber": "subscriber",
    "Trigger": "frames",
    "Verdict": "results",
    "load_device": "config",
    "load_line": "config",
    "open_bundle": "bundles",
}
__all__ = [
    "Camera",
    "Frame",
    "Inspector",
    "InspectorError",
    "Recipe",
    "Result",
    "Subscriber",
    "Trigger",
    "Verdict",
    "load_device",
    "load_line",
    "open_bundle",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edge_inspector' has no attribute {name!r}")
    return getattr(import_module(f"edge_inspector.{_HOMES[name]}"), name)
