"""The two documents of a device: device.yaml (who it is; never remote) and line.yaml (what it inspects)."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

from pydantic import field_validator, model_validator

from edge_inspector.addresses import ALONE, GENICAM, SCHEMES, STREAMS, reported, scheme_of, told
from edge_inspector.door import Sources
from edge_inspector.errors import Fault, InspectorError, SchemaError
from edge_inspector.recipes import Id, Recipe
from edge_inspector.results import ConfigurationRef
from edge_inspector.schema import Field, Model, read_yaml, validate

GENICAM_SETTINGS = ("offset_x", "offset_y", "pixel_format", "exposure_us", "gain_db", "packet_size", "features")
CREDENTIALS = "credentials"
"""Folder of passwords and keys in a device's folder."""
_CREDENTIAL = r"^credentials/[A-Za-z0-9][A-Za-z0-9._-]*$"


class Identity(Model):
    """Where the device stands; the first levels of every topic."""

    site: Id
    line: Id
    device: Id


class Tls(Model):
    """Files for an encrypted connection; a client certificate is optional."""

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None


class BrokerConfig(Model):
    """The MQTT broker."""

    host: str = Field("localhost", min_length=1)
    port: int = Field(1883, ge=1, le=65535)
    protocol: Literal["auto", "5", "3.1.1"] = "auto"
    keepalive_s: int = Field(10, ge=1, le=600)
    username: str | None = None
    password_file: str | None = None
    tls: Tls | None = None


class StorageConfig(Model):
    """Where results and pictures are kept, and how much of them."""

    folder: str | None = Field(
        None, description="none: state, beside device.yaml; for a device.yaml in /etc/edge-inspector/NAME the same in /var/lib"
    )
    results_mb: int = Field(256, ge=4, le=1_000_000)
    evidence_mb: int = Field(256, ge=0, le=1_000_000)
    evidence_passed: float = Field(
        0.01, ge=0, le=1, description="share of passed parts whose frames are kept too, beside those near the threshold"
    )
    evidence_group: str | None = Field(
        None, description="group of this machine that may read the pictures; none: only who runs the daemon"
    )


class EngineConfig(Model):
    """What runs the networks."""

    runtime: Literal["onnxruntime", "tensorrt"] = Field("onnxruntime", description="tensorrt: on the NVIDIA GPU, with PyCUDA")
    precision: Literal["auto", "fp32", "fp16", "int8"] = Field(
        "auto", description="for tensorrt; auto: int8 where a bundle was trained so, else fp16"
    )
    fallback: bool = Field(False, description="where TensorRT cannot be used: ONNX Runtime on the CPU; state says so")
    threads: int = Field(2, ge=1, le=64, description="CPU threads for one network in ONNX Runtime")


class PulseConfig(Model):
    """One line that is pulsed for a verdict."""

    line: int = Field(ge=0, le=1023, description="offset on the chip")
    active_low: bool = False
    pulse_ms: float = Field(100.0, gt=0, le=10_000)
    delay_ms: float = Field(
        0.0, ge=0, le=600_000, description="from the trigger, to where the diverter stands; 0: as soon as it is decided"
    )


class HeartbeatConfig(Model):
    """A line that changes as long as the daemon judges."""

    line: int = Field(ge=0, le=1023)
    period_ms: float = Field(100.0, ge=20, le=2000)


