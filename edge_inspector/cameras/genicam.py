"""What the stacks of GenICam cameras share: pixel formats (PFNC), settings (SFNC), block ids, and the camera's clock."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_inspector.cameras.source import Info, check_format
from edge_inspector.config import CameraConfig
from edge_inspector.errors import CameraError, PictureError
from edge_inspector.frames import Pixels

_BAYER = {"GR": cv2.COLOR_BayerGB2BGR, "RG": cv2.COLOR_BayerBG2BGR, "GB": cv2.COLOR_BayerGR2BGR, "BG": cv2.COLOR_BayerRG2BGR}
"""GenICam names the first two pixels of the first row, OpenCV those of the second."""
FORMATS: dict[int, tuple[str, type, int, int | None]] = {
    0x01080001: ("Mono8", np.uint8, 1, None), 0x01100003: ("Mono10", np.uint16, 1, None),
    0x01100005: ("Mono12", np.uint16, 1, None), 0x01100007: ("Mono16", np.uint16, 1, None),
    0x02180014: ("RGB8", np.uint8, 3, cv2.COLOR_RGB2BGR), 0x02180015: ("BGR8", np.uint8, 3, None),
    0x02200016: ("RGBa8", np.uint8, 4, cv2.COLOR_RGBA2BGR), 0x02200017: ("BGRa8", np.uint8, 4, cv2.COLOR_BGRA2BGR),
    **{0x01080008 + n: (f"Bayer{p}8", np.uint8, 1, code) for n, (p, code) in enumerate(_BAYER.items())},
    **{0x0110000C + n: (f"Bayer{p}10", np.uint16, 1, code) for n, (p, code) in enumerate(_BAYER.items())},
    **{0x01100010 + n: (f"Bayer{p}12", np.uint16, 1, code) for n, (p, code) in enumerate(_BAYER.items())},
    **{0x0110002E + n: (f"Bayer{p}16", np.uint16, 1, code) for n, (p, code) in enumerate(_BAYER.items())},
}  # fmt: skip
"""PFNC code: name, type, channels in memory, conversion to BGR (None: as it is)."""
_OLD_NAMES = {"RGB8Packed": "RGB8", "BGR8Packed": "BGR8", "RGBA8Packed": "RGBa8", "BGRA8Packed": "BGRa8"}
_NO_ID = (0, 2**64 - 1)
_MAX_PADDING = 64
"""Bytes: what is more than rows are filled up with is no padding, but data of another kind behind the picture."""
BLOCK_IDS = 65535
"""Block ids of GigE Vision 1 go from 65535 to 1."""
STEP = 0.01
"""Cameras round floats to their own steps: this share is no mismatch."""
_ALIASES = {
    "fps": ("AcquisitionFrameRate", "AcquisitionFrameRateAbs"),
    "exposure_us": ("ExposureTime", "ExposureTimeAbs"),
    "gain_db": ("Gain", "GainAbs"),
}
"""The standard's name and the one before it."""
_SHOWN = ("PixelFormat", "ExposureTime", "ExposureTimeAbs", "Gain", "TriggerMode", "TriggerSource", "GevSCPSPacketSize")
_SWITCHES = ("AcquisitionFrameRateEnable", "AcquisitionFrameRateEnabled")


def code_of(name: str) -> int:
    """PFNC code of a pixel format as a stack names it (`BGR8Packed` and `BGR8` are one). Raises StopIteration for another."""
    return next(code for code, (known, *_) in FORMATS.items() if known == _OLD_NAMES.get(name, name))


def info_of(code: int, width: int, height: int, *, trigger: str = "", fps: float | None = None) -> Info:
    """What a camera of this format delivers. Raises KeyError for a format that is not understood."""
    _, kind, channels, colour = FORMATS[code]
    return Info(
        width,
        height,
        3 if channels > 1 or colour is not None else 1,
        np.dtype(kind).itemsize * 8,
        fps,
        triggerable=trigger.lower() == "software",
        waits=trigger.lower() not in ("", "software"),
    )


def not_understood(config: CameraConfig, name: str) -> CameraError:
    """The error for a pixel format that is none of FORMATS."""
    known = ", ".join(sorted(known for known, *_ in FORMATS.values()))
    return CameraError(f"{config.name}: pixel format {name} is not understood", hint=f"set pixel_format to one of {known}")


def pixels(memory: Any, code: int, width: int, height: int, padding: int | None) -> Pixels:
    """A copy of a driver's buffer in our own memory, [H, W] or [H, W, 3] BGR.

    `padding`: bytes behind each row, as the stack tells; None where it does not. Raises PictureError where the buffer holds
    another number of bytes than such rows have: each row would be shifted against the one before.
    """
    _, kind, channels, colour = FORMATS[code]
    shape = (height, width) if channels == 1 else (height, width, channels)
    rows = _rows(np.frombuffer(memory, np.uint8), width * channels * np.dtype(kind).itemsize, height, padding)
    image: Pixels = np.ascontiguousarray(rows).view(kind).reshape(shape)
    return image.copy() if colour is None else cv2.cvtColor(image, colour)


def _rows(data: NDArray[np.uint8], used: int, height: int, padding: int | None) -> NDArray[np.uint8]:
    """uint8 [height, used]: the bytes of the picture without what lies behind its rows."""
    step = used + (padding or 0)
    spare = data.size - used * height
    if padding and spare == 0:  # the stack has taken it out
        step = used
    if data.size < step * (height - 1) + used:
        raise PictureError(f"{data.size} bytes came, {height} rows of {step} were expected")
    if padding is None and 0 < spare <= _MAX_PADDING * height and spare % height == 0:
        raise PictureError(f"{data.size} bytes came: {height} rows of {used} and {spare // height} more that nothing tells of")
    return np.lib.stride_tricks.as_strided(data, (height, used), (step, 1), writeable=False)


