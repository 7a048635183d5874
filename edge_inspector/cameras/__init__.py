"""Cameras: `Camera` is what a station uses; a `Source` is one way to get frames."""

from edge_inspector.cameras.camera import Camera, CameraState
from edge_inspector.cameras.source import Info, Source
from edge_inspector.cameras.sources import is_isolated, open_source

__all__ = ["Camera", "CameraState", "Info", "Source", "is_isolated", "open_source"]
