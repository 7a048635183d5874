"""What a client shows the broker: password, certificates."""

from __future__ import annotations

import ssl
from pathlib import Path

from edge_inspector.errors import BrokerError

_HINT = "put the broker's password in its first line, as UTF-8"


def read_password(path: Path | None) -> str | None:
    """The first line of a password file; a byte order mark before it is left out. Raises BrokerError."""
    if path is None:
        return None
    try:
        first = path.read_text("utf-8-sig").partition("\n")[0].removesuffix("\r")
    except UnicodeDecodeError as error:
        what = "UTF-16" if path.read_bytes()[:2] in (b"\xff\xfe", b"\xfe\xff") else "not UTF-8 text"
        raise BrokerError(f"{path}: no password to read: it is {what}", hint=_HINT) from error
    except OSError as error:
        raise BrokerError(f"{path}: no password to read: {error.strerror}", hint=_HINT) from error
    if not first:
        raise BrokerError(f"{path}: no password to read: its first line is empty", hint=_HINT)
    return first


def blanks_of(password: str | None) -> str:
    """What is odd at the ends of a password; it is sent as it stands. Empty: nothing is."""
    if password is None or password == password.strip():
        return ""
    where = [side for side, end in (("begins", password[0]), ("ends", password[-1])) if end.isspace()]
    return f"its first line {' and '.join(where)} with a blank, which is sent as part of the password"


def tls_context(ca: Path | None, cert: Path | None, key: Path | None) -> ssl.SSLContext:
    """TLS as the configuration says. Raises BrokerError."""
    try:
        context = ssl.create_default_context(cafile=str(ca) if ca else None)
        if cert:
            context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        named = ", ".join(str(path) for path in (ca, cert, key) if path is not None)
        raise BrokerError(f"TLS files {named}: {error}", hint="check the paths under broker.tls") from error
    return context
