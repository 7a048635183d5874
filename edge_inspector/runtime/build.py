"""Engines kept on the device: found where one fits, else compiled in a child process and compared before it may judge.

An engine fits one bundle, TensorRT version, GPU, precision and batch: all are in its record, a JSON beside it. A record without
engine says why that one was refused, so that it is not built again for nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Literal

from edge_inspector.bundles import NETWORK, Bundle
from edge_inspector.errors import EngineError, EngineRefused, InspectorError
from edge_inspector.results import Moment
from edge_inspector.runtime import tensorrt
from edge_inspector.runtime.cuda import GpuFacts, gpu
from edge_inspector.runtime.precision import Precision, chosen
from edge_inspector.runtime.tensorrt import Tell
from edge_inspector.schema import Field, Model, TolerantModel, read_json, validate

log = logging.getLogger(__name__)

KEPT = 32
"""Engines kept on a device; the one used longest ago goes first."""
_LOOK_S, _END_S = 0.5, 5.0
_PRIVATE = 0o700


@dataclass(frozen=True)
class Limits:
    """What a build may take."""

    seconds: float = 3600.0
    memory_mb: int = 6144
    """Of the child; a Jetson's GPU memory is not counted there, hence the next."""
    free_mb: int = 256
    """Left to all others."""


class EngineRecord(TolerantModel):
    """The JSON beside an engine."""

    schema_: Literal["ei.engine.v1"] = Field("ei.engine.v1", alias="schema")
    bundle: str
    release: int
    bundle_sha256: str
    network_sha256: str
    tensorrt: str
    gpu: str
    compute_capability: str
    multiprocessors: int
    precision: Precision
    batch: int
    made_by: str
    """Version of edge-inspector: it decides what is computed at half precision."""
    built_at: Moment | None = None
    build_s: float = 0.0
    engine_sha256: str = ""
    parity: dict[str, float] = Field(default_factory=dict)
    refused: str = ""


class Order(Model):
    """What the child process is told."""

    bundle: str
    trust: str
    place: str
    timing_cache: str
    threads: int
    clock_ok: bool
    record: EngineRecord


def untold(phase: str, step: int, steps: int) -> None:
    """Tell nobody."""


_KEY = {
    "bundle_sha256": "the bundle", "batch": "the batch", "tensorrt": "TensorRT", "gpu": "the GPU",
    "compute_capability": "its capability", "multiprocessors": "its multiprocessors", "made_by": "edge-inspector",
}  # fmt: skip
"""What an engine is bound to, and what a log calls it. The whole bundle: its threshold decides what the gate looks at."""