class OutputConfig(Model):
    """Wires of one station."""

    chip: str = Field(min_length=1, description="/dev/gpiochip0, or for trials file:///tmp/lines")
    ok: PulseConfig | None = Field(None, description="for a pass, once its record is on disk")
    reject: PulseConfig | None = Field(None, description="for everything else, at once")
    heartbeat: HeartbeatConfig | None = None

    @property
    def lines(self) -> dict[int, bool]:
        """Number -> whether it is active when low."""
        pulsed = {pulse.line: pulse.active_low for pulse in (self.ok, self.reject) if pulse is not None}
        return pulsed | ({self.heartbeat.line: False} if self.heartbeat is not None else {})

    def early(self, expires_ms: int) -> list[PulseConfig]:
        """Pulses whose part may have passed before its verdict has expired."""
        return [p for p in (self.ok, self.reject) if p is not None and p.delay_ms and p.delay_ms < expires_ms]

    @model_validator(mode="after")
    def _distinct(self) -> OutputConfig:
        given = sum(output is not None for output in (self.ok, self.reject, self.heartbeat))
        if given == 0:
            raise ValueError("one of ok, reject and heartbeat is needed")
        if len(self.lines) < given:
            raise ValueError("ok, reject and heartbeat need a line each")
        return self


CommandName = Literal["select-product", "halt", "start", "self-test"]


class RemoteConfig(Model):
    """What may be changed over MQTT, and by whom."""

    require_signature: bool = Field(
        True, description="orders and commands must be signed by a key of `trust` that has the purpose; false: health says so"
    )
    trust: str = Field("trust", description="folder of public keys (*.pub) whose orders are carried out")
    open_commands: tuple[CommandName, ...] = Field(
        (), max_length=16, description="commands that need no signature: whoever may publish may give them"
    )
    ca_file: str | None = Field(None, description="of servers that bundles are fetched from; none: the system's")


class MetricsConfig(Model):
    """Where Prometheus may scrape this device."""

    port: int = Field(ge=1, le=65535)
    host: str = Field("127.0.0.1", min_length=1, description="nobody is asked for a password: leave it at this machine's own")


class DeviceConfig(Model):
    """device.yaml: identity, broker, storage, trust. Changed on the device only."""

    schema_: Literal["ei.device.v1"] = Field(alias="schema")
    identity: Identity
    broker: BrokerConfig = BrokerConfig()
    storage: StorageConfig = StorageConfig()
    trust: str = Field("trust", description="folder of public keys (*.pub) whose bundles may run")
    bundles: str = Field("bundles", description="folder of bundles")
    line_file: str = "line.yaml"
    engine: EngineConfig = EngineConfig()
    remote: RemoteConfig = RemoteConfig()
    sources: Sources = Field(Sources(), description="what line configurations and orders for bundles may name")
    metrics: MetricsConfig | None = Field(None, description="none: nothing is served")
    outputs: dict[Id, OutputConfig] = Field(default_factory=dict, max_length=32, description="by station")


class Guards(Model):
    """What makes a frame unfit to judge. 0 switches a guard off."""

    dark_below: float = Field(0.0, ge=0, le=65535, description="mean intensity under which a frame is dark")
    frozen_frames: int | None = Field(
        None, ge=0, le=1000, description="identical frames in a row after which a camera is frozen; none: ten of a camera, "
        "10 s and two key frames of a coded stream, and a recording never",
    )  # fmt: skip


