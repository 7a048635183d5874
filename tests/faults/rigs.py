"""Camera stacks whose faults a test can command: a simulator, a server or a stand-in below the real library, each a process or a
thread of its own. What each can show stands in `shows`."""

from __future__ import annotations

import http.server
import importlib.util
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edge_inspector import pictures
from tests.line import free_port, needed, preloadable
from tests.test_aravis import Simulator, installed

SIDE = 128
GSTREAMER = "apt install python3-gi gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-{base,good,bad,ugly}"
GST_PROBE = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"


def has_gstreamer() -> bool:
    """Whether the system's Python can run an RTSP server."""
    return Path("/usr/bin/python3").exists() and not subprocess.run(
        ["/usr/bin/python3", "-c", GST_PROBE], capture_output=True, check=False
    ).returncode  # fmt: skip


class Rig:
    """One camera with its faults. `hang`, `unplug`, `freeze`, `dark`, `resize`, `corrupt`, `mute`; `mend` ends any of them."""

    shows: ClassVar[frozenset[str]] = frozenset()
    uri = ""
    settings: ClassVar[dict[str, Any]] = {}
    """Of the camera, so that it can be told from a wrong one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment: dict[str, str] = {}

    def start(self) -> None:
        """Skips the test where something is not installed."""

    def stop(self) -> None:
        """End what was started."""

    def do(self, fault: str) -> None:
        """Begin a fault."""
        getattr(self, fault)()

    def mend(self) -> None:
        """End it."""


class Aravis(Rig):
    """GigE Vision over real GVCP and GVSP."""

    shows = frozenset({"hang", "unplug", "freeze", "dark", "corrupt"})
    uri = "aravis://127.0.0.1"
    settings: ClassVar[dict[str, Any]] = {"width": SIDE, "height": SIDE, "fps": 50, "exposure_us": 10_000}

    def start(self) -> None:
        needed(installed(), "apt install libaravis-0.8-0")
        self.simulator = Simulator()
        self.simulator.start()

    def stop(self) -> None:
        self.simulator.stop()

    def hang(self) -> None:
        assert self.simulator.process is not None
        self.simulator.process.send_signal(signal.SIGSTOP)

    def unplug(self) -> None:
        self.simulator.stop()

    def freeze(self) -> None:
        self.simulator.tell("freeze")

    def dark(self) -> None:
        self.simulator.tell("dark")

    def corrupt(self) -> None:
        self.simulator.tell("lose 0.5")

    def mute(self) -> None:
        self.simulator.tell("mute")

    def mend(self) -> None:
        if self.simulator.process is None:
            self.simulator.start()
        self.simulator.process.send_signal(signal.SIGCONT)  # type: ignore[union-attr]
        self.simulator.tell("well")


class AravisTriggered(Aravis):
    """The same, an image for each software trigger."""

    shows = frozenset({"hang", "unplug", "dark"})
    uri = "aravis://127.0.0.1?trigger=software"


class V4l2(Rig):
    """The real OpenCV on a stand-in below it."""

    shows = frozenset({"hang", "unplug", "freeze", "dark"})
    uri = "v4l2:///dev/video99"
    settings: ClassVar[dict[str, Any]] = {"width": SIDE, "height": SIDE, "fps": 50}

    def start(self) -> None:
        self.mode = self.folder / "mode"
        self.mend()
        self.environment = {"LD_PRELOAD": preloadable("v4l2", self.folder), "V4L2_MODE": str(self.mode)}

    def do(self, fault: str) -> None:
        self.mode.write_text(fault)

    def mend(self) -> None:
        self.mode.write_text("well")


class Rtsp(Rig):
    """H.264 from a GStreamer server."""

    shows = frozenset({"hang", "unplug"})

    def start(self) -> None:
        needed(has_gstreamer(), GSTREAMER)
        self.port = free_port()
        self.uri = f"rtsp://127.0.0.1:{self.port}/camera"
        self._serve()

    def _serve(self) -> None:
        script = Path(__file__).resolve().parents[1] / "rtsp.py"
        self.process = subprocess.Popen(["/usr/bin/python3", script, str(self.port)], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()

    def hang(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def unplug(self) -> None:
        self.stop()

    def mend(self) -> None:
        if self.process.poll() is not None:
            self._serve()
        self.process.send_signal(signal.SIGCONT)

    @staticmethod
    def told_ms(image: NDArray[np.uint8]) -> int:
        """The monotonic clock's milliseconds that a picture shows."""
        grey = image[..., 1]
        squares = [grey[b // 8 * 16 + 4 : b // 8 * 16 + 12, b % 8 * 16 + 4 : b % 8 * 16 + 12].mean() > 128 for b in range(32)]
        return sum(1 << bit for bit, high in enumerate(squares) if high)


class Http(Rig):
    """MJPEG from a server in this process."""

    shows = frozenset({"hang", "unplug", "freeze", "dark", "resize", "corrupt"})
    settings: ClassVar[dict[str, Any]] = {"latency_ms": 20}

    def start(self) -> None:
        rig, self.mode = self, ""

        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if rig.mode == "unplug":
                    return
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                number = 0
                while rig.mode not in ("unplug", "end"):
                    if rig.mode != "hang":
                        number += 1
                        data = rig.picture(number)
                        part = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n".encode()
                        try:
                            self.wfile.write(part + data + b"\r\n")
                        except OSError:
                            return
                    time.sleep(0.02)

            def log_message(self, *_: Any) -> None:
                return

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.uri = f"http://127.0.0.1:{self.server.server_port}/"

    def picture(self, number: int) -> bytes:
        side = SIDE // 2 if self.mode == "resize" else SIDE
        level = 0 if self.mode == "dark" else 99 if self.mode == "freeze" else 60 + number * 7 % 100
        data = pictures.encoded(np.full((side, side, 3), level, np.uint8), ".jpg")
        return data[: len(data) // 2] if self.mode == "corrupt" else data

    def stop(self) -> None:
        self.mode = "end"
        self.server.shutdown()
        self.server.server_close()

    def do(self, fault: str) -> None:
        self.mode = fault

    def mend(self) -> None:
        self.mode = ""


class Gst(Http):
    """The same server, through the system's GStreamer."""

    shows = frozenset({"hang", "unplug", "freeze", "dark"})
    settings: ClassVar[dict[str, Any]] = {}

    def start(self) -> None:
        needed(has_gstreamer(), GSTREAMER)
        super().start()
        self.uri = f"gst:souphttpsrc location={self.uri} is-live=true do-timestamp=true ! multipartdemux ! jpegdec"


class Pylon(Rig):
    """Basler's own emulation: it models no removal."""

    uri = "pylon://?trigger=software"
    settings: ClassVar[dict[str, Any]] = {"width": SIDE, "height": SIDE, "exposure_us": 1000.0}

    def start(self) -> None:
        needed(importlib.util.find_spec("pypylon"), 'pip install "edge-inspector[pylon]"')
        self.environment = {"PYLON_CAMEMU": "1"}


class Gentl(Rig):
    """The GenTL producer that comes with the reference implementation: it models no fault."""

    settings: ClassVar[dict[str, Any]] = {"width": SIDE, "height": SIDE, "fps": 50}

    def start(self) -> None:
        found = importlib.util.find_spec("genicam") and importlib.util.find_spec("harvesters")
        needed(found, 'pip install "edge-inspector[gentl]"')
        place = importlib.util.find_spec("genicam")
        assert place is not None
        assert place.submodule_search_locations
        self.uri = f"gentl://0?cti={place.submodule_search_locations[0]}/viky.cti"


RIGS: dict[str, type[Rig]] = {
    "aravis": Aravis, "aravis-triggered": AravisTriggered, "v4l2": V4l2, "rtsp": Rtsp, "http": Http, "gst": Gst, "pylon": Pylon,
    "gentl": Gentl,
}  # fmt: skip
