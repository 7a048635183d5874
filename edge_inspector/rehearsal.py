"""What the daemon will do at its start, done once and undone: for `check`."""

from __future__ import annotations

import fcntl
import socket
import tempfile
from pathlib import Path

from edge_inspector.config import Device, EngineConfig, MetricsConfig
from edge_inspector.errors import InspectorError


def is_running(device: Device) -> bool:
    """Whether a daemon holds the state folder: what it has taken cannot be tried."""
    try:
        with (device.state / "lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def state_written(folder: Path) -> str:
    """Write into the state folder, and leave nothing there. Raises InspectorError."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        hint = "the user who runs the daemon must be able to write there: storage.folder in device.yaml"
        raise InspectorError(f"{folder}: cannot be written: {error.strerror}", hint=hint) from error
    finally:
        for one in missing:
            if one.is_dir():
                one.rmdir()
    return "can be written"


def metrics_served(config: MetricsConfig) -> str:
    """Listen where Prometheus is to scrape. Raises InspectorError."""
    try:
        address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(address[0], socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address[4])
            listener.listen(1)
    except OSError as error:
        hint = "another program listens there: choose another port under metrics: in device.yaml"
        raise InspectorError(f"{config.host}:{config.port}: {error.strerror}", hint=hint) from error
    return "free"


def engine_run(config: EngineConfig) -> str:
    """Ask for what the configured runtime needs. Raises InspectorError for what nothing stands in for."""
    if config.runtime == "onnxruntime":
        return "ONNX Runtime, on the CPU"
    from edge_inspector.runtime.cuda import gpu  # noqa: PLC0415 - loads ONNX Runtime
    from edge_inspector.runtime.tensorrt import load  # noqa: PLC0415

    try:
        return f"TensorRT {load().__version__} on {gpu().facts.name}"
    except InspectorError as error:
        if not config.fallback:
            hint = f"{error.hint}; or engine: {{runtime: onnxruntime}} in device.yaml"
            raise InspectorError(f"TensorRT cannot run here: {error.message}", hint=hint) from error
        return f"networks would run on the CPU, since TensorRT cannot run here: {error.message}"
