"""Camera URI -> Source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edge_inspector.cameras.aravis import AravisSource
from edge_inspector.cameras.folder import FolderSource, VideoSource
from edge_inspector.cameras.isolation import IsolatedSource
from edge_inspector.cameras.mjpeg import MjpegSource
from edge_inspector.cameras.opencv import OpencvSource
from edge_inspector.cameras.source import Address, Source
from edge_inspector.cameras.synthetic import LETHAL, SyntheticSource
from edge_inspector.config import GENICAM, CameraConfig

_KINDS: dict[str, Callable[[CameraConfig, Path], Source]] = {
    "dir": FolderSource,
    "file": VideoSource,
    "synthetic": SyntheticSource,
    **dict.fromkeys(GENICAM, AravisSource),
}
_NETWORK: dict[str, Callable[[CameraConfig, Path], Source]] = {"http": MjpegSource, "https": MjpegSource}
"""These can hang."""


def direct_source(config: CameraConfig, base: Path) -> Source:
    """The source of a URI, in this process."""
    return (_KINDS | _NETWORK).get(Address.of(config.uri).scheme, OpencvSource)(config, base)


def open_source(config: CameraConfig, base: Path) -> Source:
    """The source of a URI, in a child process where its calls can hang. Not opened yet."""
    address = Address.of(config.uri)
    isolated = address.scheme not in _KINDS or "isolate" in address.options or address.options.get("fault") in LETHAL
    return IsolatedSource(config, base) if isolated else direct_source(config, base)
