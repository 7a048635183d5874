"""Fitting f-AnoGAN, and AnoGAN on the same networks: first the GAN, then (f-AnoGAN) the encoder. Resumes at any step.

Schlegl et al. 2019, section 2.1 (WGAN-GP) and 2.2 (izi_f encoder).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_inspector import preprocess
from edge_inspector.bundles import InputSpec
from edge_inspector.errors import TrainingError
from edge_inspector.preprocess import Window
from edge_inspector.training import export, watching
from edge_inspector.training.data import Pictures, Tiles, load_tiles
from edge_inspector.training.networks import Fitted, fanogan
from edge_inspector.training.run import Run, key_of

SIZES = (32, 64, 128)
_SHEET = 8
_SHEET_EVERY = 100
_NAME = "fanogan"
_TRIAL = 3
"""Steps that tell what a step costs."""
_HELD_OUT = 3
"""Of four folds this one is held out: fitting a GAN again for each fold would take its time again."""


@dataclass(frozen=True)
class Fanogan:
    """f-AnoGAN. The paper: width 64, batch 64, 5 critic steps, learning rate 1e-4, 50,000 encoder steps.

    Steps and batch are for two CPU cores; on a GPU give the paper's.
    """

    name: ClassVar[str] = "fanogan"

    side: int = 64
    width: int = 64
    batch: int = 16
    critic_steps: int = 3
    gan_steps: int = 800
    encoder_steps: int = 2400
    learning_rate: float = 2e-4

    def __post_init__(self) -> None:
        if self.side not in SIZES:
            raise TrainingError(f"size {self.side}: must be one of {SIZES} for {self.name}")

    def input_spec(self, surveyed: Pictures, tile: int | None, overlap: float) -> InputSpec:
        """A square of one of SIZES, grey or colour as the pictures are."""
        grey = surveyed.channels == 1
        return InputSpec(
            height=self.side, width=self.side, channels=1 if grey else 3, order="grey" if grey else "bgr", tile=tile,
            overlap=overlap,
        )  # fmt: skip

    def within_ms(self, surveyed: Pictures, tile: int | None, overlap: float, latency_ms: float) -> Fanogan:
        """The widest network of this size that is fast enough, at most these settings'."""
        took: list[str] = []
        for width in (self.width, *(w for w in (48, 32, 24, 16, 8, 4) if w < self.width)):
            settings = replace(self, width=width)
            spec = settings.input_spec(surveyed, tile, overlap)
            shape = self.side, spec.channels, width
            networks = fanogan.Generator(*shape), fanogan.critic(*shape), fanogan.encoder(*shape)
            graph = fanogan.FanoganGraph(*networks, self.side).eval()
            needed = export.latency_ms(graph, np.zeros((1, self.side, self.side, spec.channels), np.uint8))
            needed *= preprocess.tile_count(spec, surveyed.width_px, surveyed.height_px)
            if needed <= latency_ms:
                return settings
            took.append(f"{needed:.0f} ms at width {width}")
        raise TrainingError(
            f"no width is judged within {latency_ms:g} ms here: {', '.join(took)}", hint="give more --latency-ms, or no --tile"
        )

    def fit(self, surveyed: Pictures, spec: InputSpec, window: Window | None, run: Run) -> Fitted:
        """Fit to three folds of four, score the fourth."""
        held = surveyed.folds(4) == _HELD_OUT
        tiles = load_tiles(surveyed.paths, spec, window)
        fitter = Fitter(tiles.of(~held).images, self, run, surveyed.digest)
        if run.left_s() is not None:
            fitter.hurry()
        graph = fitter.graph()
        fitted_tiles, held_tiles = tiles.of(~held), tiles.of(held)
        graph.balance(torch.from_numpy(fitted_tiles.images))
        watched = watching.watch(fitter.drawn, fitted_tiles.images, held_tiles.images)
        return Fitted(
            graph, scored(graph, held_tiles, len(surveyed.paths)), np.empty(0), "held out: the network never saw these parts",
            watched.figures(), watched.said(), (fanogan.Drawing(fitter.g).cpu().eval(), fanogan.LATENT),
            sheets="Good parts, what E and G make of them, what G draws freely; after more and more steps.",
        )  # fmt: skip


