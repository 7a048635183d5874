"""Network cameras that send JPEGs over HTTP: `http://`, `https://`. Each picture is decoded strictly.

FFmpeg conceals what is missing of a truncated picture and delivers it as a whole one; here such a picture is a broken frame,
whose part is undecided. Format: multipart/x-mixed-replace (RFC 2046, 5.1); Content-Length is used where a camera sends it.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import time
import urllib.error
import urllib.request
from email.message import Message
from typing import IO, cast

from edge_inspector import pictures
from edge_inspector.cameras.folder import broken_frame
from edge_inspector.cameras.source import Info, check_format, moment
from edge_inspector.config import CameraConfig
from edge_inspector.door import Admit, Admitted
from edge_inspector.errors import CameraError, PictureError
from edge_inspector.frames import Frame, frozen

MAX_BYTES = 64 << 20
"""Of one picture."""
_MAX_LINE = 65536
_MAX_BETWEEN = 256
"""Bytes of a boundary and headers, which some cameras send before their picture is there."""
_LEADS_ON = (301, 302, 303, 307, 308)
_HINT = "is it the address of the camera's MJPEG stream? open it in a browser"


class MjpegSource:
    """Source protocol for a stream of JPEGs. Run in a child process, as every camera of a network is."""

    def __init__(self, config: CameraConfig, admit: Admit) -> None:
        self.config, self._admit = config, admit
        self._response: http.client.HTTPResponse | None = None
        self._boundary = b""
        self._carried = b""
        """A boundary that ended a picture of unknown length."""
        self._seq, self._live_s = 0, 0.0

    def open(self) -> Info:
        """Connect and take the first picture. Raises CameraError."""
        timeout_s, admitted = self.config.timeout_ms / 1000, self._admit(self.config)
        try:
            found = _opener(admitted).open(admitted.address.url(), timeout=timeout_s)
            self._response = cast("http.client.HTTPResponse", found)
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
            raise CameraError(f"{self.config.name}: cannot be opened: {_reason(error)}", hint=_HINT) from error
        kind = self._response.headers
        boundary = kind.get_param("boundary")
        if kind.get_content_type() != "multipart/x-mixed-replace" or not isinstance(boundary, str):
            raise CameraError(f"{self.config.name}: sends {kind.get_content_type()}, no stream of JPEGs", hint=_HINT)
        self._boundary = b"--" + boundary.removeprefix("--").encode()
        first = self.read(timeout_s)
        if first is None or first.fault:
            detail = first.fault_detail if first else "no picture in time"
            raise CameraError(f"{self.config.name}: opened, but its first picture is not whole: {detail}", hint=_HINT)
        height, width = first.image.shape[:2]
        info = Info(width, height, 1 if first.image.ndim == 2 else 3, 8)
        check_format(self.config, info)
        return info

    def read(self, timeout_s: float) -> Frame | None:  # noqa: ARG002 - the socket has the camera's own timeout
        """The next picture; one that is not whole is a broken frame. Raises CameraError when the stream stops."""
        try:
            data = self._part()
        except TimeoutError as error:
            raise CameraError(
                f"{self.config.name}: silent for {self.config.timeout_ms} ms", hint="is it still powered?"
            ) from error
        except (http.client.HTTPException, OSError, ValueError) as error:
            raise CameraError(f"{self.config.name}: the stream broke: {error}", hint="did the camera restart?") from error
        seq, self._seq = self._seq, self._seq + 1
        if not self._is_behind():
            self._live_s = time.monotonic()
        captured_s = self._live_s
        try:
            if data[:2] != b"\xff\xd8":
                raise PictureError("not a JPEG")
            return Frame(frozen(pictures.decode(data, "picture")), seq, captured_s, moment(captured_s))
        except PictureError as error:
            return broken_frame(seq, "", error.message)

    def _is_behind(self) -> bool:
        """Whether a later picture waits already: then this one is old, and is dated as the last timely one."""
        response = self._response
        connection: socket.socket | None = getattr(getattr(getattr(response, "fp", None), "raw", None), "_sock", None)
        if response is None or connection is None:
            return False
        connection.settimeout(0.0)
        try:
            waiting = len(response.fp.peek(_MAX_BETWEEN))
            if waiting <= _MAX_BETWEEN and not isinstance(connection, ssl.SSLSocket):
                waiting += len(connection.recv(_MAX_LINE, socket.MSG_PEEK))
        except OSError:  # nothing more
            return False
        finally:
            connection.settimeout(self.config.timeout_ms / 1000)
        return waiting > _MAX_BETWEEN

    def _part(self) -> bytes:
        """Bytes of the next part. Raises ValueError where the stream is none, OSError where it ends."""
        response = self._response
        if response is None:
            raise OSError("not open")
        while not self._line(response).startswith(self._boundary):
            pass
        headers: Message = http.client.parse_headers(response)
        length = headers.get("Content-Length", "").strip()
        if length:
            if not length.isdigit() or int(length) > MAX_BYTES:
                raise ValueError(f"a picture of {length[:20]} bytes")
            data = response.read(int(length))
            if len(data) < int(length):
                raise OSError("it ended inside a picture")
            return data
        collected: list[bytes] = []
        size = 0
        while True:  # the boundary tells the end; it stays unread for the next picture where it can
            line = self._line(response)
            if line.startswith(self._boundary):
                self._carried = line
                return b"".join(collected).removesuffix(b"\n").removesuffix(b"\r")
            collected.append(line)
            size += len(line)
            if size > MAX_BYTES:
                raise ValueError(f"a picture of more than {MAX_BYTES} bytes")

    def _line(self, response: http.client.HTTPResponse) -> bytes:
        line, self._carried = self._carried or response.readline(_MAX_LINE), b""
        if not line:
            raise OSError("it ended")
        return line

    def trigger(self) -> None:
        """These cameras run free."""
        raise CameraError(f"{self.config.name}: cannot be triggered")

    def close(self) -> None:
        """Close the connection."""
        if self._response is not None:
            self._response.close()
            self._response = None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """What was listed is asked, and nobody else."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        """An answer that leads on is an error."""


def _reason(error: Exception) -> str:
    """In our words where the camera answered: its own are nobody's business."""
    if not isinstance(error, urllib.error.HTTPError):
        return str(error)
    if error.code in _LEADS_ON:
        return f"{error.code}: leads on to another address, which is not followed"
    return f"{error.code} {http.client.responses.get(error.code, '')}".strip()


def _opener(admitted: Admitted) -> urllib.request.OpenerDirector:
    """Opens an address without proxies and redirections, with the user and password that the camera has."""
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({}), _NoRedirect()]
    if admitted.user is not None:
        known = urllib.request.HTTPPasswordMgrWithDefaultRealm()
        known.add_password(None, admitted.address.url(), admitted.user, admitted.password or "")
        handlers += [urllib.request.HTTPBasicAuthHandler(known), urllib.request.HTTPDigestAuthHandler(known)]
    return urllib.request.build_opener(*handlers)
