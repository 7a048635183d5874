"""Addresses of cameras, `SCHEME://PLACE?OPTION=VALUE`: taken apart in this one place.

An address may hold a password, so nothing of it is told but scheme, host or place, and the name of a source that
device.yaml lists.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, unquote

from edge_inspector.errors import CameraError

GENICAM = ("aravis", "gige", "u3v", "pylon", "gentl")
STREAMS = ("rtsp", "rtsps", "http", "https")
ALONE = (*GENICAM, "v4l2", "csi")
"""Cameras that only one can use."""
SCHEMES = ("dir", "file", "synthetic", "v4l2", *STREAMS, "gst", "csi", *GENICAM)
WITHHELD = "***"
"""Stands in a report for what is not told of an address; no order may hold it."""
OPTIONS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("dir", "file"), ("fps", "loop")),
    **dict.fromkeys(("aravis", "gige", "u3v", "pylon"), ("trigger",)),
    "gentl": ("producer", "trigger"),
    "synthetic": (
        "width", "height", "fps", "seed", "depth", "grey", "count", "defect_rate", "fault", "after", "isolate",
    ),
}  # fmt: skip
"""What each scheme takes; those of a stream belong to its camera."""
PORTS = {"rtsp": 554, "rtsps": 322, "http": 80, "https": 443}
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ENDPOINT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(?::(?P<port>[0-9]{1,5}))?")
_NUMBER = re.compile(r"[0-9.e+-]*")
_VALUES = {"trigger": re.compile(r"[A-Za-z]+[0-9]*"), "producer": _NAME, "fault": re.compile(r"[a-z]*")}
_AS_IT_IS = "/?&=%:;,+!$'()*~-._[]"
_IN_PASSWORDS = "in a user or password write / as %2F, ? as %3F, @ as %40; or give user and password_file instead"


def scheme_of(uri: str) -> str:
    """What stands before the first colon; not every one is known."""
    return uri.partition(":")[0].lower()


def bare(scheme: str) -> str:
    """All that is told of an address that cannot be taken apart."""
    return f"{scheme}://"


def is_ip(text: str) -> bool:
    """Whether it is an IPv4 or IPv6 address, in brackets or not."""
    try:
        ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Address:
    """A camera's address taken apart. Nothing but `told` may go into a message."""

    scheme: str
    place: str
    """A path, a serial number, a sensor's number, a name; of a stream its path and query, as they go over the wire."""
    told: str
    options: Mapping[str, str] = field(default_factory=dict)
    host: str = ""
    """What is reached over the network, where that is told by address or name."""
    port: int = 0
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, uri: str) -> Address:
        """Take an address apart. Raises CameraError for one that could be read in more than one way."""
        scheme = scheme_of(uri)
        rest = uri.partition(":")[2]
        if scheme == "gst":
            name = rest.strip()
            return cls(scheme, name, f"gst:{name}" if _NAME.fullmatch(name) else "gst")
        if _CONTROL.search(uri):
            raise CameraError(f"{bare(scheme)}: the address holds control characters", hint="write it on one line")
        if "#" in rest:
            raise CameraError(f"{bare(scheme)}: the address holds a #", hint="# must be written %23")
        rest = rest.removeprefix("//")
        return _stream(scheme, rest) if scheme in STREAMS else _local(scheme, rest)

    def number(self, name: str, default: float) -> float:
        """A numeric option. Raises CameraError."""
        text = self.options.get(name, "")
        try:
            return float(text) if text else default
        except ValueError as error:
            raise CameraError(f"{self.told}: option {name} is not a number", hint=f"as in ?{name}=5") from error

    @property
    def strange(self) -> list[str]:
        """Options that mean nothing here."""
        return [] if self.scheme in STREAMS else sorted(set(self.options) - set(OPTIONS.get(self.scheme, ())))

    def refuse_strange(self) -> None:
        """Raise CameraError for an option that means nothing here."""
        if self.strange:
            allowed = ", ".join(OPTIONS.get(self.scheme, ())) or "none"
            raise CameraError(f"{self.told}: an unknown option stands after the ?", hint=f"allowed: {allowed}")

    def url(self, user: str | None = None, password: str | None = None) -> str:
        """A stream's URL, written anew from its parts; with the credentials that are given."""
        who = "" if user is None else f"{quote(user, safe='')}:{quote(password or '', safe='')}@"
        port = "" if self.port == PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{who}{self.host}{port}{self.place}"


