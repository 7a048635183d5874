"""What a camera's process is left with: its own folder, its cache and its device nodes; of a stream, its port."""

from __future__ import annotations

from pathlib import Path

from edge_inspector.addresses import STREAMS
from edge_inspector.confinement import Walls, used_by_python
from edge_inspector.door import Admitted

_MEDIA = ("video*", "media*", "v4l-subdev*", "nv*", "dri", "dma_heap", "snd", "bus", "udmabuf")
"""Device nodes that pipelines, producers and a Jetson's own cameras may need; no disk, no memory, no terminal."""
_NAMES_PORT = 53
"""Of DNS, where an answer is too long for UDP."""


def walls_of(admitted: Admitted, own: Path, cache: Path) -> Walls:
    """What the process of this camera may do."""
    folders: tuple[str, ...] = (str(own), str(cache))
    scheme = admitted.address.scheme
    if scheme in STREAMS:
        reads = (*used_by_python(), *folders)
        return Walls(folders, ("/dev/null",), reads, (admitted.address.port, _NAMES_PORT), alone=True)
    if scheme == "pylon":  # whose library keeps its locks there
        folders += ("/dev/shm",)  # noqa: S108 - a file system, not a name
    ports = () if scheme in ("v4l2", "aravis", "gige", "u3v") else None
    return Walls(folders, ("/dev/null", *_devices(admitted)), None, ports)


def _devices(admitted: Admitted) -> list[str]:
    scheme = admitted.address.scheme
    if scheme == "v4l2":
        return [str(admitted.path)]
    if scheme in ("gst", "csi", "gentl"):
        return sorted(str(path) for pattern in _MEDIA for path in Path("/dev").glob(pattern))
    return ["/dev/bus/usb"] if scheme in ("aravis", "u3v", "pylon") else []
