"""Fitting feature-anogan: heads for every fold and for all, then what each term is worth."""

from __future__ import annotations

import tempfile
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
from edge_inspector.training.networks import Fitted, Half, backbone_file
from edge_inspector.training.networks import feature_anogan as networks
from edge_inspector.training.networks.backbone import Source
from edge_inspector.training.networks.feature_material import (
    COVERED,
    MOST_PLACES,
    WITHHELD,
    Extractor,
    Material,
    gathered,
    parts,
)
from edge_inspector.training.networks.feature_residuals import Residuals, moments, rows_of, sampled
from edge_inspector.training.networks.feature_weights import (
    Weighing,
    cross_fit,
    score_of,
    tensors,
    term_maps,
    to_teach_from,
    weighed,
)
from edge_inspector.training.normals import centres
from edge_inspector.training.run import Run, key_of

_BATCH = 8
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


class Drawing(nn.Module):
    """Generator and discriminator, and the scale of the features that they take."""

    def __init__(
        self, mean: Tensor, spread: Tensor, generator: networks.Generator, discriminator: networks.Discriminator
    ) -> None:
        """Mean and spread: [C] of the raw features."""
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("spread", spread)
        self.mean: Tensor
        self.spread: Tensor
        self.generator, self.discriminator = generator, discriminator

    @staticmethod
    def loaded(state: dict[str, Tensor]) -> Drawing:
        """From a checkpoint."""
        empty = torch.zeros_like(state["mean"])
        depth = len(empty)
        drawing = Drawing(empty, empty.clone(), networks.Generator(depth), networks.Discriminator(depth))
        drawing.load_state_dict(state)
        return drawing.eval()


class _Fitter:
    """Fits generator and discriminator to the good tiles outside one group of folds (to all for group -1)."""

    def __init__(self, material: Material, settings: FeatureAnogan, run: Run, group: int, key: str | None = None) -> None:
        """`key`: of checkpoints within the group; None: there are none."""
        self.material, self.settings, self.run, self.group, self.key = material, settings, run, group, key
        self.chosen = torch.from_numpy(np.flatnonzero(settings.group_of(material.fold) != group))
        self.mean, self.spread = moments(material, self.chosen)

    def drawing(self) -> Drawing:
        """Both, one after the other."""
        self._seed(0)
        generator = self._generator()
        self._seed(1)
        return Drawing(self.mean, self.spread, generator, self._discriminator(generator))

    def _seed(self, *parts: int) -> None:
        """By group and place alone: a resumed fit draws what an uninterrupted one does, in whatever process."""
        torch.manual_seed(int(torch.randint(2**53, (1,), generator=self.run.seeded(self.group, *parts))))

    def _fitted(self, stage: str, network: Network, optimiser: torch.optim.Optimizer, most: float, loss: Loss) -> Network:
        """Take every step of one network, from where its checkpoint ends; `most`: the highest learning rate."""
        steps, name = self.settings.steps, f"{_name(self.group)}-{stage}"
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
        return networks.scaled(raw, self.mean, self.spread)

    def _some(self, most: int) -> Tensor:
        """At most so many of the tiles, at random."""
        return self.chosen[torch.randperm(len(self.chosen))[:most]]

    def _generator(self) -> networks.Generator:
        """Half of what it is given carries a drawn defect, and must come out as the part would be without."""
        m, device = self.material, self.run.device
        network = networks.Generator(m.good.depth).to(device)
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
        network = networks.Discriminator(m.good.depth).to(device)

        def seen(raw: Tensor) -> Tensor:
            f = self._scaled(raw).to(device)
            return rows_of(network.seen(f, drawing.coarse(functional.avg_pool2d(f, 2)))).cpu()

        with torch.no_grad():
            some = self._scaled(m.good.raw(self._some(32))).to(device)
            network.spread.copy_(network.residual(some, drawing.coarse(functional.avg_pool2d(some, 2))).std())
            good = torch.cat([sampled(m, store, self.chosen, _ROWS / 2, seen) for store in (m.good, m.jittered)])
            near, bad = [], []
            for part in parts(self._some(2 * _TILES)):
                rows, covered = seen(m.spoiled.raw(part)), m.spoiled.defective[part].flatten()
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
        name = f"{stage} {self.group + 1} of {self.settings.groups}" if self.group >= 0 else f"{stage} for all"
        self.run.tell(name, step, steps, figures)


