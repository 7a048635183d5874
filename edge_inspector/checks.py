"""What `check` asks of a configuration and `doctor` of a machine. Each answer says what to do."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_inspector import confinement, health, messages, outputs, rehearsal
from edge_inspector.access import access_of
from edge_inspector.broker import Broker
from edge_inspector.bundles import Bundle, in_folder, open_bundle
from edge_inspector.config import BrokerConfig, Device, LineConfig, load_device, load_line
from edge_inspector.door import Listing, Sources, listing
from edge_inspector.errors import CameraError, InspectorError
from edge_inspector.frames import Pixels
from edge_inspector.handshake import Handshake
from edge_inspector.installation import install
from edge_inspector.messages import Reply
from edge_inspector.mqtt import Probed, blanks_of, read_password, tls_context, tried
from edge_inspector.remote.authority import trust_of
from edge_inspector.replay import setup_in_force
from edge_inspector.results import MAX_RESULT_BYTES
from edge_inspector.schema import block
from edge_inspector.scoring import NEXT_TO_NOTHING
from edge_inspector.signatures import ORDERS
from edge_inspector.wiring import door_of, topics_of

if TYPE_CHECKING:
    from edge_inspector.cameras import Info, Source

_CV2_HINT = "on a bare server: apt install libgl1 libglib2.0-0, or pip install opencv-python-headless instead"
_FIRST_FRAME_S = 5.0
_HEADERS = 256
"""Of a message, beside its payload, at most."""


@dataclass(frozen=True)
class Finding:
    """One answer."""

    thing: str
    ok: bool
    text: str
    hint: str = ""
    needed: bool = True


def _faulty(thing: str, error: InspectorError) -> Finding:
    return Finding(thing, False, error.message, error.hint)


def check_device(config: Path) -> list[Finding]:
    """Everything that device.yaml and line.yaml name, tried for real; every fault is told."""
    try:
        device = load_device(config)
    except InspectorError as error:
        return [_faulty(str(config), error)]
    findings = [Finding(str(config), True, "valid"), *_broker(device), *_orders(device), *_rehearsed(device)]
    try:
        line = load_line(device.line_file)
    except InspectorError as error:
        return [*findings, _faulty(str(device.line_file), error)]
    findings.append(Finding(str(device.line_file), True, f"valid, version {line.version}"))
    findings += _walls(line)
    bundles: dict[str, Bundle] = {}
    for name in sorted(line.bundles):
        findings.append(_bundle(device, name, bundles))
    findings += _cameras(device, line, bundles)
    findings += _outputs(device, line)
    findings += _evidence_group(device)
    return findings


def _evidence_group(device: Device) -> Iterator[Finding]:
    group = device.config.storage.evidence_group
    if group is None:
        return
    try:
        access_of(group)
        yield Finding("evidence", True, f"can be read by the group {group}")
    except InspectorError as error:
        yield _faulty("evidence", error)


def _rehearsed(device: Device) -> Iterator[Finding]:
    """What the daemon takes at its start; of one that runs, nothing is taken away."""
    metrics, runs = device.config.metrics, rehearsal.is_running(device)
    yield _tried(f"state {device.state}", partial(rehearsal.state_written, device.state))
    if metrics is not None and not runs:
        thing = f"metrics port {metrics.port}"
        yield _tried(thing, partial(rehearsal.metrics_served, metrics))
    yield _tried("engine", partial(rehearsal.engine_run, device.config.engine))


def _tried(thing: str, work: Callable[[], str]) -> Finding:
    try:
        return Finding(thing, True, work())
    except InspectorError as error:
        return _faulty(thing, error)


def _broker(device: Device) -> Iterator[Finding]:
    """Connect, subscribe and publish as the daemon will, and say what the broker does not do."""
    broker = device.config.broker
    thing = f"broker {broker.host}:{broker.port}"
    topics, tls = topics_of(device), broker.tls
    reply = messages.encode(Reply(request_id="check", ok=True))
    try:
        password = read_password(device.path(broker.password_file))
        if blanks := blanks_of(password):
            hint = "take the blank away, unless the password has it"
            yield Finding(f"password {broker.password_file}", True, blanks, hint)
        context = None
        if tls is not None:
            context = tls_context(*(device.path(name) for name in (tls.ca_file, tls.cert_file, tls.key_file)))
        probed = tried(
            broker, password=password, tls=context, publication=(topics.of("reply", "check"), reply),
            subscriptions=(*Handshake.subscriptions(topics), *Broker.subscriptions(topics)),
        )  # fmt: skip
    except InspectorError as error:
        yield _faulty(thing, error)
        return
    yield Finding(thing, True, f"answers, {probed.told}")
    yield from _lacking(thing, probed)


def _lacking(thing: str, probed: Probed) -> Iterator[Finding]:
    """What the daemon needs of a broker, and does not get."""
    rights = "may this user do so? The broker's access list says it"
    refused = "; ".join(f"{topic}: {why}" for topic, why in probed.unheard.items())
    if refused:
        yield Finding(thing, False, f"refuses to deliver {refused}", rights)
    if probed.refused:
        yield Finding(thing, False, f"does not take what is published: {probed.refused}", rights)
    for lack in probed.limits.lacks():
        yield Finding(thing, False, lack, "change the broker's settings: edge-inspector works with it, with this lack")
    if probed.limits.packet_bytes < MAX_RESULT_BYTES + _HEADERS:
        text = f"takes packets of at most {probed.limits.packet_bytes} bytes: larger results are shortened, or left out"
        yield Finding(thing, False, text, "raise its limit (Mosquitto: max_packet_size)")


def _orders(device: Device) -> Iterator[Finding]:
    """Who may change this device from afar."""
    thing, trust = "remote orders", trust_of(device)
    if trust is None:
        text = "not signed: whoever may publish at the broker changes this line and commands it"
        yield Finding(thing, True, text, "leave remote.require_signature out of device.yaml")
        return
    try:
        keys = trust.keys()
    except InspectorError as error:
        yield _faulty(thing, error)
        return
    signers = {key: found for key, found in keys.items() if found.purposes & set(ORDERS)}
    told = [f"key {key}: {', '.join(p for p in ORDERS if p in found.purposes)}" for key, found in signers.items()]
    opened = ", ".join(device.config.remote.open_commands)
    text = "; ".join([*told, *([f"open to all: {opened}"] if opened else [])])
    hint = f"edge-inspector keygen keys/orders.key --trust {trust.folder} --purposes {','.join(ORDERS)}"
    yield Finding(thing, True, text or "no key signs them: nothing is changed from afar", "" if told else hint)
    for key, found in keys.items():
        if found.unmarked and trust.folder.resolve() == device.trust.resolve() and "configuration" in found.purposes:
            hint = "a line above the key in its .pub file says what it is for: purposes: bundle, configuration, confirm"
            yield Finding(f"key {key}", True, "signs bundles and orders, as it always has", hint)


def _bundle(device: Device, name: str, bundles: dict[str, Bundle]) -> Finding:
    from edge_inspector.runtime import OnnxEngine, judge_samples  # noqa: PLC0415 - loads ONNX Runtime

    thing = f"bundle {name}"
    try:
        bundle = open_bundle(device.bundles / name, device.trust, clock_ok=health.clock().ok)
        with OnnxEngine(bundle, threads=device.config.engine.threads) as engine:
            judge_samples(engine)
    except InspectorError as error:
        known = ", ".join(in_folder(device.bundles)) or "none"
        return Finding(thing, False, error.message, f"{error.hint}; bundles in {device.bundles}: {known}")
    bundles[name] = bundle
    manifest = bundle.manifest
    text = (
        f"release {manifest.release}, key {bundle.key_id}, its {len(manifest.samples)} samples judged right; "
        f"{manifest.rates_said}"
    )
    found = manifest.rates.found if manifest.rates is not None else None
    if found is not None and found < NEXT_TO_NOTHING:
        return Finding(thing, False, f"finds next to nothing: {text}", "train with more good pictures, or a larger --expected")
    return Finding(thing, True, text)


def _walls(line: LineConfig) -> Iterator[Finding]:
    """What the kernel does not do for cameras' processes; nothing where all is well."""
    from edge_inspector.cameras import is_isolated  # noqa: PLC0415 - loads OpenCV

    isolated = any(is_isolated(camera) for station in line.stations.values() for camera in station.cameras.values())
    if isolated and not confinement.version():
        yield Finding("cameras' processes", True, f"are not confined: {confinement.MISSING}")


