"""Fit f-AnoGAN to pictures of good parts: first the GAN, then the encoder. Stops and resumes at any step.

Schlegl et al. 2019, section 2.1 (WGAN-GP) and 2.2 (izi_f encoder).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edge_inspector import pictures
from edge_inspector.errors import TrainingError
from edge_inspector.training.networks import fanogan

CHECKPOINT = "checkpoint.pt"
_SHEET = 8


@dataclass(frozen=True)
class Settings:
    """What decides the outcome. The paper: width 64, batch 64, 5 critic steps, learning rate 1e-4, 50,000 encoder steps.

    The defaults are for two CPU cores and a first bundle within half an hour.
    """

    size: int = 64
    width: int = 16
    batch: int = 16
    critic_steps: int = 3
    gan_steps: int = 800
    encoder_steps: int = 2400
    learning_rate: float = 2e-4
    seed: int = 1


@dataclass(frozen=True)
class Progress:
    """Where training stands; `figures` are the losses of this step."""

    stage: str
    step: int
    steps: int
    figures: dict[str, float]


class Fit:
    """The networks, their optimisers and the random state: everything a checkpoint holds."""

    def __init__(self, tiles: NDArray[np.uint8], settings: Settings, folder: Path, *, device: str = "cpu") -> None:
        """tiles: uint8 [N, S, S, C]. `folder` takes checkpoints and sample sheets."""
        torch.manual_seed(settings.seed)
        s, channels = settings, tiles.shape[3]
        self.settings, self.folder, self.device = settings, folder, torch.device(device)
        self.tiles = torch.from_numpy(tiles)
        # More encoder steps go on where fewer ended; everything else makes another network.
        fixed = {name: value for name, value in asdict(s).items() if name != "encoder_steps"}
        self.key = hashlib.sha256(json.dumps(fixed).encode() + tiles.tobytes()).hexdigest()
        self.g = self._placed(fanogan.Generator(s.size, channels, s.width))
        self.d = self._placed(fanogan.critic(s.size, channels, s.width))
        self.e = self._placed(fanogan.encoder(s.size, channels, s.width))
        betas = (0.0, 0.9)
        self.optimisers = {
            "g": torch.optim.Adam(self.g.parameters(), s.learning_rate, betas),
            "d": torch.optim.Adam(self.d.parameters(), s.learning_rate, betas),
            "e": torch.optim.Adam(self.e.parameters(), s.learning_rate),
        }
        self.gan_step = self.encoder_step = 0
        self._sheet_latents = torch.randn(_SHEET, fanogan.LATENT, device=self.device)

    def _placed(self, network: Any) -> Any:
        return network.to(device=self.device, memory_format=torch.channels_last)

    # --- the two loops

    def run(self, on_progress: Callable[[Progress], None], *, save_every: int = 100) -> fanogan.FanoganGraph:
        """Train from where the checkpoint ends; returns the graph in evaluation mode."""
        s = self.settings
        self._resume()
        while self.gan_step < s.gan_steps:
            figures = self._step_gan()
            self.gan_step += 1
            self._kept("GAN", self.gan_step, s.gan_steps, figures, on_progress, save_every)
        self.g.eval().requires_grad_(False)
        self.d.eval().requires_grad_(False)
        while self.encoder_step < s.encoder_steps:
            figures = self._step_encoder()
            self.encoder_step += 1
            self._kept("encoder", self.encoder_step, s.encoder_steps, figures, on_progress, save_every)
        self.e.eval()
        return fanogan.FanoganGraph(self.g, self.d, self.e, s.size).to(self.device).eval()

    def _kept(
        self, stage: str, step: int, steps: int, figures: dict[str, float],
        on_progress: Callable[[Progress], None], save_every: int,
    ) -> None:  # fmt: skip
        if not all(np.isfinite(list(figures.values()))):
            raise TrainingError(
                f"{stage} diverged at step {step}: {figures}", hint="start again with another --seed or fewer steps"
            )
        if step % save_every == 0 or step == steps:
            self._save()
            pictures.write(self.folder / f"sheet-{stage.lower()}-{step:06d}.png", self.sheet())
        on_progress(Progress(stage, step, steps, figures))

    def _real(self) -> torch.Tensor:
        chosen = torch.randint(len(self.tiles), (self.settings.batch,))
        batch = self.tiles[chosen].to(self.device).permute(0, 3, 1, 2)  # channels-last in memory, as the networks are
        return batch.float() / 127.5 - 1

    def _fake(self) -> torch.Tensor:
        fake: torch.Tensor = self.g(torch.randn(self.settings.batch, fanogan.LATENT, device=self.device))
        return fake

    def _step_gan(self) -> dict[str, float]:
        wasserstein, penalty = 0.0, 0.0
        for _ in range(self.settings.critic_steps):
            with torch.no_grad():
                fake = self._fake()
            loss, smooth = fanogan.critic_loss(self.d, self._real(), fake)
            self._descend("d", loss + smooth)
            wasserstein, penalty = -loss.item(), smooth.item()
        self._descend("g", -self.d(self._fake()).mean())
        return {"wasserstein": wasserstein, "penalty": penalty}

    def _step_encoder(self) -> dict[str, float]:
        loss = fanogan.izi_f_loss(self._real(), self.g, self.d, self.e)
        self._descend("e", loss)
        return {"residual": loss.item()}

    def _descend(self, name: str, loss: torch.Tensor) -> None:
        optimiser = self.optimisers[name]
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    # --- what people look at

    @torch.no_grad()
    def sheet(self) -> NDArray[np.uint8]:
        """Three rows: good parts, what E and G make of them, what G draws from fixed latents."""
        self.g.eval()
        self.e.eval()
        chosen = np.linspace(0, len(self.tiles) - 1, _SHEET).astype(int)
        real = self.tiles[chosen].to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        rows = [real, self.g(self.e(real)), self.g(self._sheet_latents)]
        if self.gan_step < self.settings.gan_steps:
            self.g.train()
        self.e.train()
        pixels = ((torch.cat([torch.cat(list(row), 2) for row in rows], 1) + 1) * 127.5).clamp(0, 255)
        return np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy().astype(np.uint8))

    # --- checkpoints

    def _networks(self) -> dict[str, Any]:
        return {"g": self.g, "d": self.d, "e": self.e}

    def _save(self) -> None:
        state = {
            "key": self.key,
            "steps": [self.gan_step, self.encoder_step],
            "networks": {name: network.state_dict() for name, network in self._networks().items()},
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
            "random": torch.get_rng_state(),
        }
        part = self.folder / f".{CHECKPOINT}.part"
        try:
            torch.save(state, part)
            os.replace(part, self.folder / CHECKPOINT)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            part.unlink(missing_ok=True)
            raise TrainingError(
                f"{self.folder}: the checkpoint cannot be written: {error}",
                hint="free some space and run the same command again: it resumes from the last checkpoint",
            ) from error

    def _resume(self) -> None:
        path = self.folder / CHECKPOINT
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:
            raise TrainingError(f"{path}: damaged checkpoint: {error}", hint="delete it, or train with --restart") from error
        if state["key"] != self.key:
            raise TrainingError(
                f"{path}: made with other settings or pictures",
                hint="give the settings it was started with, another --out, or --restart",
            )
        for name, network in self._networks().items():
            network.load_state_dict(state["networks"][name])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        self.gan_step, self.encoder_step = state["steps"]
        torch.set_rng_state(state["random"].cpu())