class CameraConfig(Model):
    """One camera of a station."""

    uri: str
    user: str | None = Field(None, min_length=1, max_length=256, description="of a stream, instead of one in its uri")
    password_file: str | None = Field(
        None, max_length=256, pattern=_CREDENTIAL, description="its first line is the user's password: credentials/FILE"
    )
    policy: Literal["every", "latest"] = Field(
        "every", description="every: each frame is a part, overflow is counted; latest: older frames are skipped"
    )
    timeout_ms: int = Field(1000, ge=50, le=60_000, description="after which a silent camera is restarted")
    latency_ms: float | None = Field(
        None, ge=0, le=10_000, description="of a camera that runs free while its station is triggered: from exposure to "
        "arrival, at its quickest; a frame nearer to its trigger is not taken. None: a frame period, 300 for rtsp and http",
    )  # fmt: skip
    width: int | None = Field(None, ge=16, le=16384)
    height: int | None = Field(None, ge=16, le=16384)
    fps: float | None = Field(None, gt=0, le=10_000)
    offset_x: int | None = Field(None, ge=0, le=65535, description="of the sensor; GenICam cameras only, as all that follow")
    offset_y: int | None = Field(None, ge=0, le=65535)
    pixel_format: str | None = Field(None, max_length=64, description="as GenICam names it: Mono8, BayerRG12")
    exposure_us: float | None = Field(None, gt=0, le=60_000_000)
    gain_db: float | None = Field(None, ge=-60, le=100)
    packet_size: int | None = Field(None, ge=220, le=16_384, description="GigE; none: the largest that the network carries")
    features: dict[str, bool | int | float | str] = Field(
        default_factory=dict, max_length=64, description="any other GenICam feature, set in this order and read back"
    )
    guards: Guards = Guards()

    @model_validator(mode="after")
    def _genicam_only(self) -> CameraConfig:
        given = [name for name in GENICAM_SETTINGS if getattr(self, name) not in (None, {})]
        if given and scheme_of(self.uri) not in GENICAM:
            raise ValueError(f"{', '.join(given)}: only cameras of {', '.join(f'{s}://' for s in GENICAM)} take these")
        return self

    @model_validator(mode="after")
    def _streams_only(self) -> CameraConfig:
        if self.user is not None and scheme_of(self.uri) not in STREAMS:
            raise ValueError(f"user: only cameras of {', '.join(f'{s}://' for s in STREAMS)} take one")
        if self.password_file is not None and self.user is None:
            raise ValueError("password_file: a user belongs to it")
        return self

    @property
    def name(self) -> str:
        """What messages, which are published, call it: scheme and host, or the name of a listed source."""
        return told(self.uri)

    @field_validator("uri")
    @classmethod
    def _known_scheme(cls, uri: str) -> str:
        if scheme_of(uri) not in SCHEMES:
            known = ", ".join(name + (":" if name == "gst" else "://") for name in SCHEMES)
            raise ValueError(f"camera URI must start with one of {known}")
        return uri


class HardwareTrigger(Model):
    """How images that a sensor on the line fires find their parts."""

    announced: bool = Field(False, description="each part is told over MQTT, with its id; else every edge is a part")
    delay_ms: float = Field(0.0, ge=0, le=60_000, description="from a part's announcement to its image")
    tolerance_ms: float = Field(50.0, gt=0, le=10_000, description="by which that may differ")
    sync_ms: float = Field(10.0, gt=0, le=1000, description="within which cameras expose that one edge fires")
    debounce_ms: float = Field(100.0, ge=0, le=60_000, description="within which a second image is the same part's")

    @model_validator(mode="after")
    def _sound(self) -> HardwareTrigger:
        if self.announced and self.debounce_ms < 2 * self.tolerance_ms:
            raise ValueError("debounce_ms must be at least twice tolerance_ms: else an image may be either of two parts'")
        if self.sync_ms > self.debounce_ms > 0:
            raise ValueError("sync_ms must not be more than debounce_ms")
        return self


class SelfTestConfig(Model):
    """Samples of the station's bundles, judged again while it runs; at its start they always are."""

    every_h: float | None = Field(None, ge=0.001, le=8760, description="repeated so often, between two parts")
    required: bool = Field(True, description="no part is judged while samples fail; false: health says so, and it goes on")


class LimitsConfig(Model):
    """When the parts of a station say together that something has changed; reasons on health, never verdicts."""

    parts: int = Field(200, ge=20, le=2000, description="told from the last so many that were judged")
    max_reject_rate: float = Field(0.2, gt=0, le=1, description="of failed parts, beyond all doubt of so few parts")
    drift: bool = Field(True, description="tell when the median score leaves the middle half of the calibration's good parts")