def _cameras(device: Device, line: LineConfig, bundles: dict[str, Bundle]) -> Iterator[Finding]:
    from edge_inspector.cameras import open_source  # noqa: PLC0415 - loads OpenCV

    door = door_of(device)
    for station_name, station in line.stations.items():
        for name, camera in station.cameras.items():
            thing = f"camera {station_name}/{name}"
            source = open_source(camera, door.admit)
            try:
                info = source.open()
                image = _looked(source, info, camera.name)
                words = "; it waits for its line, so no image was tried" if info.waits else ""
                yield Finding(thing, True, "; ".join([f"{camera.name}: {info}{words}", *info.notes]))
            except InspectorError as error:
                yield _faulty(thing, error)
                continue
            finally:
                source.close()
            for recipe_id in dict.fromkeys(station.products.values()):
                yield from _recipe(line, recipe_id, name, image, bundles)


def sources_section(config: Path) -> str:
    """The section `sources` of device.yaml with all that the line in force names, as YAML. Raises InspectorError.

    Pipelines and producers get the names of their cameras; how line.yaml must give these stands in comments.
    """
    device = load_device(config)
    door, found = door_of(device), device.config.sources.model_dump(exclude_defaults=True, mode="json")
    comments = []
    for station_name, station in setup_in_force(device).line.stations.items():
        for name, camera in station.cameras.items():
            try:
                door.judge(camera)
            except CameraError as error:
                needed = _listed(camera.uri, f"{station_name}-{name}", error)
                _merge(found, needed.sources)
                if needed.uri != camera.uri:
                    comments.append(f"# stations.{station_name}.cameras.{name}.uri: {needed.uri}\n")
    if comments:
        comments.insert(0, "# and in line.yaml, or in what is sent by edge-inspector remote set:\n")
    return block({"sources": found}) + "".join(comments)


