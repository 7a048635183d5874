"""Fitting feature-anogan: heads for every fold and for all, then what each term is worth."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from edge_inspector import preprocess
from edge_inspector.bundles import InputSpec
from edge_inspector.errors import TrainingError
from edge_inspector.preprocess import Window
from edge_inspector.training import export
from edge_inspector.training.data import Pictures, load_tiles
from edge_inspector.training.networks import Fitted
from edge_inspector.training.networks import feature_anogan as networks
from edge_inspector.training.networks.backbone import Backbone
from edge_inspector.training.networks.feature_material import (
    COVERED,
    MOST_PLACES,
    WITHHELD,
    Extractor,
    Material,
    Store,
    gathered,
    parts,
)
from edge_inspector.training.networks.feature_weights import Weighing, cross_fit, score_of, term_maps, weighed
from edge_inspector.training.run import Run, key_of

_BATCH = 8
_RIDGE = 0.05
"""Added to covariances of standardised features, so that directions good parts never vary in do not decide alone."""
_CORESET_ROWS, _SKETCH = 40_000, 64
_ROWS, _ROW_BATCH, _TILES, _NEAR = 120_000, 1024, 128, 0.05
_NOISE = 0.5
_EXEMPLARS, _WIDEST = 24, 4096
_ENOUGH = 300
"""Pictures that are judged for the promise however short the time."""
_STAGES = ("generator", "discriminator")
_FIGURE = {"generator": "residual", "discriminator": "loss"}
_SIDES = (512, 448, 384, 320, 256, 192, 128)
_TRIALS, _MOST_STEPS, _SPENT = (20, 40), 4000, 0.7
"""Steps of the two short fits; the most that are taken; the share of the time that heads may take."""

Network = TypeVar("Network", bound=nn.Module)
Loss = Callable[[int], Tensor]
"""The loss of a step, by its number."""


def _rows(f: Tensor) -> Tensor:
    """[N, C, h, w] -> [N h w, C]."""
    return f.permute(0, 2, 3, 1).reshape(-1, f.shape[1])


def _whitening(covariance: Tensor) -> Tensor:
    """W with W W^T = (covariance + ridge I)^-1, for each of many covariances [N, C, C]."""
    regular = covariance.double() + _RIDGE * torch.eye(covariance.shape[-1], dtype=torch.float64)
    factor = torch.linalg.cholesky(regular)
    inverse = torch.linalg.solve_triangular(factor, torch.eye(factor.shape[-1], dtype=torch.float64), upper=False)
    whitening: Tensor = inverse.mT.float()
    return whitening


def centres(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Greedy k-centre choice among rows [n, C], by distances in a random projection (Roth et al. 2022, section 3.2)."""
    sketch = rows @ (torch.randn(rows.shape[1], _SKETCH, generator=generator) / _SKETCH**0.5)
    distance = torch.full((len(rows),), torch.inf)
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    for _ in range(min(count, len(rows)) - 1):
        distance = torch.minimum(distance, ((sketch - sketch[chosen[-1]]) ** 2).sum(1))
        chosen.append(int(distance.argmax()))
    return torch.tensor(chosen)


