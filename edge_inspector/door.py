"""The one door: which sources a document may name. device.yaml lists them, and no message reaches device.yaml.

line.yaml, remote line configurations and orders for bundles all come through here, and so does every camera when it is opened.
What is not listed is refused with the very lines that would list it.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import field_validator

from edge_inspector import confinement
from edge_inspector.addresses import STREAMS, Address, is_ip, scheme_of
from edge_inspector.errors import BundleError, CameraError
from edge_inspector.recipes import Id
from edge_inspector.schema import Field, Model, flow

_HOST_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")
_MERGE = "in device.yaml, beside what stands there under sources:; then start anew"
_VIDEO = re.compile(r"/dev/video[0-9]+")
_VIDEO_MAJOR = 81


class Sources(Model):
    """What documents may name as a source of images or bundles, beside what needs no listing."""

    folders: tuple[str, ...] = Field(
        (), max_length=256, description="of dir:// and file://, and of bundles; a link that leads out of them is refused"
    )
    hosts: tuple[str, ...] = Field(
        (), max_length=1024, description="of streams, gige:// and bundles: addresses, networks (10.1.0.0/24), or DNS names, "
        "which may lead wherever their servers say",
    )  # fmt: skip
    gst: dict[Id, str] = Field(default_factory=dict, max_length=64, description="GStreamer pipelines, for gst:NAME")
    gentl: dict[Id, str] = Field(
        default_factory=dict, max_length=64, description="GenTL producers (*.cti), for gentl://SERIAL?producer=NAME"
    )
    unconfined: bool = Field(
        False, description="pipelines and producers may run where the kernel cannot confine what they write"
    )

    @field_validator("hosts")
    @classmethod
    def _plain(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            try:
                ipaddress.ip_network(host)
            except ValueError as error:
                if "host bits" in str(error):
                    raise ValueError(f"{ipaddress.ip_network(host, strict=False)} is the network of {host}") from None
                if not _HOST_NAME.fullmatch(host.lower()):
                    raise ValueError("an address, a network as 10.1.0.0/24, or a name is expected") from None
        return hosts

    def lists(self, host: str) -> bool:
        """Whether a host may be reached: by address, or by this very name."""
        if is_ip(host):
            found = ipaddress.ip_address(host.strip("[]"))
            return any(found in network for network in self._networks)
        return host.lower().rstrip(".") in {name.lower().rstrip(".") for name in self.hosts}

    @property
    def _networks(self) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
        return [ipaddress.ip_network(host) for host in self.hosts if is_ip(host.partition("/")[0])]


class Asked(Protocol):
    """What the door needs of a camera's configuration."""

    @property
    def uri(self) -> str:
        """Its address."""
        ...

    @property
    def user(self) -> str | None:
        """For a stream."""
        ...

    @property
    def password_file(self) -> str | None:
        """For a stream, in `credentials/`."""
        ...


@dataclass(frozen=True)
class Admitted:
    """An address that may be opened, with all that device.yaml and its folder say of it."""

    address: Address
    path: Path = Path()
    """Of dir, file and v4l2 what links lead to; of gentl the producer."""
    roots: tuple[Path, ...] = ()
    """The listed folders: what lies elsewhere is not read."""
    pipeline: str = ""
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)

    def refuse_outside(self, path: Path) -> Path:
        """What a path leads to. Raises CameraError where that lies in no listed folder."""
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(root) for root in self.roots):
            raise CameraError(f"{path}: a link that leads out of the listed folders", hint="list the folder that it leads to")
        return real


Admit = Callable[[Asked], Admitted]


class NotListed(CameraError):
    """What must be listed in device.yaml before a document may name it."""

    def __init__(self, told: str, what: str, lines: dict[str, Any], *, uri: str = "") -> None:
        written = f", and write uri: {uri} in line.yaml" if uri else ""
        super().__init__(f"{told}: {what}; add sources: {flow(lines)}{written}", hint=_MERGE)