@dataclass(frozen=True)
class Workshop:
    """Where engines are made and kept: the state folder's `engines`, whose bundles this device trusts."""

    folder: Path
    trust: Path
    threads: int = 2
    clock_ok: bool = True
    limits: Limits = Limits()

    def engine(
        self, bundle: Bundle, wanted: Literal["auto", Precision], batch: int, tell: Tell = untold,
        *, again: bool = False,
    ) -> tuple[tensorrt.TensorRtEngine, EngineRecord]:  # fmt: skip
        """The engine of a bundle, not entered yet, and its record; built first where none fits. Blocks for minutes then.

        `again`: build although one is there. `tell` is called at least once a second meanwhile; what it raises ends the build.
        Raises EngineError; EngineRefused where it does not judge as it should.
        """
        wished = _wished(bundle, wanted, batch, gpu().facts)
        place = self.folder / f"{wished.bundle}-{wished.precision}-b{batch}-{_key(wished)}"
        with self._alone(tell):
            record = _record(place.with_suffix(".json"))
            why = "asked to" if again else self._why(place, record, wished)
            if why:
                log.info("building the %s engine of bundle %s: %s", wished.precision, wished.bundle, why)
                record = self._built(bundle, place, wished, tell)
            if record is None or record.refused:
                raise EngineRefused(
                    f"its engine was refused: {record.refused if record else 'no record'}",
                    hint="try another precision, or edge-inspector build --again after a change of the driver",
                )
            with suppress(PermissionError):  # another user's: only the order in which engines are forgotten suffers
                os.utime(place.with_suffix(".json"))
        engine = tensorrt.TensorRtEngine(
            bundle, place.with_suffix(".engine"), record.engine_sha256, record.precision, batch=batch
        )
        return engine, record

    @contextmanager
    def _alone(self, tell: Tell) -> Iterator[None]:
        """One build at a time on a device: stations share the GPU, and may share a bundle. Raises EngineError."""
        end = time.monotonic() + self.limits.seconds
        with ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                if self.folder.stat().st_mode & 0o777 != _PRIVATE:
                    self.folder.chmod(_PRIVATE)
                lock = stack.enter_context((self.folder / "lock").open("w"))
                self._hand_over()
            except OSError as error:
                raise EngineError(f"{self.folder}: {error.strerror}", hint="check the state folder's permissions") from error
            while not _locked(lock):
                if time.monotonic() > end:
                    raise EngineError(f"{self.folder}: another build has not ended", hint="is one hanging?")
                tell("waiting for another build", 0, 1)
                time.sleep(_LOOK_S)
            yield

    def _hand_over(self) -> None:
        """What root has made here belongs to the user who owns the state folder: the service must be able to use it."""
        if os.geteuid() == 0:
            owner = self.folder.parent.stat()
            for path in (self.folder, *self.folder.iterdir()):
                os.chown(path, owner.st_uid, owner.st_gid)

    def _why(self, place: Path, record: EngineRecord | None, wished: EngineRecord) -> str:
        """Why a build is needed; empty when it is not."""
        if record is not None and record.refused:
            return ""
        if record is not None:
            try:
                data = place.with_suffix(".engine").read_bytes()
            except OSError as error:
                return f"the engine cannot be read ({error.strerror})"
            return "" if hashlib.sha256(data).hexdigest() == record.engine_sha256 else "the engine's file is damaged"
        if place.with_suffix(".json").exists():
            return "its record is damaged"
        others = [_record(path) for path in self.folder.glob(f"{wished.bundle}-{wished.precision}-b*.json")]
        known = max((o for o in others if o is not None), key=lambda o: str(o.built_at), default=None)
        if known is None:
            return "there is none yet"
        changed = [name for name in _KEY if getattr(known, name) != getattr(wished, name)]
        return "changed since the last one: " + ", ".join(
            f"{_KEY[name]} ({str(getattr(known, name))[:24]}, now {str(getattr(wished, name))[:24]})" for name in changed
        )

    def _built(self, bundle: Bundle, place: Path, wished: EngineRecord, tell: Tell) -> EngineRecord | None:
        place.with_suffix(".json").unlink(missing_ok=True)  # the engine under it is about to change
        cache = f"timing-{_digest([wished.tensorrt, wished.gpu, str(wished.multiprocessors)])}.cache"
        order = Order(
            bundle=str(bundle.folder.resolve()), trust=str(self.trust.resolve()), place=str(place.resolve()),
            timing_cache=str(self.folder.resolve() / cache), threads=self.threads, clock_ok=self.clock_ok, record=wished,
        )  # fmt: skip
        try:
            _run(order, self.limits, tell)
        finally:
            self._forget(cache)
            self._hand_over()
        return _record(place.with_suffix(".json"))

    def _forget(self, cache: str) -> None:
        """Bound the folder: the engines used last and their records, one timing cache, nothing that a broken build left."""
        records = sorted(self.folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
        kept = {path.stem for path in records[-KEPT:]}
        for path in self.folder.iterdir():
            if path.name not in ("lock", cache) and (path.stem not in kept or path.suffix == ".part"):
                path.unlink()


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wished(bundle: Bundle, wanted: Literal["auto", Precision], batch: int, gpu: GpuFacts) -> EngineRecord:
    graph = bundle.read(NETWORK)
    return EngineRecord(
        bundle=bundle.manifest.name, release=bundle.manifest.release, bundle_sha256=bundle.sha256,
        network_sha256=hashlib.sha256(graph).hexdigest(), tensorrt=str(tensorrt.load().__version__), gpu=gpu.name,
        compute_capability=gpu.compute_capability, multiprocessors=gpu.multiprocessors,
        precision=chosen(graph, wanted, bundle.manifest.name), batch=batch, made_by=version("edge-inspector"),
    )  # fmt: skip


def _digest(facts: list[str]) -> str:
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


def _key(record: EngineRecord) -> str:
    return _digest([str(getattr(record, name)) for name in _KEY])


def _record(path: Path) -> EngineRecord | None:
    """None for one that is not there or not readable: it is as good as none."""
    try:
        return validate(EngineRecord, read_json(path.read_bytes(), str(path)), str(path))
    except (OSError, InspectorError):
        return None


def _run(order: Order, limits: Limits, tell: Tell) -> None:
    """The child process, from start to end. Raises EngineError."""
    child = subprocess.Popen(
        [sys.executable, "-m", "edge_inspector.runtime.compile"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None
    try:
        with suppress(BrokenPipeError):  # how it ended is told below
            child.stdin.write(order.model_dump_json(by_alias=True).encode() + b"\n")
            child.stdin.flush()
        _follow(child, limits, tell)
        code = child.wait(_END_S)
    except subprocess.TimeoutExpired as error:
        raise EngineError("the build has said its last word and does not end", hint="see the log above") from error
    finally:
        child.kill()
        with suppress(subprocess.TimeoutExpired):  # stuck in the driver: nothing ends it, and nobody waits for it
            child.wait(_END_S)
        with suppress(BrokenPipeError):
            child.stdin.close()
    if code:
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
        raise EngineError(f"the build ended with {how}", hint="see the log above; killed for memory? stop other programs")


def _follow(child: subprocess.Popen[bytes], limits: Limits, tell: Tell) -> None:
    """Relay what the child says until its last word. Raises EngineError for what it died of, or when it takes too much."""
    end, said, last = time.monotonic() + limits.seconds, b"", ("starting", 0, 1)
    stdout = child.stdout
    assert stdout is not None
    with stdout:
        while True:
            if select.select([stdout], [], [], _LOOK_S)[0]:
                more = os.read(stdout.fileno(), 65536)
                if not more:
                    return
                *lines, said = (said + more).split(b"\n")
                for line in map(json.loads, lines):
                    if "error" in line:
                        raise EngineError(line["error"], hint=line["hint"])
                    last = (line["phase"], line["step"], line["steps"])
            tell(*last)
            _refuse_greed(child.pid, limits, end)


def _refuse_greed(pid: int, limits: Limits, end: float) -> None:
    """Raise EngineError for a build that takes too much time or memory."""
    if time.monotonic() > end:
        raise EngineError(f"the build took more than {limits.seconds:.0f} s", hint="is the machine busy?")
    memory_mb, free_mb = _memory_mb(pid)
    if memory_mb > limits.memory_mb or free_mb < limits.free_mb:
        raise EngineError(
            f"the build took too much memory: {memory_mb} MB, {free_mb} MB left to others",
            hint="stop other programs, or add swap while it builds",
        )


def _memory_mb(pid: int) -> tuple[int, int]:
    """Resident memory of a process, and what is available to all."""
    try:
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    except (OSError, IndexError):  # it ends just now
        resident = 0
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return resident, int(available.split()[1]) >> 10
