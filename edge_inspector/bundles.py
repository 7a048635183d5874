"""Bundles: a folder of flat files under a signed manifest. Write, read, sign, verify.

manifest.json   what it is, and size and sha256 of every other file
network.onnx    the one graph: pixels in, score, map and expected appearance out
generator.onnx  where the family has one: latents in, pictures of good parts out; never run on the line
sample-*.png    limit samples with their expected scores and verdicts: the self-test
report.html     how it was trained and calibrated
signature       Ed25519 over the bytes of manifest.json
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from edge_inspector import signatures
from edge_inspector.errors import BundleDamaged, BundleUnsupported, BundleUntrusted, SchemaError, SignatureError
from edge_inspector.formats import header
from edge_inspector.graphs import refuse_foreign
from edge_inspector.results import Moment, Verdict
from edge_inspector.roi import Roi
from edge_inspector.schema import MAX_BYTES, Field, Model, TolerantModel, read_json, validate
from edge_inspector.scoring import Found, both_rates
from edge_inspector.signatures import Ed25519PrivateKey, Signature, trusted_keys

MANIFEST, NETWORK, SIGNATURE, REPORT = "manifest.json", "network.onnx", "signature", "report.html"
GENERATOR, GRAPHS = "generator.onnx", ".onnx"
MAX_FILE_BYTES = 512 * 1024 * 1024
MAX_MANIFEST_BYTES = 4 << 20
MAX_FILES = 64
NAME_PATTERN = r"^[a-z0-9]+(-[a-z0-9]+)*$"
_FILE_NAME = re.compile(r"^[a-z0-9][a-z0-9._-]{0,63}$")


class InputSpec(Model):
    """What the network takes, and how a region of interest is brought to it."""

    height: int = Field(ge=16, le=4096)
    width: int = Field(ge=16, le=4096)
    channels: Literal[1, 3] = 3
    order: Literal["bgr", "rgb", "grey"] = "bgr"
    fit: Literal["stretch", "letterbox"] = "stretch"
    interpolation: Literal["area", "linear"] = "area"
    tile: int | None = Field(None, ge=16, le=4096, description="side in frame pixels of the squares a region is cut into")
    overlap: float = Field(0.0, ge=0.0, le=0.5, description="share of a tile that its neighbour sees too")


class Calibration(Model):
    """The promise behind the threshold: at most `alpha` of good parts rejected, with that confidence.

    Where the rate to expect was asked for `alpha` is the rate that is sure.
    """

    n: int = Field(ge=1)
    alpha: float = Field(gt=0, lt=1)
    confidence: float = Field(gt=0, lt=1)
    kept: bool = Field(description="whether n pictures support the promise")
    method: str = Field("", description="how the scores were made: held out, or cross-fitted")
    tail: float | None = Field(None, description="where a fitted Gumbel tail puts the threshold, without confidence")
    review: float | None = Field(None, description="from here to the threshold: passed, but worth a look")
    scores: tuple[float, ...] = Field(max_length=20000)


class Sample(Model):
    """A limit sample: a picture with the score and verdict it must get."""

    file: str
    score: float
    verdict: Verdict


class Rates(TolerantModel):
    """Both rates at which the threshold rejects good parts; beside `Calibration`, to which 0.1 lets nothing be added."""

    asked: Literal["expected", "at_most"] = Field(description="which of the two a person chose")
    wish: float = Field(description="the share that was asked for")
    expected: float = Field(description="share of good parts that is rejected on average")
    at_most: float = Field(description="share that is not exceeded, with the calibration's confidence")
    needed: int = Field(description="good pictures that carry the wish at least")
    found: float | None = Field(None, description="share of drawn defects that is found; none: none were drawn")
    found_at_half: float | None = Field(
        None, description="the same with half as many good parts rejected; none: too few to tell"
    )
    found_at_twice: float | None = Field(None, description="the same with twice as many")


class FileEntry(Model):
    """Size and hash of one file."""

    size: int = Field(ge=0, le=MAX_FILE_BYTES)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


Size = tuple[int, int]


class TrainedOn(Model):
    """The pictures the bundle was made from."""

    digest: str
    pictures: int
    height_px: int
    width_px: int
    depth_bits: int
    intensity_window: tuple[int, int] | None = None
    aspects: tuple[float, float] | None = Field(None, description="smallest and largest width / height")


class PictureKind(TolerantModel):
    """What these pictures had in common; beside `TrainedOn`, to which devices of 0.1 let nothing be added."""

    channels: Literal[1, 3] | None = Field(None, description="1: grey, 3: colour; none: as its samples are")
    sizes: tuple[Size, Size] | None = Field(None, description="smallest and largest width and height, in px")
    region: Roi | None = Field(None, description="the region of each picture that was trained on; none: all of it")
    left_out: tuple[str, ...] = Field((), description="good parts that a person left out; they count as rejected")


class BackboneUsed(TolerantModel):
    """The pretrained network that a bundle's features come from."""

    name: str
    sha256: str = Field(description="of the file of its weights")
    licence: str


