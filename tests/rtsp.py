"""An RTSP server, as a process of the system's Python: /usr/bin/python3 tests/rtsp.py PORT. Says `ready`.

Each picture holds the monotonic clock's milliseconds, 32 bits of it, as 4 rows of 8 squares that survive H.264.
"""

import sys
import threading
import time

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402

SIDE, SQUARE, FPS = 128, 16, 25
PIPELINE = (
    f"( appsrc name=src is-live=true format=time do-timestamp=true caps=video/x-raw,format=GRAY8,width={SIDE},height={SIDE},"
    f"framerate={FPS}/1 ! videoconvert ! video/x-raw,format=I420 ! x264enc tune=zerolatency speed-preset=ultrafast "
    f"key-int-max={FPS} ! rtph264pay name=pay0 pt=96 )"
)


def picture() -> bytes:
    told = int(time.monotonic() * 1000) & 0xFFFFFFFF
    image = bytearray([128]) * (SIDE * SIDE)
    for bit in range(32):
        level = 230 if told >> bit & 1 else 30
        for row in range(bit // 8 * SQUARE, bit // 8 * SQUARE + SQUARE):
            start = row * SIDE + bit % 8 * SQUARE
            image[start : start + SQUARE] = bytes([level]) * SQUARE
    return bytes(image)


def configured(_factory: object, media: "GstRtspServer.RTSPMedia") -> None:
    source = media.get_element().get_by_name_recurse_up("src")
    running = threading.Event()
    running.set()
    media.connect("unprepared", lambda _: running.clear())

    def push() -> None:
        due = time.monotonic()
        while running.is_set() and source.emit("push-buffer", Gst.Buffer.new_wrapped(picture())) == Gst.FlowReturn.OK:
            due += 1 / FPS
            time.sleep(max(0.0, due - time.monotonic()))

    threading.Thread(target=push, daemon=True).start()


def main() -> None:
    Gst.init(None)
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(sys.argv[1])
    factory = GstRtspServer.RTSPMediaFactory()
    factory.set_shared(True)
    factory.set_launch(PIPELINE)
    factory.connect("media-configure", configured)
    server.get_mount_points().add_factory("/camera", factory)
    server.attach(None)
    print("ready", flush=True)
    GLib.MainLoop().run()


if __name__ == "__main__":
    main()