class StationConfig(Model):
    """One place on the line."""

    trigger: Literal["free", "software", "hardware"] = Field(
        "free", description="free: every frame is a part; software: one part for each trigger over MQTT; "
        "hardware: one for each edge of a sensor that fires the cameras",
    )  # fmt: skip
    hardware: HardwareTrigger = HardwareTrigger()
    self_test: SelfTestConfig = SelfTestConfig()
    limits: LimitsConfig = LimitsConfig()
    in_view_ms: int | None = Field(
        None,
        ge=1,
        le=600_000,
        description="how long after its trigger a part is before the cameras; none: until the next trigger",
    )
    expires_ms: int = Field(1000, ge=1, le=600_000, description="how long after its trigger a verdict is worth something")
    product: Id | None = Field(None, description="product when the trigger names none")
    products: dict[Id, Id] = Field(min_length=1, max_length=256, description="product: recipe")
    cameras: dict[Id, CameraConfig] = Field(min_length=1, max_length=16)


class LineConfig(Model):
    """line.yaml: stations, cameras, recipes. The one document that may be changed remotely."""

    schema_: Literal["ei.line.v1"] = Field(alias="schema")
    version: int = Field(1, ge=1, le=2**53)
    stations: dict[Id, StationConfig] = Field(min_length=1, max_length=32)
    recipes: dict[Id, Recipe] = Field(min_length=1, max_length=256)

    @property
    def bundles(self) -> set[str]:
        """Names of all bundles that its recipes use."""
        return {bundle for recipe in self.recipes.values() for bundle in recipe.bundles}

    def document(self, *, reported_only: bool = False) -> dict[str, Any]:
        """Its JSON values without what is left at its default; `reported_only`: addresses as a report tells them."""
        values: dict[str, Any] = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        for name, station in self.stations.items() if reported_only else ():
            for camera, config in station.cameras.items():
                values["stations"][name]["cameras"][camera]["uri"] = reported(config.uri)
        return values

    def reference(self) -> ConfigurationRef:
        """Its version with the hash of its content."""
        digest = hashlib.sha256(self.model_dump_json(by_alias=True).encode()).hexdigest()[:12]
        return ConfigurationRef(version=self.version, hash=digest)


def _trigger_faults(path: str, trigger: str, uri: str) -> list[Fault]:
    """A camera that waits for something else than its station does would never give an image."""
    if scheme_of(uri) not in GENICAM:
        return []
    found = dict(parse_qsl(uri.partition("?")[2])).get("trigger", "")
    kind = "software" if found.lower() == "software" else "hardware" if found else "free"
    if kind == trigger or (kind == "free" and trigger == "software"):
        return []
    wanted = {"free": "no trigger option", "software": "?trigger=software, or none", "hardware": "?trigger=Line1"}[trigger]
    return [Fault(path, f"waits for {found or 'nothing'}, the station's trigger is {trigger}", "", f"wanted: {wanted}")]


def _station_faults(path: str, station: StationConfig) -> list[Fault]:
    """What in a station does not go together."""
    faults, hardware = [], station.hardware
    if station.product is not None and station.product not in station.products:
        faults.append(Fault(f"{path}.product", "names no product of this station", repr(station.product),
                            f"allowed: {', '.join(station.products)}"))  # fmt: skip
    if station.product is None and station.trigger == "free":
        faults.append(Fault(f"{path}.product", "is required where the trigger is free"))
    if station.trigger == "free" and len(station.cameras) > 1:
        faults.append(Fault(f"{path}.trigger", "free needs a station of one camera; use software for several"))
    wait_ms = hardware.delay_ms + hardware.tolerance_ms
    if station.trigger == "hardware" and hardware.announced and wait_ms >= station.expires_ms:
        problem = f"is over before the image may come, {wait_ms:g} ms after its announcement"
        faults.append(Fault(f"{path}.expires_ms", problem, str(station.expires_ms)))
    for name, camera in station.cameras.items():
        faults += _trigger_faults(f"{path}.cameras.{name}.uri", station.trigger, camera.uri)
        if station.trigger == "hardware" and camera.policy == "latest":
            faults.append(Fault(f"{path}.cameras.{name}.policy", "latest would skip parts: each image is one's"))
    return faults