def scored(graph: fanogan.FanoganGraph, tiles: Tiles, count: int) -> NDArray[np.float64]:
    """Score of each of `count` pictures, NaN without tiles."""
    scores = np.full(count, np.nan)
    for start in range(0, len(tiles.images), 32):
        part = slice(start, start + 32)
        with torch.no_grad():
            found = graph(torch.from_numpy(tiles.images[part]), torch.from_numpy(tiles.valid[part]))[0]
        np.fmax.at(scores, tiles.picture[part], found.numpy().astype(np.float64))
    return scores


class Fitter:
    """The networks, their optimisers and the random state: everything a checkpoint holds."""

    def __init__(self, tiles: NDArray[np.uint8], settings: Fanogan, run: Run, digest: str) -> None:
        """tiles: uint8 [N, S, S, C], those the network may see."""
        torch.manual_seed(run.seed)
        s, channels = settings, tiles.shape[3]
        self.settings, self.run, self.tiles = settings, run, torch.from_numpy(tiles)
        # More encoder steps go on where fewer ended; everything else makes another network.
        fixed = {name: value for name, value in asdict(s).items() if name != "encoder_steps"}
        self.key = key_of({**fixed, "seed": run.seed, "digest": digest}, tiles)
        self.g = self._placed(fanogan.Generator(s.side, channels, s.width))
        self.d = self._placed(fanogan.critic(s.side, channels, s.width))
        self.e = self._placed(fanogan.encoder(s.side, channels, s.width))
        betas = (0.0, 0.9)
        self.optimisers = {
            "g": torch.optim.Adam(self.g.parameters(), s.learning_rate, betas),
            "d": torch.optim.Adam(self.d.parameters(), s.learning_rate, betas),
            "e": torch.optim.Adam(self.e.parameters(), s.learning_rate),
        }
        self.gan_step = self.encoder_step = 0
        self._sheet_latents = torch.randn(_SHEET, fanogan.LATENT, device=run.device)

    def _placed(self, network: Any) -> Any:
        return network.to(device=self.run.device, memory_format=torch.channels_last)

    # --- the two loops

    def gan(self) -> None:
        """Train G and D from where the checkpoint ends."""
        s = self.settings
        self._resume()
        while self.gan_step < s.gan_steps:
            figures = self._step_gan()
            self.gan_step += 1
            self._kept("GAN", self.gan_step, s.gan_steps, figures)
        self.g.eval().requires_grad_(False)
        self.d.eval().requires_grad_(False)

    def hurry(self) -> None:
        """Take as many steps of both kinds as the time that is left allows; what a resumed run did before counts too."""
        s, key = self.settings, f"{self.key}-plan"
        plan = self.run.load("plan", key)
        if plan is None:
            trial = Fitter(self.tiles.numpy(), s, self.run, "trial")
            costs = []
            for step in (trial._step_gan, trial._step_encoder):
                step()
                began = time.monotonic()
                for _ in range(_TRIAL):
                    step()
                costs.append((time.monotonic() - began) / _TRIAL)
            whole_s = s.gan_steps * costs[0] + s.encoder_steps * costs[1]
            plan = {"share": self.run.shared(0.9 * (self.run.left_s() or 0.0) / whole_s, 0)}
            self.run.save("plan", key, plan)
        share = plan["share"]
        self.settings = replace(
            s, gan_steps=max(1, int(share * s.gan_steps)), encoder_steps=max(1, int(share * s.encoder_steps))
        )

    def graph(self) -> fanogan.FanoganGraph:
        """Train everything; returns the graph on the CPU, in evaluation mode."""
        s = self.settings
        self.gan()
        while self.encoder_step < s.encoder_steps:
            figures = self._step_encoder()
            self.encoder_step += 1
            self._kept("encoder", self.encoder_step, s.encoder_steps, figures)
        self.e.eval()
        return fanogan.FanoganGraph(self.g, self.d, self.e, s.side).cpu().eval()

    def drawn(self, latents: Tensor) -> NDArray[np.uint8]:
        """Pictures that G makes of latents [N, LATENT]: uint8 [N, S, S, C]."""
        self.g.eval()
        with torch.no_grad():
            parts = [self.g(part.to(next(self.g.parameters()).device)) for part in latents.split(64)]  # type: ignore[no-untyped-call]
        return np.ascontiguousarray(fanogan.as_pixels(torch.cat(parts)).cpu().numpy())

    def _kept(self, stage: str, step: int, steps: int, figures: dict[str, float]) -> None:
        self.run.tell(stage, step, steps, figures)
        if step % _SHEET_EVERY == 0 or step == steps:
            self.run.sheet(f"{stage.lower()}-{step:06d}", self.sheet())
        if step == steps:
            self.run.save(_NAME, self.key, self._state())
        else:
            self.run.keep(_NAME, self.key, self._state)
        self.run.stop_if_asked()

    def _real(self) -> Tensor:
        chosen = torch.randint(len(self.tiles), (self.settings.batch,))
        batch = self.tiles[chosen].to(self.run.device).permute(0, 3, 1, 2)  # channels-last in memory, as the networks are
        return batch.float() / 127.5 - 1

    def _fake(self) -> Tensor:
        fake: Tensor = self.g(torch.randn(self.settings.batch, fanogan.LATENT, device=self.run.device))
        return fake

    def _step_gan(self) -> dict[str, float]:
        self.run.reseed(0, self.gan_step)  # a resumed run draws what an uninterrupted one does; each process its own
        wasserstein, penalty = 0.0, 0.0
        for _ in range(self.settings.critic_steps):
            with torch.no_grad():
                fake = self._fake()
            loss, smooth = fanogan.critic_loss(self.d, self._real(), fake)
            self._descend("d", self.d, loss + smooth)
            wasserstein, penalty = -loss.item(), smooth.item()
        self._descend("g", self.g, -self.d(self._fake()).mean())
        return {"wasserstein": wasserstein, "penalty": penalty}

    def _step_encoder(self) -> dict[str, float]:
        self.run.reseed(1, self.encoder_step)
        loss = fanogan.izi_f_loss(self._real(), self.g, self.d, self.e)
        self._descend("e", self.e, loss)
        return {"residual": loss.item()}

    def _descend(self, name: str, network: Any, loss: Tensor) -> None:
        optimiser = self.optimisers[name]
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.run.average(network.parameters())
        optimiser.step()

    # --- what people look at

    @torch.no_grad()
    def sheet(self) -> NDArray[np.uint8]:
        """Three rows: good parts, what E and G make of them, what G draws from fixed latents."""
        self.g.eval()
        self.e.eval()
        chosen = np.linspace(0, len(self.tiles) - 1, _SHEET).astype(int)
        real = self.tiles[chosen].to(self.run.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        rows = [real, self.g(self.e(real)), self.g(self._sheet_latents)]
        if self.gan_step < self.settings.gan_steps:
            self.g.train()
        self.e.train()
        pixels = ((torch.cat([torch.cat(list(row), 2) for row in rows], 1) + 1) * 127.5).clamp(0, 255)
        return np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy().astype(np.uint8))

    # --- checkpoints

    def _networks(self) -> Iterator[tuple[str, Any]]:
        yield from (("g", self.g), ("d", self.d), ("e", self.e))

    def _state(self) -> dict[str, Any]:
        return {
            "steps": [self.gan_step, self.encoder_step],
            "networks": {name: network.state_dict() for name, network in self._networks()},
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
        }

    def _resume(self) -> None:
        state = self.run.load(_NAME, self.key)
        if state is None:
            return
        for name, network in self._networks():
            network.load_state_dict(state["networks"][name])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        self.gan_step, self.encoder_step = state["steps"]