class Taught(TolerantModel):
    """What people have taught a release, beside what its parent knew."""

    parent: str = Field(description="sha256 of the parent's manifest")
    defects: int = Field(description="pictures of defects that were shown")
    good: int = Field(description="pictures of good parts that were shown")
    weight: float = Field(description="how much the taught term counts, in spreads of good parts; 0: not at all")
    changes: tuple[str, ...] = Field(description="what is found and rejected, before and after, in words")


class Manifest(TolerantModel):
    """What a bundle says of itself."""

    schema_: Literal["ei.bundle.v1"] = Field("ei.bundle.v1", alias="schema")
    name: str = Field(pattern=NAME_PATTERN, max_length=64)
    release: int = Field(ge=1)
    product: str = Field(pattern=NAME_PATTERN, max_length=64)
    scope: tuple[str, ...] = ()
    not_after: Moment | None = None
    created_at: Moment
    network: str
    input: InputSpec
    calibration: Calibration
    rates: Rates | None = Field(None, description="none: a bundle of 0.1")
    threshold: float = Field(gt=0)
    scale: float = Field(gt=0, description="what the network's scores were divided by")
    samples: tuple[Sample, ...] = Field(min_length=1, max_length=32)
    training: TrainedOn
    pictures: PictureKind = PictureKind()
    backbone: BackboneUsed | None = Field(None, description="none: a bundle of 0.1, or of a family that has none")
    material: str | None = Field(None, description="digest of BUNDLE.teach, which it can be taught from; none: it cannot")
    taught: Taught | None = Field(None, description="none: as it was trained")
    metrics: dict[str, float] = Field(default_factory=dict)
    min_version: str = Field(pattern=r"^[0-9]+\.[0-9]+\.[0-9]+$")
    command: str = ""
    files: dict[str, FileEntry]

    @property
    def rates_said(self) -> str:
        """What the threshold promises and what that costs, in words."""
        calibration, rates = self.calibration, self.rates
        if rates is None and not calibration.kept:
            return f"promises no rate: {calibration.n} good parts were too few"
        if rates is None:
            return f"at most {100 * calibration.alpha:.3g} % of good parts rejected, from {calibration.n} good parts"
        said = both_rates(rates.expected, rates.at_most, calibration.confidence, calibration.n)
        if rates.found is None or rates.found_at_twice is None:
            return said
        return f"{said}; {Found(rates.found, rates.found_at_half, rates.found_at_twice)}"

    @property
    def size_range(self) -> tuple[Size, Size]:
        """Smallest and largest (width, height); of an old bundle what its commonest size and its shapes allow."""
        if self.pictures.sizes is not None:
            return self.pictures.sizes
        trained = self.training
        w, h = trained.width_px, trained.height_px
        low, high = trained.aspects or (w / h, w / h)
        widths, heights = (w, round(h * low), round(h * high)), (h, round(w / high), round(w / low))
        return (min(widths), min(heights)), (max(widths), max(heights))


