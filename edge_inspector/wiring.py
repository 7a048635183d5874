"""What the documents of a device say, made: topics, connection, engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edge_inspector import durable, health, preprocess
from edge_inspector.bundles import Bundle, open_bundle
from edge_inspector.config import Device, LineConfig
from edge_inspector.door import Door
from edge_inspector.errors import BrokerError, CameraError, Fault
from edge_inspector.inspector import Inspectors
from edge_inspector.messages import Topics
from edge_inspector.mqtt import Connection, Will, read_password, tls_context
from edge_inspector.outbox import Outbox
from edge_inspector.provenance import Provenance
from edge_inspector.roi import Roi
from edge_inspector.runtime import Engine, Pool, Workshop, opened

MAX_BATCH = 16


@dataclass(frozen=True)
class Setup:
    """What a line judges by: its configuration, and the folders of bundles that were rolled out, by name."""

    line: LineConfig
    releases: Mapping[str, Path]

    @property
    def key(self) -> object:
        """The same for what judges alike."""
        return self.line.reference().hash, self.line.version, tuple(sorted(self.releases.items()))

    def is_same(self, other: Setup) -> bool:
        """Whether nothing has to change."""
        return self.line is other.line and self.releases == other.releases

    def with_release(self, name: str, folder: Path) -> Setup:
        """The same with another release of one bundle."""
        return Setup(self.line, {**self.releases, name: folder})


TellBuild = Callable[[str, str, int, int], None]


def topics_of(device: Device) -> Topics:
    """The topics of a device."""
    identity = device.config.identity
    return Topics(identity.site, identity.line, identity.device)


def client_id(device: Device) -> str:
    """How the device's main connection is called at the broker; the other one has `.handshake` behind it.

    Dots stand between the names where hyphens could be read in two ways (plant-1 and a, plant and 1-a). An installation
    that is called otherwise keeps its name: the broker holds its session, with what was sent to it meanwhile.
    """
    names = topics_of(device).device_path.split("/")
    plain = f"ei-{'-'.join(names)}"
    if "-" not in names[0] + names[1]:
        return plain
    clear = f"ei-{'.'.join(names)}"
    record = device.state / "client-id"
    known = record.read_text() if record.exists() else ""
    if known not in (plain, clear):
        known = plain if (device.state / "outbox.db").exists() and not known else clear
        device.state.mkdir(parents=True, exist_ok=True)
        durable.write(record, known.encode())
    return known


def connection_of(
    device: Device, client_id: str, subscriptions: tuple[str, ...] = (), will: Will | None = None, *, durable: bool = True
) -> Connection:
    """A connection to the device's broker, not entered yet. Raises BrokerError for unreadable credentials."""
    broker = device.config.broker
    tls = None
    if broker.tls is not None:
        tls = tls_context(*(device.path(name) for name in (broker.tls.ca_file, broker.tls.cert_file, broker.tls.key_file)))
    password = read_password(device.path(broker.password_file))
    return Connection(broker, client_id, subscriptions=subscriptions, will=will, password=password, tls=tls, durable=durable)


def door_of(device: Device) -> Door:
    """Which sources the documents of a device may name."""
    broker = device.config.broker
    own = (broker.password_file, broker.tls.key_file if broker.tls is not None else None)
    return Door(
        device.config.sources,
        device.folder,
        password_of=partial(_camera_password, device),
        secrets=frozenset(filter(None, own)),
    )


def _camera_password(device: Device, name: str) -> str:
    try:
        return read_password(device.path(name)) or ""
    except BrokerError as error:
        raise CameraError(f"{name}: no password can be read from it", hint="put the camera's into its first line") from error


def refusals(door: Door, line: LineConfig) -> list[Fault]:
    """What a line configuration names and device.yaml does not list, by its place in the document."""
    faults = []
    for name, station in line.stations.items():
        for camera, config in station.cameras.items():
            try:
                door.judge(config)
            except CameraError as error:
                faults.append(Fault(f"stations.{name}.cameras.{camera}.uri", error.message, "", error.hint))
    return faults


def provenance_of(device: Device, client_id: str, outbox: Outbox, own: Connection) -> Provenance:
    """What asks the broker whether the outbox is the newest copy of itself; `own` is the daemon's own connection."""

    def connect(heads: Sequence[str]) -> Connection:
        return connection_of(device, client_id, tuple(heads), durable=False)

    return Provenance(outbox, topics_of(device), connect, own.connected.is_set, wake=own.wake)


def batch_of(bundle: Bundle, line: LineConfig, runtime: str) -> int:
    """Tiles that go through this bundle's network together.

    On a GPU all of one part, of all its regions, cameras and frames. A CPU gains nothing from that: there those of one region.
    """
    trained, spec = bundle.manifest.training, bundle.manifest.input
    most = 1
    for recipe in line.recipes.values():
        counts = [0]
        for roi in (roi for camera in recipe.cameras.values() for roi in camera.rois.values()):
            if roi.bundle != bundle.manifest.name:
                continue
            # A region without shape is the whole frame: as large as the training pictures, as far as is known here.
            box = roi.box(trained.height_px, trained.width_px) if roi.shape == Roi() else roi.box(65536, 65536)
            size = box[2:] if box is not None else (trained.width_px, trained.height_px)
            counts.append(preprocess.tile_count(spec, *size))
        most = max(most, sum(counts) * recipe.decision.frames if runtime == "tensorrt" else max(counts))
    return min(MAX_BATCH, most)


def workshop_of(device: Device) -> Workshop:
    """Where a device keeps its TensorRT engines."""
    return Workshop(device.state / "engines", device.trust, device.config.engine.threads, health.clock().ok)


def _pooled(device: Device, setup: Setup, pool: Pool, tell: TellBuild, name: str) -> Engine:
    folder = setup.releases.get(name, device.bundles / name)
    bundle = open_bundle(folder, device.trust, clock_ok=health.clock().ok)
    batch_for = partial(batch_of, bundle, setup.line)
    key = bundle.sha256, batch_for(device.config.engine.runtime)
    told = partial(tell, name)
    return pool.engine(key, lambda: opened(bundle, device.config.engine, workshop_of(device), batch_for, told))


def inspectors_of(device: Device, setup: Setup, station: str, pool: Pool, tell: TellBuild) -> Inspectors:
    """What judges the parts of one station: its bundles verified, its engines open (the pool's, where it has them).

    `tell` hears of builds: bundle, phase, step, steps; what it raises ends one. Raises InspectorError.
    """
    return Inspectors.of(setup.line.stations[station], setup.line, partial(_pooled, device, setup, pool, tell))
