"""One training: its processes, device, work folder, checkpoints, progress and time."""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray

from edge_inspector import pictures
from edge_inspector.errors import TrainingError

_SUFFIX, _LOCK = ".pt", "lock"
KEEP_EVERY_S = 30.0
"""Within a loop: so much of it is lost at most when the machine goes down."""


@dataclass(frozen=True)
class Progress:
    """Where training stands; `figures` are the losses of this step."""

    stage: str
    step: int
    steps: int
    figures: dict[str, float]


def _quiet(_: Progress) -> None:
    pass


def _leave() -> None:
    """End the group of processes while the interpreter still stands: gloo's threads abort a process that ends with them.

    Fabric does so for NCCL alone. See https://github.com/pytorch/pytorch/issues/190489.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Run:
    """What every family of networks needs to be fitted. Under torchrun each process has its own.

    Only the first process writes files and tells progress.
    """

    def __init__(
        self, folder: Path, *, device: str = "cpu", seed: int = 1,
        on_progress: Callable[[Progress], None] = _quiet, stopping: Callable[[], bool] = lambda: False,
        minutes: float | None = None,
    ) -> None:  # fmt: skip
        """`folder` takes checkpoints and sheets. `minutes` is what training may take from here on.

        Raises TrainingError without the device.
        """
        if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise TrainingError(f"device {device!r}: must be cpu, cuda or cuda:N")
        kind, _, index = device.partition(":")
        if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
            raise TrainingError(
                f"device {device}: {torch.cuda.device_count()} CUDA devices are here",
                hint="train with --device cpu, or check nvidia-smi and torch's build",
            )
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        world = int(os.environ.get("WORLD_SIZE", "1"))
        self.fabric = Fabric(
            accelerator=kind, devices=[int(index)] if index and world == 1 else local, num_nodes=world // local,
            strategy="ddp" if world > 1 else "auto",
        )  # fmt: skip
        self.fabric.launch()
        if world > 1:
            atexit.register(_leave)
        self.folder, self.seed, self.on_progress, self.stopping = folder, seed, on_progress, stopping
        self.deadline_s = time.monotonic() + 60 * minutes if minutes else None
        self.rank, self.world, self.device = self.fabric.global_rank, self.fabric.world_size, self.fabric.device
        self.losses: dict[str, dict[int, dict[str, float]]] = {}
        """Of each stage, at each step that was told with figures; what an earlier run did before comes with its checkpoints."""
        self._kept_s = time.monotonic()

    @contextmanager
    def alone(self, *, restart: bool = False) -> Iterator[None]:
        """Make the work folder and hold it; `restart`: forget what an earlier run has left there.

        Raises TrainingError where another training works there, or the folder cannot be made.
        """
        hint = "give a folder that can be written with --out"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"{self.folder}: {error.strerror}", hint=hint) from error
        with (self.folder / _LOCK).open("w") as lock:
            if self.first:
                self._hold(lock)
            if restart:
                self.forget()
            self.shared(None, 0)  # the others wait for that
            yield

    def _hold(self, lock: IO[str]) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingError(
                f"{self.folder}: another training works there", hint="wait for its end, or give another --name or --out"
            ) from error

    @property
    def first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def seeded(self, *parts: int) -> torch.Generator:
        """A generator that depends on the seed and `parts` alone, never on what ran before: resuming changes nothing."""
        digest = hashlib.sha256(json.dumps([self.seed, *parts]).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def reseed(self, *parts: int) -> None:
        """Seed PyTorch's own generators, on every device, by the seed, `parts` and the process alone."""
        torch.manual_seed(int(torch.randint(2**53, (1,), generator=self.seeded(self.rank, *parts))))

    def rng(self, *parts: int) -> np.random.Generator:
        """The same for numpy."""
        return np.random.default_rng((self.seed, *parts))

    def left_s(self) -> float | None:
        """Seconds that are left of the minutes given; None without limit."""
        return None if self.deadline_s is None else max(0.0, self.deadline_s - time.monotonic())

    def stop_if_asked(self) -> None:
        """Call in every loop, after `keep`. Raises KeyboardInterrupt where a person wants to stop."""
        if self.stopping():
            raise KeyboardInterrupt

    # --- what people see

    def tell(self, stage: str, step: int, steps: int, figures: dict[str, float] | None = None) -> None:
        """Report progress. Raises TrainingError where a figure is not finite: training diverged."""
        figures = figures or {}
        if not all(np.isfinite(list(figures.values()))):
            raise TrainingError(
                f"{stage} diverged at step {step}: {figures}", hint="start again with another --seed or fewer steps"
            )
        if figures:
            self.losses.setdefault(stage, {})[step] = figures
        if self.first:
            self.on_progress(Progress(stage, step, steps, figures))

    def step(self, stage: str, step: int, steps: int) -> None:
        """Report progress of work that is not kept; may raise KeyboardInterrupt, as `stop_if_asked`."""
        self.tell(stage, step, steps)
        self.stop_if_asked()

    def sheet(self, name: str, picture: NDArray[np.uint8]) -> None:
        """Write a picture that shows what was learned so far: sheet-NAME.png."""
        if self.first:
            pictures.write(self.folder / f"sheet-{name}.png", picture)

    # --- several processes

    def average(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Mean of the gradients over all processes; every process drew pictures of its own."""
        if self.world == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        flat = cast("torch.Tensor", self.fabric.all_reduce(flat, reduce_op="mean"))
        start = 0
        for g in gradients:
            g.copy_(flat[start : start + g.numel()].view_as(g))
            start += g.numel()

    def shared(self, value: Any, owner: int) -> Any:
        """The value that process `owner` has, in every process."""
        return self.fabric.broadcast(value, src=owner) if self.world > 1 else value

    # --- checkpoints

    def save(self, name: str, key: str, state: dict[str, Any]) -> None:
        """Write a checkpoint, whole or not at all. `key` names the settings and pictures it belongs to."""
        if not self.first:
            return
        path = self.folder / f"{name}{_SUFFIX}"
        part = self.folder / f".{name}{_SUFFIX}.part"
        try:
            torch.save({"key": key, "losses": self.losses, **state}, part)
            os.replace(part, path)
            self._kept_s = time.monotonic()
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            part.unlink(missing_ok=True)
            raise TrainingError(
                f"{self.folder}: the checkpoint cannot be written: {error}",
                hint="free some space and run the same command again: it resumes from the last checkpoint",
            ) from error

    def keep(self, name: str, key: str, state: Callable[[], dict[str, Any]]) -> None:
        """Write a checkpoint of a loop under way: every half minute, and where a person wants to stop."""
        if self.stopping() or time.monotonic() - self._kept_s > KEEP_EVERY_S:
            self.save(name, key, state())

    def load(self, name: str, key: str) -> dict[str, Any] | None:
        """The checkpoint, or None; the first process reads, all have it.

        Raises TrainingError for a damaged one, or one of other settings or pictures.
        """
        state: dict[str, Any] | None = self.shared(self._read(name, key) if self.first else None, 0)
        if state is not None:
            self.losses.update(state["losses"])
        return state

    def _read(self, name: str, key: str) -> dict[str, Any] | None:
        path = self.folder / f"{name}{_SUFFIX}"
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise TrainingError(f"{path}: damaged checkpoint: {error}", hint="delete it, or train with --restart") from error
        if state["key"] != key:
            raise TrainingError(
                f"{path}: made with other settings or pictures",
                hint="give the settings it was started with, another --out, or --restart",
            )
        return state

    def drop(self, name: str) -> None:
        """Remove a checkpoint that another one has made void."""
        if self.first:
            (self.folder / f"{name}{_SUFFIX}").unlink(missing_ok=True)

    def forget(self) -> None:
        """Remove checkpoints and sheets."""
        for path in self.folder.iterdir() if self.first else ():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _LOCK:
                path.unlink()

    def remove(self) -> None:
        """Remove the work folder: the bundle is made."""
        if self.first:
            shutil.rmtree(self.folder, ignore_errors=True)


def key_of(settings: dict[str, Any], *arrays: NDArray[Any]) -> str:
    """What a checkpoint belongs to: settings and data."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