def _stream(scheme: str, rest: str) -> Address:
    """`USER:PASSWORD@HOST:PORT/PATH?QUERY`."""
    authority = re.split(r"[/?]", rest, maxsplit=1)[0]
    path = rest[len(authority) :]
    who, at, endpoint = authority.rpartition("@")
    found = _ENDPOINT.fullmatch(endpoint)
    if found is None or "@" in path:
        raise CameraError(f"{bare(scheme)}: the address has no HOST or HOST:PORT that is plain to see", hint=_IN_PASSWORDS)
    host, port = found["host"].lower(), int(found["port"] or PORTS[scheme])
    if not 0 < port < 65536 or (host.startswith("[") and not is_ip(host)):
        raise CameraError(f"{bare(scheme)}: the address has no HOST or HOST:PORT that is plain to see", hint=_IN_PASSWORDS)
    user, _, password = who.partition(":")
    path = quote(path if path.startswith("/") else f"/{path}", safe=_AS_IT_IS)
    credentials = (unquote(user), unquote(password)) if at else (None, None)
    return Address(scheme, path, f"{scheme}://{host}", {}, host, port, *credentials)


def _local(scheme: str, rest: str) -> Address:
    """`PLACE?OPTION=VALUE&...`."""
    written, mark, query = rest.partition("?")
    place, is_path = unquote(written, errors="surrogateescape"), scheme in ("dir", "file", "v4l2")
    if "@" in (written.split("/")[0] if is_path else written):
        raise CameraError(f"{bare(scheme)}: the address has an @, but no user", hint="in a name write @ as %40")
    if _CONTROL.search(place):
        raise CameraError(f"{bare(scheme)}: a % in the address is no character", hint="% must be written %25")
    items = query.split("&") if query or (mark and is_path) else []
    if not all("=" in item for item in items):
        raise CameraError(
            f"{bare(scheme)}: what follows the ? is no option", hint="NAME=VALUE is expected; in a name write ? as %3F"
        )
    options = dict(parse_qsl(query, keep_blank_values=True))
    shown = is_path or scheme in GENICAM or place.isdigit()
    told = f"{scheme}://{written if shown else ''}"
    if scheme == "gentl" and _NAME.fullmatch(options.get("producer", "")):
        told += f"?producer={options['producer']}"
    by_host = scheme == "gige" or (scheme == "aravis" and is_ip(place))
    return Address(scheme, place, told, options, place.lower() if by_host else "")


def told(uri: str) -> str:
    """What messages call a camera with this address."""
    try:
        return Address.of(uri).told
    except CameraError:
        return bare(scheme_of(uri))


def reported(uri: str) -> str:
    """The address in a report of a configuration: whole where nothing in it can be a secret; else WITHHELD stands in it."""
    try:
        address = Address.of(uri)
    except CameraError:
        return f"{bare(scheme_of(uri))}{WITHHELD}"
    if address.scheme in STREAMS:
        return uri if uri == address.told else f"{address.told}/{WITHHELD}"
    if address.scheme == "gst":
        return f"gst:{WITHHELD}" if address.told == "gst" else uri
    return uri if _is_plain(address) else f"{address.told}?{WITHHELD}"


def _is_plain(address: Address) -> bool:
    """Whether it holds nothing but a place and options that are what they should be."""
    is_place = address.scheme != "csi" or address.place.isdigit()
    fits = (_VALUES.get(name, _NUMBER).fullmatch(value) for name, value in address.options.items())
    return is_place and not address.strange and all(fits)


def told_source(source: str) -> str:
    """What messages call the place that a bundle comes from."""
    if source.startswith("/"):
        return source
    return told(source) if scheme_of(source) in STREAMS else "its source"