class Door:
    """Says what may be opened. Nothing that is not listed is looked at, so that no answer tells whether it is there."""

    def __init__(
        self, sources: Sources, folder: Path, *, password_of: Callable[[str], str] | None = None,
        secrets: frozenset[str] = frozenset(),
    ) -> None:  # fmt: skip
        """`folder`: where device.yaml lies. `password_of` reads a password file; `secrets`: those that no camera is sent."""
        self.sources, self.folder = sources, folder
        self._password_of, self._secrets = password_of, secrets

    def admit(self, asked: Asked) -> Admitted:
        """A camera, ready to be opened. Raises NotListed, or CameraError for an address that is none."""
        admitted = self.judge(asked)
        address = admitted.address
        if asked.user is None:
            return admitted
        password = self._password_of(asked.password_file) if self._password_of and asked.password_file else ""
        return Admitted(address, admitted.path, admitted.roots, admitted.pipeline, asked.user, password)

    def judge(self, asked: Asked) -> Admitted:
        """The same, without reading a password."""
        address = Address.of(asked.uri)
        if asked.user is not None and address.user is not None:
            raise CameraError(f"{address.told}: a user stands in the address and beside it", hint="take one away")
        if asked.password_file in self._secrets:
            raise CameraError(f"{address.told}: its password_file is not for cameras", hint="give it a file of its own")
        if address.scheme == "gst":
            return self._pipeline(address)
        if address.scheme == "gentl":
            return self._producer(address)
        address.refuse_strange()
        if address.scheme in ("dir", "file"):
            return self._folder(address)
        if address.scheme == "v4l2":
            return _video(address)
        if address.host and not self.sources.lists(address.host):
            raise NotListed(address.told, "its host is not listed", {"hosts": [address.host.strip("[]")]})
        return Admitted(address, user=address.user, password=address.password)

    def judge_bundle(self, source: str) -> str:
        """Where a bundle may come from, an https address or an absolute path; returns it, a path with its links followed.

        Raises BundleError.
        """
        try:
            if source.startswith("/"):
                return str(self._folder(Address("dir", source, source)).path)
            address = Address.of(source)
            if address.scheme != "https" or address.user is not None:
                raise CameraError(
                    "the source of a bundle: neither https://SERVER/FOLDER nor an absolute path",
                    hint="https://server/bundles/lid/7",
                )
            if not self.sources.lists(address.host):
                raise NotListed(address.told, "its host is not listed", {"hosts": [address.host.strip("[]")]})
        except CameraError as error:
            raise BundleError(error.message, hint=error.hint) from error
        return source

    def _folder(self, address: Address) -> Admitted:
        place = Path(os.path.normpath(self.folder / address.place))
        listed = [Path(os.path.normpath(self.folder / name)) for name in self.sources.folders]
        roots = tuple(Path(os.path.realpath(one)) for one in listed)
        if not any(place.is_relative_to(one) for one in (*listed, *roots)):
            raise NotListed(address.told, "its folder is not listed", {"folders": [_folder_of(address)]})
        admitted = Admitted(address, place, roots)
        return Admitted(address, admitted.refuse_outside(place), roots)

    def _pipeline(self, address: Address) -> Admitted:
        pipeline = self.sources.gst.get(address.place)
        if pipeline is None:
            name = address.place if address.told != "gst" else "name"
            raise NotListed(
                address.told, "a pipeline stands in device.yaml under a name, which line.yaml gives",
                {"gst": {name: "PIPELINE"}}, uri=f"gst:{name}",
            )  # fmt: skip
        self._refuse_unconfined(address, f"pipeline {address.place}")
        return Admitted(address, pipeline=pipeline)

    def _producer(self, address: Address) -> Admitted:
        file = self.sources.gentl.get(address.options.get("producer", ""))
        if file is None:
            raise NotListed(
                address.told, "a producer stands in device.yaml under a name, which line.yaml gives",
                {"gentl": {"name": address.options.get("cti") or "FILE.cti"}}, uri=f"gentl://{address.place}?producer=name",
            )  # fmt: skip
        address.refuse_strange()
        self._refuse_unconfined(address, f"producer {address.options['producer']}")
        return Admitted(address, self.folder / file)

    def _refuse_unconfined(self, address: Address, what: str) -> None:
        if not confinement.version() and not self.sources.unconfined:
            why = f"{what} cannot be confined: {confinement.MISSING}; to run it all the same"
            raise NotListed(address.told, why, {"unconfined": True})


def _video(address: Address) -> Admitted:
    """A device node of a V4L2 camera: opening another kind of node may do anything."""
    place = os.path.normpath(address.place)
    real = os.path.realpath(place) if place.startswith("/dev/") else place
    if not _VIDEO.fullmatch(real) or not _may_be_video(Path(real)):
        raise CameraError(f"{address.told}: no V4L2 camera", hint="edge-inspector cameras lists them: v4l2:///dev/video0")
    return Admitted(address, Path(real))


def _may_be_video(path: Path) -> bool:
    """One that is not there may be plugged in yet."""
    try:
        found = path.stat()
    except OSError:
        return True
    return stat.S_ISCHR(found.st_mode) and os.major(found.st_rdev) == _VIDEO_MAJOR


def _folder_of(address: Address) -> str:
    """What must be listed: a folder of pictures itself, of a video the one that it lies in."""
    return str(Path(address.place).parent) if address.scheme == "file" else address.place


@dataclass(frozen=True)
class Listing:
    """What must stand in device.yaml for an address, and how it must be written then."""

    sources: Sources
    uri: str


def listing(uri: str, name: str) -> Listing:
    """What lists this address; a pipeline or a producer as `name`. Raises CameraError for an address that is none."""
    scheme, rest = scheme_of(uri), uri.partition(":")[2].strip()
    if scheme == "gst":
        return Listing(Sources(gst={name: rest}), f"gst:{name}")
    address = Address.of(uri)
    if scheme == "gentl" and address.options.get("cti"):
        trigger = f"&trigger={address.options['trigger']}" if "trigger" in address.options else ""
        found = Sources(gentl={name: address.options["cti"]})
        return Listing(found, f"gentl://{address.place}?producer={name}{trigger}")
    if scheme in ("dir", "file"):
        return Listing(Sources(folders=(_folder_of(address),)), uri)
    needs_host = scheme in STREAMS or bool(address.host)
    return Listing(Sources(hosts=(address.host.strip("[]"),) if needs_host else ()), uri)


@dataclass(frozen=True)
class _Typed:
    """An address as it is admitted when a person has typed it."""

    uri: str
    user: str | None
    password_file: str | None


def typed(folder: Path) -> Admit:
    """For whoever types an address at the shell: who may do that may open it anyway, so that it is listed by being typed."""

    def admit(asked: Asked) -> Admitted:
        found = listing(asked.uri, "typed")
        sources = found.sources.model_copy(update={"unconfined": True})
        return Door(sources, folder).admit(_Typed(found.uri, asked.user, asked.password_file))

    return admit
