"""A stream comes from the host that was listed: FFmpeg follows redirections of RTSP, and cannot be told not to."""

from __future__ import annotations

import os
import socket
import ssl
from contextlib import suppress

from edge_inspector.addresses import Address
from edge_inspector.errors import CameraError

_ANSWER = 4096
_HINT = "list the host that it leads to, and give its address"


def refuse_redirect(address: Address, timeout_s: float) -> None:
    """Ask for the stream as FFmpeg will, and look whether the answer leads elsewhere (RFC 2326, 11.3). Raises CameraError.

    One that does not answer is left to FFmpeg, which says why.
    """
    with suppress(OSError), _connected(address, timeout_s) as connection:
        for number, verb in enumerate(("OPTIONS", "DESCRIBE"), 1):
            connection.sendall(f"{verb} {address.url()} RTSP/1.0\r\nCSeq: {number}\r\n\r\n".encode())
            status = connection.recv(_ANSWER).split(b" ", 2)[1:2]
            if status and status[0].startswith(b"3"):
                raise CameraError(f"{address.told}: leads on to another address, which is not followed", hint=_HINT)


def _connected(address: Address, timeout_s: float) -> socket.socket:
    connection = socket.create_connection((address.host.strip("[]"), address.port), timeout_s)
    connection.settimeout(timeout_s)
    if address.scheme != "rtsps":
        return connection
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing secret is sent here
    return context.wrap_socket(connection)


def refuse_elsewhere(address: Address) -> None:
    """Look whom this process is connected to, once the stream is open. Raises CameraError."""
    known = {found[4][0] for found in socket.getaddrinfo(address.host.strip("[]"), address.port)}
    for name in os.listdir("/proc/self/fd"):
        peer = _peer(int(name))
        if peer and peer not in known:
            raise CameraError(f"{address.told}: led on to another host", hint=_HINT)


def _peer(descriptor: int) -> str:
    """The address at the other end of a descriptor; empty where it is no connection."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            is_internet = connection.family in (socket.AF_INET, socket.AF_INET6)
            return str(connection.getpeername()[0]) if is_internet else ""
    except OSError:
        return ""
