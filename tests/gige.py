"""A GigE Vision camera over real GVCP and GVSP, as a process: python -m tests.gige IP SERIAL. Needs libaravis alone.

Each picture holds its frame's id in its first eight pixels and the part's in front of the camera in the next eight, and is as
bright as the exposure makes it. Lines on stdin, each answered by `done`: `part 17` moves part 17 in front, `pulse` is an edge on
Line0; `dark`, `freeze`, `lose 0.5` (of the packets), `width 64`, `mute` (deaf to triggers), and `well`, which ends all of these.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from typing import Any

import numpy as np

P = ctypes.c_void_p
WIDTH, TRIGGER_SOURCE, TRIGGER_NOW = 0x100, 0x304, 0x30C
LINE_0, SOFTWARE = 0, 1


def main() -> None:
    part, filled, faults = 0, threading.Event(), set[str]()
    gobject = ctypes.CDLL("libgobject-2.0.so.0")
    arv = ctypes.CDLL("libaravis-0.8.so.0")
    arv.arv_gv_fake_camera_new.restype, arv.arv_gv_fake_camera_new.argtypes = P, [ctypes.c_char_p, ctypes.c_char_p]
    arv.arv_gv_fake_camera_is_running.argtypes = [P]
    arv.arv_gv_fake_camera_get_fake_camera.restype, arv.arv_gv_fake_camera_get_fake_camera.argtypes = P, [P]
    arv.arv_buffer_get_data.restype, arv.arv_buffer_get_data.argtypes = P, [P, P]
    arv.arv_buffer_get_frame_id.restype, arv.arv_buffer_get_frame_id.argtypes = ctypes.c_uint64, [P]
    arv.arv_fake_camera_write_register.argtypes = [P, ctypes.c_uint32, ctypes.c_uint32]
    for name in ("width", "height"):
        getattr(arv, f"arv_buffer_get_image_{name}").argtypes = [P]
    callback = ctypes.CFUNCTYPE(None, P, P, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32)
    arv.arv_fake_camera_set_fill_pattern.argtypes = [P, callback, P]

    def fill(buffer: Any, _data: Any, exposure_us: int, _gain: int, _format: int) -> None:
        # What is filled counts as nothing yet, so the size is the picture's.
        size = arv.arv_buffer_get_image_width(buffer) * arv.arv_buffer_get_image_height(buffer)
        data = arv.arv_buffer_get_data(buffer, ctypes.byref(ctypes.c_size_t()))
        memory: Any = (ctypes.c_uint8 * size).from_address(data)
        pixels = np.frombuffer(memory, np.uint8)
        pixels[:] = 0 if "dark" in faults else min(255, exposure_us // 100)
        if faults & {"dark", "freeze"}:
            return
        pixels[:8] = np.frombuffer(int(arv.arv_buffer_get_frame_id(buffer)).to_bytes(8, "big"), np.uint8)
        pixels[8:16] = np.frombuffer(part.to_bytes(8, "big"), np.uint8)
        filled.set()

    camera = arv.arv_gv_fake_camera_new(sys.argv[1].encode(), sys.argv[2].encode())
    if not camera or not arv.arv_gv_fake_camera_is_running(camera):
        sys.exit("the simulator does not run: is its port, UDP 3956, taken?")
    write = arv.arv_fake_camera_write_register
    kept = callback(fill)
    device = arv.arv_gv_fake_camera_get_fake_camera(camera)
    arv.arv_fake_camera_set_fill_pattern(device, kept, None)
    print("ready", flush=True)
    for line in sys.stdin:
        word, *more = line.split()
        if word == "part":
            part = int(more[0])
        elif word == "pulse":  # the simulator has no line: it is told to make one image, and then waits for its line again
            filled.clear()
            write(device, TRIGGER_SOURCE, SOFTWARE)
            write(device, TRIGGER_NOW, 1)
            filled.wait(1.0)
            write(device, TRIGGER_SOURCE, LINE_0)
        elif word == "lose":
            gobject.g_object_set(P(camera), b"gvsp-lost-ratio", ctypes.c_double(float(more[0])), None)
        elif word == "width":
            write(device, WIDTH, int(more[0]))
        elif word == "mute":
            write(device, TRIGGER_SOURCE, LINE_0)
        elif word == "well":
            faults.clear()
            gobject.g_object_set(P(camera), b"gvsp-lost-ratio", ctypes.c_double(0.0), None)
            write(device, TRIGGER_SOURCE, SOFTWARE)
        else:
            faults.add(word)
        print("done", flush=True)


if __name__ == "__main__":
    main()