class _Fitter:
    """Fits heads to the good tiles outside one fold (to all for fold -1)."""

    def __init__(self, material: Material, settings: FeatureAnogan, run: Run, fold: int, key: str | None = None) -> None:
        """`key`: of checkpoints within the fold; None: there are none."""
        self.material, self.settings, self.run, self.fold, self.key = material, settings, run, fold, key
        self.chosen = torch.from_numpy(np.flatnonzero(material.fold != fold))
        self.mean, self.spread = self._moments()

    def heads(self) -> networks.Heads:
        """Everything, one after the other."""
        self._seed(0)
        drawing = self._generator()
        self._seed(1)
        fitted = networks.Heads(self.mean, self.spread, self._gaussian(), self._bank(), drawing, self._discriminator(drawing))
        return fitted.eval()

    def _seed(self, *parts: int) -> None:
        """By fold and place alone: a resumed fit draws what an uninterrupted one does, in whatever process."""
        torch.manual_seed(int(torch.randint(2**53, (1,), generator=self.run.seeded(self.fold, *parts))))

    def _fitted(self, stage: str, network: Network, optimiser: torch.optim.Optimizer, most: float, loss: Loss) -> Network:
        """Take every step of one network, from where its checkpoint ends; `most`: the highest learning rate."""
        steps, name = self.settings.steps, f"{_name(self.fold)}-{stage}"
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, most, total_steps=steps, pct_start=0.1)
        state: dict[str, Any] | None = self.run.load(name, self.key) if self.key is not None else None
        if state is not None:
            network.load_state_dict(state["network"])
            optimiser.load_state_dict(state["optimiser"])
            schedule.load_state_dict(state["schedule"])

        def reached() -> dict[str, Any]:
            return {
                "step": step + 1, "network": network.state_dict(), "optimiser": optimiser.state_dict(),
                "schedule": schedule.state_dict(),
            }  # fmt: skip

        network.train()
        for step in range(state["step"] if state is not None else 0, steps):
            self._seed(_STAGES.index(stage), step)
            found = loss(step)
            optimiser.zero_grad()
            found.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            self._tell(stage, step + 1, steps, {_FIGURE[stage]: found.item()} if step % 20 == 19 else {})
            if self.key is not None:
                self.run.keep(name, self.key, reached)
            self.run.stop_if_asked()
        return network.eval()

    def _scaled(self, raw: Tensor) -> Tensor:
        return (raw - self.mean[:, None, None]) / self.spread[:, None, None]

    def _standardised(self, store: Store, index: Tensor) -> Tensor:
        return self._scaled(store.raw(index))

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and spread of each channel over judged places, of tiles taken evenly."""
        total, squares, count = torch.zeros(networks.DEPTH), torch.zeros(networks.DEPTH), 0
        for part in parts(self.chosen[:: max(1, len(self.chosen) // _TILES)]):
            rows = _rows(self.material.good.raw(part))[self.material.judged[part].flatten()]
            total, squares, count = total + rows.sum(0), squares + (rows**2).sum(0), count + len(rows)
        mean = total / count
        return mean, (squares / count - mean**2).clamp(min=0).sqrt() + 1e-6

    def _some(self, most: int) -> Tensor:
        """At most so many of the tiles, at random."""
        return self.chosen[torch.randperm(len(self.chosen))[:most]]

    def _sampled(self, store: Store, most: float, seen: Callable[[Tensor], Tensor]) -> Tensor:
        """About `most` rows of seen(features) at judged places, evenly over at most _TILES tiles: [rows, columns]."""
        tiles = self._some(_TILES)
        share = most / max(1, int(self.material.judged[tiles].sum()))
        out = []
        for part in parts(tiles):
            kept = (self.material.judged[part] & (torch.rand(self.material.judged[part].shape) < share)).flatten()
            out.append(seen(self._standardised(store, part))[kept])
        return torch.cat(out)

    def _gaussian(self) -> networks.LocalGaussian:
        """Means and block covariances over good and jittered tiles, in one pass."""
        m, block = self.material, networks.BLOCK
        h, w = self.material.judged.shape[1:]
        rows, columns = h // block, w // block

        def blocks(f: Tensor) -> Tensor:
            split = f.reshape(-1, networks.DEPTH, rows, block, columns, block)
            return split.permute(2, 4, 0, 3, 5, 1).reshape(rows * columns, -1, networks.DEPTH)

        total, squares = torch.zeros(networks.DEPTH, h, w), torch.zeros(rows * columns, networks.DEPTH, networks.DEPTH)
        for store in (m.good, m.jittered):
            for part in parts(self.chosen):
                f = self._standardised(store, part)
                total += f.sum(0)
                x = blocks(f)
                squares += x.mT @ x
        mean = total / (2 * len(self.chosen))
        centre = blocks(mean[None])
        covariance = (squares / (2 * len(self.chosen)) - centre.mT @ centre) / block**2
        whitening = _whitening(covariance)
        return networks.LocalGaussian(mean, whitening.reshape(rows, columns, networks.DEPTH, networks.DEPTH))

    def _bank(self) -> networks.Bank:
        rows = self._sampled(self.material.good, _CORESET_ROWS, _rows)
        return networks.Bank(rows[centres(rows, self.settings.prototypes, self.run.seeded(self.fold, 1))])

    def _generator(self) -> networks.Generator:
        """Half of what it is given carries a drawn defect, and must come out as the part would be without."""
        m, device = self.material, self.run.device
        network = networks.Generator().to(device)
        optimiser = torch.optim.AdamW(network.parameters(), 1.5e-3, betas=(0.5, 0.999))

        def loss(step: int) -> Tensor:
            index = self.chosen[torch.randint(len(self.chosen), (_BATCH,))]
            clean = self._scaled((m.jittered if step % 2 else m.good).coarse[index].float()).to(device)
            drawn = network.coarse(self._scaled(m.spoiled.coarse[index].float()).to(device) if step % 2 else clean)
            away = (1 - functional.cosine_similarity(drawn, clean, dim=1)).mean()
            return away + 0.1 * functional.smooth_l1_loss(drawn, clean)

        return self._fitted("generator", network, optimiser, 1.5e-3, loss)

    def _discriminator(self, drawing: networks.Generator) -> networks.Discriminator:
        """Good places against noisy ones, and against drawn defects (with less weight where they are already told apart)."""
        m, device = self.material, self.run.device
        network = networks.Discriminator().to(device)

        def seen(f: Tensor) -> Tensor:
            f = f.to(device)
            return _rows(network.seen(f, drawing.coarse(functional.avg_pool2d(f, 2)))).cpu()

        with torch.no_grad():
            some = self._standardised(m.good, self._some(32)).to(device)
            network.spread.copy_(network.residual(some, drawing.coarse(functional.avg_pool2d(some, 2))).std())
            good = torch.cat([self._sampled(store, _ROWS / 2, seen) for store in (m.good, m.jittered)])
            near, bad = [], []
            for part in parts(self._some(2 * _TILES)):
                rows, covered = seen(self._standardised(m.spoiled, part)), m.spoiled.defective[part].flatten()
                inside = self.material.judged[part].flatten()
                bad.append(rows[inside & (covered > COVERED)])
                near.append(rows[inside & (covered == 0) & (torch.rand(len(rows)) < _NEAR)])
        classes = ((good, _ROW_BATCH), (torch.cat(near), _ROW_BATCH // 4), (torch.cat(bad), _ROW_BATCH // 4))
        optimiser = torch.optim.AdamW(network.parameters(), 8e-4)

        def loss(_: int) -> Tensor:
            drawn = [rows[torch.randint(len(rows), (n,))].to(device) for rows, n in classes]
            strength = _NOISE * torch.exp(torch.empty(_ROW_BATCH, 1, device=device).uniform_(-0.7, 0.7))
            drawn.append(drawn[0] + torch.randn_like(drawn[0]) * strength)
            fine, beside, spoilt, noisy = (
                network.body(torch.cat(drawn)[:, :, None, None]).flatten().split([len(rows) for rows in drawn])
            )
            return _crossed(fine, 0).mean() + _crossed(noisy, 1).mean() + 2 * (_focal(beside, 0) + _focal(spoilt, 1))

        return self._fitted("discriminator", network, optimiser, 8e-4, loss)

    def _tell(self, stage: str, step: int, steps: int, figures: dict[str, float]) -> None:
        name = f"{stage} {self.fold + 1} of {self.settings.folds}" if self.fold >= 0 else f"{stage} for all"
        self.run.tell(name, step, steps, figures)


def _name(fold: int) -> str:
    """Of a fold's checkpoints."""
    return f"heads-{fold}" if fold >= 0 else "heads-all"