def _listed(uri: str, name: str, refusal: CameraError) -> Listing:
    """What lists a camera that the door refuses; where nothing does, its refusal is raised."""
    needed = listing(uri, name)
    if needed.sources == Sources():
        raise refusal
    return needed


def _merge(found: dict[str, Any], more: Sources) -> None:
    for key, value in more.model_dump(exclude_defaults=True, mode="json").items():
        if isinstance(value, dict):
            found.setdefault(key, {}).update(value)
        else:
            found.setdefault(key, []).extend(one for one in value if one not in found.get(key, []))


def _looked(source: Source, info: Info, name: str) -> Pixels:
    """A first image; of a camera that waits for its line, a blank one of its format. Raises CameraError."""
    if info.waits:
        shape = (info.height, info.width) if info.channels == 1 else (info.height, info.width, info.channels)
        return np.zeros(shape, np.uint8 if info.depth_bits == 8 else np.uint16)
    if info.triggerable:
        source.trigger()
    frame = source.read(_FIRST_FRAME_S)
    if frame is None:
        raise CameraError(f"{name}: opened, but gave no frame in {_FIRST_FRAME_S:g} s")
    if frame.fault:
        raise CameraError(f"{name}: first frame: {frame.fault_detail}")
    return frame.image


def _outputs(device: Device, line: LineConfig) -> Iterator[Finding]:
    for name, config in device.config.outputs.items():
        thing = f"outputs {name}"
        station = line.stations.get(name)
        if station is None:
            yield Finding(thing, False, "no such station in line.yaml", f"there are: {', '.join(line.stations)}")
            continue
        try:
            outputs.opened(config.chip, config.lines).close()
        except InspectorError as error:
            yield _faulty(thing, error)
            continue
        early = config.early(station.expires_ms)
        hint = f"a verdict may take {station.expires_ms} ms: too late for a pulse after {early[0].delay_ms:g}" if early else ""
        yield Finding(thing, not early, f"{config.chip}, lines {', '.join(map(str, sorted(config.lines)))}", hint)