def gap(last: int, now: int) -> int:
    """Frames lost between two block ids, across the wrap of 16-bit ones; a camera that counts anew has lost none."""
    if not last or now == last + 1 or now in _NO_ID:
        return 0
    if now > last:
        return now - last - 1
    steps = now + BLOCK_IDS - last - 1
    return steps if last <= BLOCK_IDS and steps < BLOCK_IDS // 2 else 0


class Nodes(Protocol):
    """A camera's features by name, as a vendor's library gives them. Any of its errors may be raised."""

    def text(self, name: str) -> str | None:
        """The value as text; None where the camera has no such feature."""
        ...

    def put(self, name: str, text: str) -> None:
        """Set it."""
        ...

    def limits(self, name: str) -> str:
        """What it takes, in words; empty where it does not say."""
        ...


def apply(nodes: Nodes, config: CameraConfig) -> None:
    """Set what the configuration sets and read all of it back. Raises CameraError with the camera's own range."""
    if nodes.text("AcquisitionMode") is not None:  # a camera left in SingleFrame gives one image, and then none
        _set(nodes, config, ("AcquisitionMode",), "Continuous")
    sizes = {"Width": config.width, "Height": config.height, "OffsetX": config.offset_x, "OffsetY": config.offset_y}
    wanted: list[tuple[tuple[str, ...], Any]] = [((name,), value) for name, value in sizes.items() if value is not None]
    if config.pixel_format is not None:
        wanted.append((("PixelFormat",), config.pixel_format))
    if config.packet_size is not None:
        wanted.append((("GevSCPSPacketSize",), config.packet_size))
    if config.fps is not None:
        wanted += [((switch,), True) for switch in _SWITCHES if nodes.text(switch) is not None]
    named = ((names, getattr(config, setting)) for setting, names in _ALIASES.items())
    wanted += [(names, float(value)) for names, value in named if value is not None]
    for names, value in [*wanted, *(((name,), value) for name, value in config.features.items())]:
        _set(nodes, config, names, value)


def _set(nodes: Nodes, config: CameraConfig, names: tuple[str, ...], value: bool | float | str) -> None:
    name = next((name for name in names if nodes.text(name) is not None), None)
    if name is None:
        raise CameraError(f"{config.name}: the camera has no {' or '.join(names)}", hint="see its manual for the names")
    if _alike(value, nodes.text(name) or ""):  # some cannot be written, and need not
        return
    given = str(int(value)) if isinstance(value, bool) else str(value)
    try:
        nodes.put(name, given)
        found = nodes.text(name) or ""
    except Exception as error:  # each stack raises classes of its own
        words = str(error).split(" : ")[0].splitlines()[0][:160]
        raise CameraError(f"{config.name}: {name} {value} was refused: {words}{nodes.limits(name)}") from error
    if not _alike(value, found):
        raise CameraError(f"{config.name}: {name} is {found}, the configuration sets {value}{nodes.limits(name)}")


def _alike(value: bool | float | str, found: str) -> bool:
    if isinstance(value, bool):
        return found.lower() in (("1", "true") if value else ("0", "false"))
    if isinstance(value, str):
        return found == value
    try:
        return abs(float(found) - value) <= (STEP * max(abs(value), 1.0) if isinstance(value, float) else 0)
    except ValueError:
        return False


def trigger_name(source: str) -> str:
    """`software` is written as one likes, lines and counters as the camera's manual does."""
    return "Software" if source.lower() == "software" else source


def set_trigger(nodes: Nodes, config: CameraConfig, source: str) -> None:
    """Make the camera wait for `source` (`software`, `Line1`), or run free where it is empty."""
    if nodes.text("TriggerMode") is None:
        if source:
            raise CameraError(f"{config.name}: the camera has no trigger", hint="leave ?trigger= out")
        return
    if nodes.text("TriggerSelector") is not None:
        _set(nodes, config, ("TriggerSelector",), "FrameStart")
    if source:
        _set(nodes, config, ("TriggerSource",), trigger_name(source))
    _set(nodes, config, ("TriggerMode",), "On" if source else "Off")


def set_up(nodes: Nodes, config: CameraConfig, trigger: str) -> Info:
    """Set what the configuration sets, and what the camera waits for; returns what was read back. Raises CameraError."""
    apply(nodes, config)
    set_trigger(nodes, config, trigger)
    info = info_from(nodes, config, trigger)
    check_format(config, info)
    return info


def info_from(nodes: Nodes, config: CameraConfig, trigger: str) -> Info:
    """What the camera says it will deliver. Raises CameraError for a pixel format that is not understood."""
    name = nodes.text("PixelFormat") or ""
    try:
        code = code_of(name)
    except StopIteration:
        raise not_understood(config, name) from None
    rate = next((text for alias in _ALIASES["fps"] if (text := nodes.text(alias))), None)
    info = info_of(
        code, int(nodes.text("Width") or 0), int(nodes.text("Height") or 0),
        trigger=trigger, fps=round(float(rate), 3) if rate and not trigger else None,
    )  # fmt: skip
    shown = dict.fromkeys((*_SHOWN, *config.features))
    return replace(info, settings={name: text for name in shown if (text := nodes.text(name)) is not None})