def _crossed(logit: Tensor, target: int) -> Tensor:
    """Binary cross entropy, one value each."""
    return functional.binary_cross_entropy_with_logits(logit, torch.full_like(logit, target), reduction="none")


def _focal(logit: Tensor, target: int) -> Tensor:
    """Cross entropy that counts what is already told apart less (Lin et al. 2017, eq. 4, gamma 2), mean."""
    right = torch.sigmoid(logit if target else -logit)
    return ((1 - right) ** 2 * _crossed(logit, target)).mean()


# --- the family


@dataclass(frozen=True)
class FeatureAnogan:
    """Settings of the flagship. Defaults were chosen on development sets (ARCHITECTURE.md)."""

    name: ClassVar[str] = "feature-anogan"

    side: int = 384
    """The network's input has about side x side pixels, in the pictures' own shape."""
    prototypes: int = 1024
    steps: int = 400
    """For the generator, and again for the discriminator."""
    folds: int = 3
    most_places: int = MOST_PLACES
    """Of more tiles so many are taken, evenly, as have that many feature places."""
    int8: bool = False
    """Quantise the backbone first, and fit everything to its features."""

    def __post_init__(self) -> None:
        if not 64 <= self.side <= 1024:
            raise TrainingError(f"size {self.side}: must lie between 64 and 1024 for {self.name}")

    def input_spec(self, surveyed: Pictures, tile: int | None, overlap: float) -> InputSpec:
        """Same shape as the pictures (tiles are square), multiples of 32, about side^2 pixels."""
        aspect = surveyed.width_px / surveyed.height_px if tile is None else 1.0
        height, width = (max(32, 32 * round(self.side * ratio / 32)) for ratio in (aspect**-0.5, aspect**0.5))
        if max(height, width) > _WIDEST:
            raise TrainingError(
                f"pictures of {surveyed.width_px}x{surveyed.height_px} would need an input of {width}x{height}",
                hint=f"cut them into squares: --tile {min(surveyed.width_px, surveyed.height_px)}",
            )
        enlarged = (tile or surveyed.width_px) < width
        return InputSpec(
            height=height, width=width, channels=3, order="rgb", interpolation="linear" if enlarged else "area",
            tile=tile, overlap=overlap,
        )  # fmt: skip

    def fit(self, surveyed: Pictures, spec: InputSpec, window: Window | None, run: Run) -> Fitted:
        """Features once; heads for each fold and for all; weights and scores from the folds."""
        material = gathered(
            surveyed.paths, surveyed.folds(self.folds), spec, window, run, most_places=self.most_places, int8=self.int8,
            digest=surveyed.digest,
        )  # fmt: skip
        about = {"seed": run.seed, "digest": surveyed.digest, "input": spec.model_dump(), "window": window}
        settings = self if run.left_s() is None else self._affordable(material, run, key_of({**asdict(self), **about}))
        every = settings.heads(material, run, key_of({**asdict(settings), **about}))
        crossed, heads, backbone = cross_fit(material, every), every[-1], material.extractor.exported
        weighing = weighed(crossed)
        graph = networks.FeatureAnoganGraph(backbone, heads, _exemplars(heads, material, run), weighing.weights).eval()
        scores = np.full(len(surveyed.paths), np.nan)
        np.fmax.at(scores, material.picture, crossed.scores(weighing.weights, spoiled=False))
        scores[~material.whole] = np.nan
        if run.first and not material.whole.all():
            by_fold = [every[fold] for fold in surveyed.folds(self.folds)]
            _judge_others(scores, surveyed.paths, by_fold, weighing.weights, material.extractor, (spec, window), run)
        return Fitted(
            graph, scores, f"cross-fitted: each part by a network fitted to the other {self.folds - 1} of {self.folds} folds",
            {"drawn_defects_auroc": weighing.auroc, "steps": settings.steps}, self._notes(weighing, material),
            sheets="Parts with drawn defects, and the anomaly maps of networks that knew neither the parts nor such defects.",
        )  # fmt: skip

    def within_ms(self, surveyed: Pictures, tile: int | None, overlap: float, latency_ms: float) -> FeatureAnogan:
        """The largest input whose pictures are judged within the time by ONNX Runtime here, at most these settings'.

        Raises TrainingError where none is.
        """
        took: list[str] = []
        for side in (self.side, *(s for s in _SIDES if s < self.side)):
            settings = replace(self, side=side)
            spec = settings.input_spec(surveyed, tile, overlap)
            tiles = preprocess.tile_count(spec, surveyed.width_px, surveyed.height_px)
            h, w = spec.height // networks.STRIDE, spec.width // networks.STRIDE
            exemplars = networks.Exemplars(torch.zeros(1, networks.DEPTH * h * w // 16), torch.zeros(1, 4 * h, 4 * w, 3))
            heads, weights = networks.empty_heads(h, w, self.prototypes), dict.fromkeys(networks.TERMS, (0.0, 1.0))
            graph = networks.FeatureAnoganGraph(Backbone(), heads, exemplars, weights).eval()
            needed = tiles * export.latency_ms(graph, np.zeros((1, spec.height, spec.width, 3), np.uint8))
            if needed <= latency_ms:
                return settings
            took.append(f"{needed:.0f} ms at {side}")
        raise TrainingError(
            f"no input size is judged within {latency_ms:g} ms here: {', '.join(took)}",
            hint="give more --latency-ms, or no --tile",
        )

    def _affordable(self, material: Material, run: Run, key: str) -> FeatureAnogan:
        """As many steps as the time that is left allows: two short fits tell what a fit costs, and what a step."""
        plan = run.load("plan", key)
        if plan is None:
            costs = []
            for steps in _TRIALS:
                began = time.monotonic()
                _Fitter(material, replace(self, steps=steps), run, 0).heads()
                costs.append(time.monotonic() - began)
            step_s = max(1e-4, (costs[1] - costs[0]) / (_TRIALS[1] - _TRIALS[0]))
            each_s = _SPENT * (run.left_s() or 0.0) * run.world / (self.folds + 1)
            steps = int(np.clip((each_s - costs[0]) / step_s + _TRIALS[0], _TRIALS[1], _MOST_STEPS))
            plan = {"steps": run.shared(steps, 0)}
            run.save("plan", key, plan)
        return replace(self, steps=plan["steps"])

    def _notes(self, weighing: Weighing, material: Material) -> tuple[str, ...]:
        notes = [f"drawn defects of kinds never trained on are told from good parts with AUROC {weighing.auroc:.3f}"]
        if len(weighing.weights) < len(networks.TERMS):
            notes.append(f"terms: {', '.join(weighing.weights)}; the others made drawn defects harder to tell")
        if "gaussian" not in weighing.weights:
            notes.append("where a feature lies did not help: the parts lie freely, or look the same everywhere")
        if not material.whole.all():
            notes.append(f"fitted to {len(material.good)} tiles, taken evenly of more; the others were judged for the promise")
        return tuple(notes)

    def heads(self, material: Material, run: Run, key: str) -> dict[int, networks.Heads]:
        """Heads without each fold, and for all under -1; fitted by the processes in turn, or read from checkpoints."""
        folds = (*range(self.folds), -1)
        loaded = {fold: run.load(_name(fold), key) for fold in folds}
        states = {fold: state for fold, state in loaded.items() if state is not None}
        missing = [fold for fold in folds if fold not in states]
        for start in range(0, len(missing), run.world):
            together = missing[start : start + run.world]
            fitted = None
            if run.rank < len(together):
                heads = _Fitter(material, self, run, together[run.rank], key if run.world == 1 else None).heads()
                fitted = {"heads": heads.cpu().state_dict()}, run.losses
            for owner, fold in enumerate(together):
                states[fold], losses = run.shared(fitted, owner)
                run.losses.update(losses)
                run.save(_name(fold), key, states[fold])
                for stage in _STAGES:
                    run.drop(f"{_name(fold)}-{stage}")
                if fold >= 0 and run.first and material.drawn:
                    run.sheet(_name(fold), _sheet(_loaded(states[fold]["heads"], material), material, fold))
            run.stop_if_asked()
        return {fold: _loaded(state["heads"], material) for fold, state in states.items()}


@torch.no_grad()
def _exemplars(heads: networks.Heads, material: Material, run: Run) -> networks.Exemplars:
    """Good tiles that are most unlike each other."""
    keys = []
    for part in parts(torch.arange(len(material.good))):
        f = heads.standardised(material.good.raw(part))
        keys.append(networks.Exemplars.key(heads.generator.coarse(functional.avg_pool2d(f, 2))))
    chosen = centres(torch.cat(keys), _EXEMPLARS, run.seeded(-2))
    return networks.Exemplars(torch.cat(keys)[chosen], material.shown[chosen])


def _judge_others(
    scores: NDArray[np.float64], paths: Sequence[Path], heads: Sequence[networks.Heads],
    weights: dict[str, tuple[float, float]], extractor: Extractor, seen_as: tuple[InputSpec, Window | None], run: Run,
) -> None:  # fmt: skip
    """Fill in the scores that are still NaN, each by the heads that did not see the picture, as far as time allows."""
    order = run.rng(len(paths)).permutation(np.flatnonzero(np.isnan(scores)))
    for done, number in enumerate(order, 1):
        tiles = load_tiles([paths[number]], *seen_as)
        found = [
            score_of(heads[number], weights, *extractor(list(tiles.images[part])), torch.from_numpy(tiles.valid[part]))
            for part in (slice(start, start + _BATCH) for start in range(0, len(tiles.images), _BATCH))
        ]
        scores[number] = max(found)
        run.step("judging the others", done, len(order))
        if done >= _ENOUGH and run.left_s() == 0:
            return


def _loaded(state: dict[str, Tensor], material: Material) -> networks.Heads:
    h, w = material.judged.shape[1:]
    heads = networks.empty_heads(h, w, len(state["bank.square"]))
    heads.load_state_dict(state)
    return heads.eval().requires_grad_(False)


def _sheet(heads: networks.Heads, material: Material, fold: int) -> NDArray[np.uint8]:
    """Parts of the fold with drawn defects, none of which these heads know, above their anomaly maps."""
    rows = [row for row in material.drawn if material.fold[row // WITHHELD] == fold]
    maps = term_maps(heads, material.withheld, torch.tensor(rows))
    far = ((maps - maps.mean((0, 2, 3), keepdim=True)) / maps.std((0, 2, 3), keepdim=True)).sum(1)
    level = (255 * far / far.amax()).clamp(0, 255).to(torch.uint8).numpy()
    shown = [material.drawn[row] for row in rows]
    size = shown[0].shape[1], shown[0].shape[0]
    heat = [cv2.applyColorMap(cv2.resize(m, size, interpolation=cv2.INTER_LINEAR), cv2.COLORMAP_INFERNO) for m in level]
    return np.vstack([np.hstack(shown)[:, :, ::-1], np.hstack(heat)]).astype(np.uint8)
