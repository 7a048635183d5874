"""A GigE Vision camera over real GVCP and GVSP, as a process: python -m tests.gige IP SERIAL. Needs libaravis alone.

Each picture holds its frame's id in its first eight pixels, and is as bright as the exposure makes it.
"""

from __future__ import annotations

import ctypes
import sys
import time
from typing import Any

import numpy as np

P = ctypes.c_void_p


def main() -> None:
    arv = ctypes.CDLL("libaravis-0.8.so.0")
    arv.arv_gv_fake_camera_new.restype, arv.arv_gv_fake_camera_new.argtypes = P, [ctypes.c_char_p, ctypes.c_char_p]
    arv.arv_gv_fake_camera_is_running.argtypes = [P]
    arv.arv_gv_fake_camera_get_fake_camera.restype, arv.arv_gv_fake_camera_get_fake_camera.argtypes = P, [P]
    arv.arv_buffer_get_data.restype, arv.arv_buffer_get_data.argtypes = P, [P, P]
    arv.arv_buffer_get_frame_id.restype, arv.arv_buffer_get_frame_id.argtypes = ctypes.c_uint64, [P]
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
        pixels[:] = min(255, exposure_us // 100)
        pixels[:8] = np.frombuffer(int(arv.arv_buffer_get_frame_id(buffer)).to_bytes(8, "big"), np.uint8)

    camera = arv.arv_gv_fake_camera_new(sys.argv[1].encode(), sys.argv[2].encode())
    if not camera or not arv.arv_gv_fake_camera_is_running(camera):
        sys.exit("the simulator does not run: is its port, UDP 3956, taken?")
    kept = callback(fill)
    arv.arv_fake_camera_set_fill_pattern(arv.arv_gv_fake_camera_get_fake_camera(camera), kept, None)
    print("ready", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main()