def _recipe(line: LineConfig, recipe_id: str, camera: str, image: Pixels, bundles: dict[str, Bundle]) -> Iterator[Finding]:
    """Say whether a recipe fits what the camera delivers."""
    from edge_inspector.preprocess import Plan, broken_promise, refuse_camera, refuse_unlike  # noqa: PLC0415

    recipe = line.recipes[recipe_id].cameras.get(camera)
    for roi_name, roi in recipe.rois.items() if recipe else ():
        bundle = bundles.get(roi.bundle)
        if recipe is None or bundle is None:
            continue
        thing = f"recipe {recipe_id}, camera {camera}, roi {roi_name}"
        try:
            height, width = image.shape[:2]
            plan = Plan(bundle.manifest.input, roi.shape, height, width, recipe.intensity_window)
            refuse_camera(bundle, image)
            refuse_unlike(bundle.manifest, plan.box)
            plan.fill(image, *plan.buffers())
            broken = broken_promise(bundle.manifest, roi.shape, roi.threshold, recipe.intensity_window, plan.box)
            promise = f"; promise {broken}" if broken else ""
            yield Finding(thing, True, f"fits, {len(plan.tiles)} tile(s) for bundle {roi.bundle}{promise}")
        except InspectorError as error:
            yield _faulty(thing, error)


# --- the machine


def _package(name: str, module: str, *, needed: bool, hint: str) -> Finding:
    try:
        import_module(module)
        return Finding(name, True, version(name), needed=needed)
    except PackageNotFoundError:
        return Finding(name, True, "from the system", needed=needed)
    except Exception as error:  # noqa: BLE001 - a broken library may raise anything when it is imported
        return Finding(name, False, str(error).splitlines()[0][:100], hint, needed)


def check_machine(config: Path | None = None) -> list[Finding]:
    """Python, libraries, clock, disk, GPU, broker: what is here, and what a missing thing is for.

    `config`: a device.yaml, whose broker is asked instead of this machine's.
    """
    known = sys.version_info >= (3, 10)
    here = shutil.disk_usage(Path.cwd())
    clock = health.clock()
    findings = [
        Finding("Python", known, platform.python_version(), "" if known else "Python 3.10 or newer is needed"),
        Finding("machine", True, f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}"),
        _package("opencv-python", "cv2", needed=True, hint=_CV2_HINT),
        _package("onnxruntime", "onnxruntime", needed=True, hint="pip install onnxruntime"),
        _package("paho-mqtt", "paho.mqtt.client", needed=True, hint="pip install paho-mqtt"),
        _package("amqtt", "amqtt", needed=False, hint=f"for the demo: {install('demo')}"),
        _package("torch", "torch", needed=False, hint=f"for training: {install('train')}"),
        _tensorrt(),
        _gpu(),
        *_jetson(),
        _aravis(),
        _package("pypylon", "pypylon.pylon", needed=False, hint=f"for Basler cameras: {install('pylon')}"),
        _package("harvesters", "harvesters.core", needed=False, hint=f"for GenTL: {install('gentl')}"),
        _gstreamer(),
        _package("gpiod", "gpiod", needed=False, hint=f"for wires to the line: {install('gpiod')}"),
        *_any_broker(config),
        _landlock(),
        Finding(
            "clock",
            clock.ok,
            clock.source,
            "" if clock.ok else "start a time service (systemd-timesyncd, chrony); until then results say clock_ok: false",
            needed=False,
        ),  # fmt: skip
        Finding(
            "disk",
            here.free > 1 << 30,
            f"{here.free / (1 << 30):.1f} GB free here",
            "" if here.free > 1 << 30 else "results and pictures need room: free at least 1 GB",
        ),  # fmt: skip
        Finding(
            "systemd",
            Path("/run/systemd/system").exists(),
            "running" if Path("/run/systemd/system").exists() else "not running",
            "needed only to run as a service",
            needed=False,
        ),  # fmt: skip
    ]
    return [f if not f.ok else Finding(f.thing, True, f.text, needed=f.needed) for f in findings]