def _name(group: int) -> str:
    """Of a group's checkpoints."""
    return f"drawing-{group}" if group >= 0 else "drawing-all"


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

    side: int = 256
    """The network's input has about side x side pixels, in the pictures' own shape."""
    prototypes: int = 1024
    steps: int = 400
    """For the generator, and again for the discriminator."""
    folds: int = 12
    """Each part is judged for the promise by residuals that were fitted to all other folds."""
    groups: int = 3
    """Generator and discriminator take the longest to fit; they leave out a group of folds each time, not one."""
    most_places: int = MOST_PLACES
    """Of more tiles so many are taken, evenly, as have that many feature places."""
    backbone: str = "lite2"
    """A packaged one, or an ONNX file that gives feature maps (`backbone_file.py`)."""
    int8: bool = False
    """Quantise the backbone first, and fit everything to its features."""

    def __post_init__(self) -> None:
        if self.folds % self.groups:
            raise TrainingError(f"folds {self.folds}: must be a multiple of groups, {self.groups}")
        if not 64 <= self.side <= 1024:
            raise TrainingError(f"size {self.side}: must lie between 64 and 1024 for {self.name}")
        backbone_file.source(self.backbone)  # what cannot be used is told before anything is read

    @property
    def source(self) -> Source:
        """Where the backbone comes from. Raises TrainingError for one that cannot be used."""
        return backbone_file.source(self.backbone)

    def input_spec(self, surveyed: Pictures, tile: int | None, overlap: float) -> InputSpec:
        """Same shape as the pictures (tiles are square), about side^2 pixels, in steps that the backbone takes."""
        taps = self.source.taps
        aspect, step = surveyed.width_px / surveyed.height_px if tile is None else 1.0, taps.multiple
        height, width = (max(step, step * round(self.side * ratio / step)) for ratio in (aspect**-0.5, aspect**0.5))
        if taps.fixed is not None:
            height, width = taps.fixed
            if height % step or width % step:
                raise TrainingError(
                    f"backbone {self.backbone}: takes {width}x{height} px only; multiples of {step} px are needed",
                    hint="export it for another size, or with free height and width",
                )
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
            surveyed.paths, surveyed.folds(self.folds), spec, window, run, self.source,
            most_places=self.most_places, int8=self.int8, digest=surveyed.digest,
        )  # fmt: skip
        about = {"seed": run.seed, "digest": surveyed.digest, "input": spec.model_dump(), "window": window}
        settings = self if run.left_s() is None else self._affordable(material, run, key_of({**asdict(self), **about}))
        every = settings.heads(material, run, key_of({**asdict(settings), **about}))
        crossed, heads, backbone = cross_fit(material, every), every[-1], material.extractor.exported
        weighing = weighed(crossed)
        half = self._half(material, every, weighing, run) if run.first and material.whole.all() else None
        used = weighing.of(crossed.usual)
        graph = networks.FeatureAnoganGraph(backbone, heads, _exemplars(heads, material, run), weighing.terms, *used).eval()
        scores = _by_picture(material, crossed.scores(weighing.weights, spoiled=False))
        scores[~material.whole] = np.nan
        if run.first and not material.whole.all():
            weights = torch.tensor(weighing.weights)[:, None, None]
            others = {fold: tensors(usual) for fold, usual in crossed.without.items()}
            judges = {fold: (every[fold], mean, weights / spread) for fold, (mean, spread) in others.items()}
            by_picture = [judges[fold] for fold in surveyed.folds(self.folds)]
            _judge_others(scores, surveyed.paths, by_picture, material.extractor, (spec, window), run)
        return Fitted(
            graph, scores, crossed.scores(weighing.weights, spoiled=True),
            f"cross-fitted: each part by networks fitted without its fold, one of {self.folds}",
            {"drawn_defects_auroc": weighing.auroc, "steps": settings.steps}, self._notes(weighing, material),
            half=half, backbone=material.extractor.used,
            material=to_teach_from(material, crossed, weighing, surveyed, self.folds) if run.first else None,
            sheets="Parts with drawn defects, and the anomaly maps of networks that knew neither the parts nor such defects.",
        )  # fmt: skip

    def within_ms(self, surveyed: Pictures, tile: int | None, overlap: float, latency_ms: float) -> FeatureAnogan:
        """The largest input whose pictures are judged within the time by ONNX Runtime here, at most these settings'.

        Raises TrainingError where none is.
        """
        took: list[str] = []
        taps = self.source.taps
        for side in (self.side, *(s for s in _SIDES if s < self.side)):
            settings = replace(self, side=side)
            spec = settings.input_spec(surveyed, tile, overlap)
            tiles = preprocess.tile_count(spec, surveyed.width_px, surveyed.height_px)
            h, w = taps.places(spec.height, spec.width)
            shown = torch.zeros(1, spec.height // 2, spec.width // 2, 3)
            exemplars = networks.Exemplars(torch.zeros(1, taps.depth * h * w // 16), shown)
            heads, usual = networks.empty_heads(taps.depth, h, w, self.prototypes), torch.ones(len(networks.TERMS), h, w)
            with tempfile.TemporaryDirectory() as folder:
                backbone = self.source.opened(Path(folder))
                graph = networks.FeatureAnoganGraph(backbone, heads, exemplars, networks.TERMS, usual, usual).eval()
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
                _Fitter(material, replace(self, steps=steps), run, 0).drawing()
                costs.append(time.monotonic() - began)
            step_s = max(1e-4, (costs[1] - costs[0]) / (_TRIALS[1] - _TRIALS[0]))
            each_s = _SPENT * (run.left_s() or 0.0) * run.world / (self.groups + 1)
            steps = int(np.clip((each_s - costs[0]) / step_s + _TRIALS[0], _TRIALS[1], _MOST_STEPS))
            plan = {"steps": run.shared(steps, 0)}
            run.save("plan", key, plan)
        return replace(self, steps=plan["steps"])

    def _notes(self, weighing: Weighing, material: Material) -> tuple[str, ...]:
        notes = [f"drawn defects of kinds never trained on are told from good parts with AUROC {weighing.auroc:.3f}"]
        if len(weighing.terms) < len(networks.TERMS):
            notes.append(f"terms: {', '.join(weighing.terms)}; the others made drawn defects harder to tell")
        if "gaussian" not in weighing.terms:
            notes.append("where a feature lies did not help: the parts lie freely, or look the same everywhere")
        notes.extend(self.source.remarks)
        if not material.whole.all():
            notes.append(f"fitted to {len(material.good)} tiles, taken evenly of more; the others were judged for the promise")
        return tuple(notes)

    def group_of(self, fold: NDArray[np.intp]) -> NDArray[np.intp]:
        """The group of each fold."""
        return fold % self.groups

    def heads(self, material: Material, run: Run, key: str) -> dict[int, networks.Heads]:
        """Heads without each fold, and for all under -1."""
        residuals, drawings = Residuals(material, self.prototypes, run), self._drawings(material, run, key)
        every = {}
        for number, fold in enumerate((*range(self.folds), -1), 1):
            drawing = drawings[fold % self.groups if fold >= 0 else -1]
            scale = drawing.mean, drawing.spread
            left_out = (fold,) if fold >= 0 else ()
            gaussian, bank = residuals.gaussian(left_out, *scale), residuals.bank(left_out, *scale)
            heads = networks.Heads(*scale, gaussian, bank, drawing.generator, drawing.discriminator)
            every[fold] = heads.eval().requires_grad_(requires_grad=False)
            run.step("residuals", number, self.folds + 1)
        for group in range(self.groups) if run.first and material.drawn else ():
            run.sheet(f"fold-{group}", _sheet(every[group], material, group))
        return every

    def _half(self, material: Material, every: dict[int, networks.Heads], weighing: Weighing, run: Run) -> Half | None:
        """What residuals of half the pictures would find; generator and discriminator are those without a group of folds."""
        if self.groups < 2:
            return None
        residuals = Residuals(material, self.prototypes, run)
        halved: dict[int, networks.Heads] = {}
        for group in range(self.groups):
            own = [fold for fold in range(self.folds) if fold % self.groups == group]
            others = [fold for fold in range(self.folds) if fold not in own]
            without, whole = [*own, *others[: self.folds // 2 - len(own)]], every[own[0]]
            scale = whole.mean.flatten(), whole.spread.flatten()
            found = residuals.gaussian(without, *scale), residuals.bank(without, *scale)
            heads = networks.Heads(*scale, *found, whole.generator, whole.discriminator).eval().requires_grad_(False)
            halved |= dict.fromkeys(own, heads)
            run.step("half of the pictures", group + 1, self.groups)
        crossed = cross_fit(material, halved)
        good = _by_picture(material, crossed.scores(weighing.weights, spoiled=False))
        return Half(good, crossed.scores(weighing.weights, spoiled=True))

    def _drawings(self, material: Material, run: Run, key: str) -> dict[int, Drawing]:
        """Without each group, and for all under -1; fitted by the processes in turn, or read from checkpoints."""
        groups = (*range(self.groups), -1)
        loaded = {group: run.load(_name(group), key) for group in groups}
        states = {group: state for group, state in loaded.items() if state is not None}
        missing = [group for group in groups if group not in states]
        for start in range(0, len(missing), run.world):
            together = missing[start : start + run.world]
            fitted = None
            if run.rank < len(together):
                drawing = _Fitter(material, self, run, together[run.rank], key if run.world == 1 else None).drawing()
                fitted = {"drawing": drawing.cpu().state_dict()}, run.losses
            for owner, group in enumerate(together):
                states[group], losses = run.shared(fitted, owner)
                run.losses.update(losses)
                run.save(_name(group), key, states[group])
                for stage in _STAGES:
                    run.drop(f"{_name(group)}-{stage}")
            run.stop_if_asked()
        return {group: Drawing.loaded(state["drawing"]) for group, state in states.items()}


def _by_picture(material: Material, scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Largest score of each picture's tiles; NaN where none is here."""
    found = np.full(len(material.whole), np.nan)
    np.fmax.at(found, material.picture, scores)
    return found


@torch.no_grad()
def _exemplars(heads: networks.Heads, material: Material, run: Run) -> networks.Exemplars:
    """Good tiles that are most unlike each other."""
    keys = []
    for part in parts(torch.arange(len(material.good))):
        f = heads.standardised(material.good.raw(part))
        keys.append(networks.Exemplars.key(heads.generator.coarse(functional.avg_pool2d(f, 2))))
    chosen = centres(torch.cat(keys).numpy(), _EXEMPLARS, run.rng(0, 2))
    return networks.Exemplars(torch.cat(keys)[chosen], material.shown[chosen])


def _judge_others(
    scores: NDArray[np.float64], paths: Sequence[Path], judges: Sequence[tuple[networks.Heads, Tensor, Tensor]],
    extractor: Extractor, seen_as: tuple[InputSpec, Window | None], run: Run,
) -> None:  # fmt: skip
    """Fill in the scores that are still NaN, each by what did not see the picture, as far as time allows.

    judges: heads, mean and gain for each picture, as `score_of` takes them.
    """
    order = run.rng(len(paths)).permutation(np.flatnonzero(np.isnan(scores)))
    for done, number in enumerate(order, 1):
        tiles = load_tiles([paths[number]], *seen_as)
        heads, mean, gain = judges[int(number)]
        found = []
        for start in range(0, len(tiles.images), _BATCH):
            part = slice(start, start + _BATCH)
            features = networks.patches(extractor(list(tiles.images[part])), extractor.taps.strides)
            counted = networks.judged(torch.from_numpy(tiles.valid[part]), extractor.taps.stride)
            found.append(score_of(heads, mean, gain, features, counted))
        scores[number] = max(found)
        run.step("judging the others", done, len(order))
        if done >= _ENOUGH and run.left_s() == 0:
            return


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