@dataclass(frozen=True)
class Bundle:
    """A verified bundle; `sha256` is that of its manifest, which covers every file.

    What runs it asks `read`, never the folder: the bytes that were verified are the bytes that run,
    whatever becomes of the files meanwhile.
    """

    folder: Path
    manifest: Manifest
    sha256: str
    key_id: str
    _held: dict[str, bytes] = field(default_factory=dict, repr=False, compare=False)
    """The network and the samples as they were verified, until they are let go."""

    def read(self, name: str) -> bytes:
        """The bytes of a file that the manifest lists: those that were verified, or verified now.

        Raises BundleDamaged.
        """
        held = self._held.get(name)
        return held if held is not None else _verified(self.folder, name, self.manifest)

    def let_go(self) -> None:
        """Free the memory: what runs the network has its own. What is read later is verified anew."""
        self._held.clear()

    @cached_property
    def channels(self) -> int:
        """Of the pictures it was trained on: 1 for grey, 3 for colour. Old bundles show it by their samples."""
        if self.manifest.pictures.channels is not None:
            return self.manifest.pictures.channels
        return header(self.read(self.manifest.samples[0].file)).channels


# --- write and sign


def file_entries(folder: Path) -> dict[str, FileEntry]:
    """Size and hash of every file that a manifest of this folder lists."""
    entries = {}
    for path in sorted(folder.iterdir()):
        if path.name not in (MANIFEST, SIGNATURE) and not path.name.startswith("."):
            data = path.read_bytes()
            entries[path.name] = FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    return entries


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json; a signature made before is void and removed."""
    (folder / SIGNATURE).unlink(missing_ok=True)
    data = manifest.model_dump_json(by_alias=True, exclude_none=True, indent=1)
    (folder / MANIFEST).write_text(data + "\n")


def sign(folder: Path, key: Ed25519PrivateKey) -> str:
    """Sign a bundle's manifest after checking that its files are what it says. Returns the key's id."""
    data = _manifest_bytes(folder)
    _check_files(folder, _manifest(data, folder))
    signature = signatures.sign(data, key)
    (folder / SIGNATURE).write_text(signature.model_dump_json() + "\n")
    return signature.key_id


# --- read and verify


def _bytes_of(path: Path, most: int) -> bytes:
    """A plain file's bytes, read once, and at most one more than `most`. Raises BundleDamaged."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe is not waited for
    try:
        with os.fdopen(os.open(path, flags), "rb") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file.read(most + 1)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise BundleDamaged(f"{path}: missing", hint="copy the bundle again, whole") from error
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            hint = "check the file's permissions and its disk"
            raise BundleDamaged(f"{path}: cannot be read: {error.strerror}", hint=hint) from error
    hint = "bundles are flat folders of files"
    raise BundleDamaged(f"{path}: not a plain file (a link or a folder)", hint=hint)


def _verified(folder: Path, name: str, manifest: Manifest) -> bytes:
    """The bytes of a file, read once and found to be what the manifest says. Raises BundleDamaged."""
    path, entry = folder / name, manifest.files.get(name)
    if entry is None:
        raise BundleDamaged(f"{folder}: the manifest does not list {name}")
    data = _bytes_of(path, entry.size)
    if len(data) != entry.size:
        found = f"more than {entry.size}" if len(data) > entry.size else len(data)
        raise BundleDamaged(f"{path}: {found} bytes, the manifest says {entry.size}")
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        hint = "copy the bundle again, whole"
        raise BundleDamaged(f"{path}: sha256 differs from the manifest", hint=hint)
    return data


def _manifest_bytes(folder: Path) -> bytes:
    data = _bytes_of(folder / MANIFEST, MAX_MANIFEST_BYTES)
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleDamaged(f"{folder / MANIFEST}: more than {MAX_MANIFEST_BYTES} bytes")
    return data