_CPU_HINT = "networks run on the CPU with ONNX Runtime"


def _tensorrt() -> Finding:
    """TensorRT is never installed by us: it belongs to the device."""
    from edge_inspector.runtime.tensorrt import load  # noqa: PLC0415 - loads ONNX Runtime

    try:
        found = load().__version__
    except InspectorError as error:
        return Finding("TensorRT", False, error.message[:100], f"{error.hint}; without it {_CPU_HINT}", needed=False)
    untried = "edge-inspector's use of it was tested on a stand-in, never on a GPU; each build is compared before it judges"
    return Finding("TensorRT", True, f"{found}; {untried}", needed=False)


def _gpu() -> Finding:
    from edge_inspector.runtime.cuda import gpu  # noqa: PLC0415 - loads ONNX Runtime

    try:
        facts = gpu().facts
    except InspectorError as error:
        seen = ", ".join(sorted(str(p) for pattern in ("nvidia*", "nvhost-gpu") for p in Path("/dev").glob(pattern))[:3])
        devices = f"device files: {seen}" if seen else "no device files of NVIDIA's"
        return Finding("NVIDIA GPU", False, f"{error.message[:100]}; {devices}", f"{error.hint}; {_CPU_HINT}", needed=False)
    shared = ", shared with the CPU" if facts.integrated else ""
    text = f"{facts.name}, compute capability {facts.compute_capability}, {facts.memory_mb} MB{shared}, CUDA {facts.cuda}"
    return Finding("NVIDIA GPU", True, text, needed=False)


def _jetson() -> Iterator[Finding]:
    """JetPack's release and power mode: a Jetson in a saving mode is several times slower."""
    release = Path("/etc/nv_tegra_release")
    if release.exists():
        yield Finding("Jetson Linux", True, release.read_text().split("\n", 1)[0].lstrip("# ")[:80], needed=False)
    command = shutil.which("nvpmodel")
    if command is None:
        return
    asked = subprocess.run([command, "-q"], capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    mode = " ".join(asked.stdout.split()) or asked.stderr.strip()[:80]
    yield Finding("power mode", asked.returncode == 0, mode, "sudo nvpmodel -m 0, then sudo jetson_clocks", needed=False)


def _aravis() -> Finding:
    from edge_inspector.cameras.aravis import HINT, library  # noqa: PLC0415 - loads OpenCV

    try:
        library()
    except InspectorError as error:
        return Finding("libaravis", False, error.message[:100], f"for GigE and USB3 Vision cameras: {HINT}", needed=False)
    return Finding("libaravis", True, "GigE and USB3 Vision cameras: aravis://", needed=False)


def _gstreamer() -> Finding:
    from edge_inspector.cameras.gst import HINT, library  # noqa: PLC0415 - loads OpenCV

    try:
        library()
    except InspectorError as error:
        return Finding("GStreamer", False, error.message[:100], f"for csi:// and gst: {HINT}", needed=False)
    return Finding("GStreamer", True, "pipelines and a Jetson's own cameras: gst: and csi://", needed=False)


def _landlock(*, needed: bool = False) -> Finding:
    version = confinement.version()
    text = f"version {version}: cameras' processes write only to their own folders" if version else confinement.MISSING
    hint = "a newer kernel; until then pipelines and producers need sources: {unconfined: true} in device.yaml"
    return Finding("Landlock", bool(version), text, "" if version else hint, needed=needed)


def _any_broker(config: Path | None) -> Iterator[Finding]:
    """The broker of a device, or what answers on this machine, in its own words."""
    try:
        device = load_device(config) if config is not None and config.exists() else None
    except InspectorError:  # check tells what is wrong with it
        device = None
    if device is not None:
        yield from _broker(device)
        return
    try:
        text = tried(BrokerConfig(host="127.0.0.1"), password=None, tls=None, timeout_s=4.0).told
        yield Finding("broker on 127.0.0.1:1883", True, f"answers, {text}", needed=False)
    except InspectorError as error:
        hint = "fine if yours is elsewhere; else: apt install mosquitto"
        yield Finding("broker on 127.0.0.1:1883", False, error.message, hint, needed=False)
