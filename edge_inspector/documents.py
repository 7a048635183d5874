"""Every document and message with a JSON Schema, by name."""

from __future__ import annotations

from pydantic import BaseModel

from edge_inspector.bundles import Manifest
from edge_inspector.config import DeviceConfig, LineConfig
from edge_inspector.messages import PUBLISHED

SCHEMAS: dict[str, type[BaseModel]] = {"device": DeviceConfig, "line": LineConfig, "manifest": Manifest, **PUBLISHED}