def _manifest(data: bytes, folder: Path) -> Manifest:
    source = str(folder / MANIFEST)
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleDamaged(f"{source}: not JSON: {error}") from error
    if isinstance(values, dict):
        needed = str(values.get("min_version", "0.0.0"))
        if _numbers(needed) > _numbers(version("edge-inspector")):
            raise BundleUnsupported(
                f"{folder}: needs edge-inspector {needed}, this is {version('edge-inspector')}",
                hint="update edge-inspector, or use an older release of the bundle",
            )
    try:
        return validate(Manifest, values, source)
    except SchemaError as error:
        raise BundleDamaged(str(error)) from error


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _check_names(folder: Path, manifest: Manifest) -> None:
    if len(manifest.files) > MAX_FILES:
        raise BundleDamaged(f"{folder}: {len(manifest.files)} files, at most {MAX_FILES}")
    for name in manifest.files:
        if not _FILE_NAME.match(name) or name in (MANIFEST, SIGNATURE):
            raise BundleDamaged(f"{folder}: file name {name!r} is not a plain name inside the bundle")


def _check_files(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """Verify every file; returns the bytes of those that run: the network and the samples."""
    _check_names(folder, manifest)
    running = {NETWORK, *(sample.file for sample in manifest.samples)}
    for name in sorted(running - set(manifest.files)):
        raise BundleDamaged(f"{folder}: the manifest does not list {name}")
    held = {}
    for name in manifest.files:
        data = _verified(folder, name, manifest)
        if name.endswith(GRAPHS):
            refuse_foreign(data, str(folder / name))
        if name in running:
            held[name] = data
    present = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    extra = sorted(present - set(manifest.files) - {MANIFEST, SIGNATURE})
    if extra:
        raise BundleDamaged(f"{folder}: files that the manifest does not list: {extra}", hint="remove them")
    return held


def _signature(folder: Path) -> Signature:
    path = folder / SIGNATURE
    if not path.exists():
        raise BundleUntrusted(f"{folder}: not signed", hint="sign it: edge-inspector sign BUNDLE --key KEY")
    try:
        return validate(Signature, read_json(_bytes_of(path, MAX_BYTES), str(path)), str(path))
    except SchemaError as error:
        raise BundleUntrusted(f"{path}: not a signature file: {error}") from error


def _check_signature(folder: Path, data: bytes, trust: Path) -> str:
    try:
        return signatures.verify(_signature(folder), data, trusted_keys(trust))
    except SignatureError as error:
        raise BundleUntrusted(f"{folder}: {error.message}", hint=error.hint) from error


def signed_manifest(folder: Path, trust: Path) -> Manifest:
    """The manifest of a bundle whose other files may not be there yet. Raises BundleError."""
    data = _manifest_bytes(folder)
    _check_signature(folder, data, trust)
    manifest = _manifest(data, folder)
    _check_names(folder, manifest)
    return manifest


def looked_through(folder: Path) -> tuple[Manifest, str]:
    """The manifest of a bundle whose files are what it says, and who claims to have signed it.

    Where no trusted keys are at hand; nothing may run of it. Raises BundleError.
    """
    signature, manifest = _signature(folder), _manifest(_manifest_bytes(folder), folder)
    _check_files(folder, manifest)
    return manifest, signature.key_id


def open_bundle(folder: Path, trust: Path, *, now: datetime | None = None, clock_ok: bool = True) -> Bundle:
    """Read and verify a bundle: signature first, then every file, once, and its graphs.

    `not_after` counts only when the clock is trusted. Raises BundleUntrusted, BundleDamaged or BundleUnsupported.
    """
    if not folder.is_dir():
        raise BundleDamaged(f"{folder}: no such bundle", hint="check the bundle's name and the bundles folder")
    data = _manifest_bytes(folder)
    identity = _check_signature(folder, data, trust)
    manifest = _manifest(data, folder)
    held = _check_files(folder, manifest)
    if clock_ok and manifest.not_after is not None and (now or datetime.now(timezone.utc)) > manifest.not_after:
        raise BundleUnsupported(f"{folder}: expired at {manifest.not_after}", hint="roll out a newer release")
    return Bundle(folder, manifest, hashlib.sha256(data).hexdigest(), identity, held)


def in_folder(bundles: Path) -> Iterable[str]:
    """Names of the bundles in a folder."""
    return sorted(path.parent.name for path in bundles.glob(f"*/{MANIFEST}"))