def _faults(line: LineConfig) -> list[Fault]:
    """What fits each model but not the others: names that lead nowhere."""
    faults, taken = [], dict[str, str]()
    for name, station in line.stations.items():
        path = f"stations.{name}"
        faults += _station_faults(path, station)
        for camera_name, camera in station.cameras.items():
            here, place = f"{path}.cameras.{camera_name}", camera.uri.split("?")[0]
            if scheme_of(camera.uri) in ALONE and taken.setdefault(place, here) != here:
                faults.append(
                    Fault(f"{here}.uri", f"is the camera of {taken[place]}", "", "each camera belongs to one station")
                )
        for product, identity in station.products.items():
            recipe = line.recipes.get(identity)
            if recipe is None:
                faults.append(Fault(f"{path}.products.{product}", "names no recipe", repr(identity),
                                    f"allowed: {', '.join(line.recipes)}"))  # fmt: skip
                continue
            if station.trigger == "hardware" and recipe.decision.frames > 1:
                faults.append(Fault(f"recipes.{identity}.decision.frames", f"station {name} has one image of each part"))
            for absent in sorted(set(recipe.cameras) - set(station.cameras)):
                faults.append(Fault(f"recipes.{identity}.cameras.{absent}", f"station {name} has no such camera", "",
                                    f"allowed: {', '.join(station.cameras)}"))  # fmt: skip
    return faults


def parse_line(data: object, source: str) -> LineConfig:
    """Plain values (of YAML or JSON) -> LineConfig. Raises SchemaError with every fault."""
    line = validate(LineConfig, data, source)
    faults = _faults(line)
    if faults:
        raise SchemaError(source, faults)
    return line


def read_document(path: Path, hint: str = "write a first one: edge-inspector init") -> bytes:
    """The bytes of device.yaml or line.yaml. Raises InspectorError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InspectorError(f"{path}: {error.strerror}", hint=hint) from error


def load_line(path: Path) -> LineConfig:
    """Read line.yaml. Raises SchemaError, or InspectorError when it cannot be read."""
    return parse_line(read_yaml(read_document(path), str(path)), str(path))


def _state_folder(folder: Path, named: str | None) -> Path:
    """Nothing is written below /etc: what lies there keeps its state at the same place below /var/lib (hier(7))."""
    if named is None and Path("/etc") in folder.parents:
        return Path("/var/lib") / folder.relative_to("/etc")
    return folder / (named or "state")


class Device:
    """A device.yaml with its paths resolved against the folder it lies in."""

    def __init__(self, config: DeviceConfig, folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.state = _state_folder(folder, config.storage.folder)
        self.trust = folder / config.trust
        self.bundles = folder / config.bundles
        self.line_file = folder / config.line_file

    @property
    def camera_folders(self) -> Path:
        """Where each camera's process has its own folder."""
        return self.state / "cameras"

    @property
    def cache(self) -> Path:
        """What cameras' libraries find out once, so that they need not at every start."""
        return Path(os.environ.get("XDG_CACHE_HOME") or self.state / "cache")

    def path(self, name: str | None) -> Path | None:
        """A path that the document names, or None. What lies in `credentials/` systemd hands over in a folder of its own."""
        if name is None:
            return None
        handed = os.environ.get("CREDENTIALS_DIRECTORY")
        if handed and Path(name).parent == Path(CREDENTIALS):
            return Path(handed) / f"{CREDENTIALS}_{Path(name).name}"
        return self.folder / name


def load_device(path: Path) -> Device:
    """Read device.yaml. Raises SchemaError, or InspectorError when it cannot be read."""
    return Device(validate(DeviceConfig, read_yaml(read_document(path), str(path)), str(path)), path.resolve().parent)
