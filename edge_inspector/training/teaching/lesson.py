"""Defects that passed and good parts that were rejected -> a new release of a bundle that knows them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_inspector import bundles, pictures, scoring
from edge_inspector.bundles import Bundle, Calibration, Manifest, Sample, Taught
from edge_inspector.errors import TrainingError
from edge_inspector.frames import utc_now
from edge_inspector.results import Verdict
from edge_inspector.runtime import OnnxEngine, judge_samples
from edge_inspector.runtime.engine import picture_score
from edge_inspector.signatures import Ed25519PrivateKey
from edge_inspector.training import calibrate
from edge_inspector.training.teaching import defects, material, page, refit
from edge_inspector.training.teaching.changes import Change, Counted
from edge_inspector.training.teaching.material import Material
from edge_inspector.training.teaching.network import Network
from edge_inspector.training.teaching.shown import Shown, Tick, region_of, shown

TRAINED_REPORT = "report-trained.html"
_CLEAR, _MOST_SAMPLES = 1.05, 7
"""A defect becomes a sample where it lies clearly above the threshold."""
_ODDEST = 3
_LIKE_GOOD = 1.1
"""Scores of good parts have the median 1."""
_PARITY = 0.02
"""Share of the threshold by which the graph may differ from what was computed outside it."""
_LOSS = 0.05
"""Share of drawn defects that new good parts may cost without being asked."""


@dataclass(frozen=True)
class Order:
    """What is to be taught."""

    bundle: Path
    trust: Path
    out: Path
    key: Ed25519PrivateKey
    defects: Path | None = None
    good: Path | None = None
    masks: Path | None = None
    accept_loss: bool = False
    """Go on where new good parts cost more than _LOSS of the drawn defects."""
    command: str = ""


@dataclass(frozen=True)
class Learned:
    """A new release, and what the lesson has changed."""

    folder: Path
    release: int
    promise: scoring.Promise
    weight: float
    """Of the taught term; 0: only good parts were learned."""
    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    key_id: str


def teach(order: Order, tick: Tick = lambda _, __, ___: None) -> Learned:
    """Learn what is shown, check it, and sign a new release of the bundle.

    Raises TrainingError where nothing can be learned or something would be made worse; PictureError, FormatError, BundleError.
    """
    if order.defects is None and order.good is None:
        raise TrainingError("nothing is shown", hint="give --defects FOLDER, --good FOLDER, or both")
    if order.masks is not None and order.defects is None:
        raise TrainingError("--masks without --defects", hint="masks say where the defects of --defects are")
    if order.out.exists():
        raise TrainingError(f"{order.out}: exists already", hint="give another --out, or remove it")
    bundle = bundles.open_bundle(order.bundle, order.trust)
    held = material.opened(order.bundle, bundle.manifest.material)
    network = Network.of(bundle.read(bundles.NETWORK), str(order.bundle))
    bad = _shown(order.defects, bundle, network, 0, order.masks, tick)
    good = _shown(order.good, bundle, network, held.about.folds, None, tick)
    _refuse_contradictions(held, bad, good)
    work = order.out.with_name(order.out.name + ".teaching")
    shutil.rmtree(work, ignore_errors=True)
    lesson = _Lesson(order, bundle, network, held, bad, good, tick)
    lesson.refuse_worse()
    try:
        return lesson.written(work)
    except OSError as error:
        where = error.filename or order.out
        raise TrainingError(f"{where}: {error.strerror}", hint="free some space, and teach again") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _shown(folder: Path | None, bundle: Bundle, network: Network, folds: int, masks: Path | None, tick: Tick) -> Shown | None:
    return shown(folder, bundle, network, folds, masks, tick) if folder is not None else None


def _refuse_contradictions(held: Material, bad: Shown | None, good: Shown | None) -> None:
    """Raise TrainingError where one picture is said to be good and defective, or was taught before."""
    if bad is not None and good is not None:
        for here, there in bad.tiles.copies(good.tiles):
            raise TrainingError(
                f"{bad.names[here]} in --defects and {good.names[there]} in --good are the same picture",
                hint="a part is either good or defective: take one of them out",
            )
    if bad is not None:
        for here, there in bad.tiles.copies(held.good):
            raise TrainingError(
                f"{bad.names[here]} in --defects was trained on as a good part: {held.about.good[there]}",
                hint="if it is defective, take it out of the good parts and train again; else out of --defects",
            )
        for here, there in bad.tiles.copies(held.taught):
            raise TrainingError(
                f"{bad.names[here]} in --defects was taught before: {held.about.taught[there]}", hint="take it out"
            )
    if good is not None:
        for here, there in good.tiles.copies(held.good):
            raise TrainingError(f"{good.names[here]} in --good is known already: {held.about.good[there]}", hint="take it out")
        for here, there in good.tiles.copies(held.taught):
            raise TrainingError(
                f"{good.names[here]} in --good was taught as a defect: {held.about.taught[there]}",
                hint="a lesson cannot be taken back: teach the release before it",
            )


def _scored(bundle: Bundle, seen: Shown | None) -> NDArray[np.float64]:
    """Scores of shown pictures by a bundle as it is."""
    if seen is None:
        return np.array([])
    with OnnxEngine(bundle) as engine:
        return np.array([picture_score(engine, region_of(bundle, path)) for path in seen.paths])


class _Lesson:
    """One lesson, from what was shown to what was learned."""

    def __init__(
        self, order: Order, bundle: Bundle, network: Network, held: Material, bad: Shown | None, good: Shown | None, tick: Tick
    ) -> None:
        rates = bundle.manifest.rates
        if rates is None or rates.found is None:
            raise TrainingError(f"{order.bundle}: says no rates", hint="train it again with this release")
        self.order, self.bundle, self.manifest, self.rates = order, bundle, bundle.manifest, rates
        self.held, self.bad, self.good, self.tick = held, bad, good, tick
        self.wish = scoring.Wish(rates.wish, rates.asked == "at_most", self.manifest.calibration.confidence)
        self.scores_before = _scored(bundle, bad), _scored(bundle, good)
        self.found_before: float = rates.found
        self.notes: list[str] = []
        self.network, self.whole = network, self._joined()
        self.new = len(good.names) if good is not None else 0
        if good is not None:
            self.network, self.whole = refit.refitted(network, self.whole, lambda n, of: tick("good parts", n, of))
        sums = refit.weighed(self.whole)
        gain = np.array(held.about.weights, np.float32)[:, None, None] / sums.usual.spread
        self.network = self.network.with_usual(sums.usual.mean, gain)
        self.taught = self._learned(sums)
        self.chosen = self.taught.chosen
        self.promise = self._limit(self.chosen.good.tolist(), self.wish)
        self._say_new()

    def _limit(self, scores: Sequence[float], wish: scoring.Wish) -> scoring.Promise:
        """What keeps a wish among all good parts.

        Where those that were shown score clearly above the others they are what comes from now on: it is kept among them, too.
        """
        known, left_out = len(scores) - self.new, len(self.manifest.pictures.left_out)
        old, new = scores[:known], scores[known:]
        apart = len(new) >= wish.needed and scoring.clearly_above(new, old)
        return scoring.promise(scores, wish, scoring.promise(new, wish).threshold if apart else 0.0, left_out)

    def _say_new(self) -> None:
        """The rates of good parts like those that were shown."""
        if not self.new:
            return
        if self.new < self.wish.needed:
            more = self.wish.needed - self.new
            self.notes.append(
                f"{self.new} good parts say no rate of their own: {more} more, and the wish is kept for such parts alone, too"
            )
            return
        new = self.chosen.good[-self.new :].tolist()
        if scoring.clearly_above(new, self.chosen.good[: -self.new].tolist()):
            self.notes.append(f"of good parts like those shown: {scoring.promise(new, self.wish, self.promise.threshold)}")
        else:
            self.notes.append("the shown good parts score no higher than the others: the rates of all hold for them, too")

    def _joined(self) -> Material:
        """What was known and what is shown, together."""
        held, about = self.held, self.held.about
        good, names = held.good, about.good
        taught, taught_names = held.taught, about.taught
        if self.good is not None:
            good, names = good.and_(self.good.tiles), (*names, *self.good.names)
        if self.bad is not None:
            taught, taught_names = taught.and_(self.bad.tiles), (*taught_names, *self.bad.names)
        told = about.model_copy(update={"good": names, "taught": taught_names})
        return Material(told, good, held.drawn, taught)

    def _learned(self, sums: refit.Weighed) -> defects.Taught:
        whole = self.whole
        marked = whole.taught.judged
        if self.bad is not None:
            marked = np.concatenate([marked[: len(self.held.taught)], self.bad.marked])
        lesson = defects.Lesson(
            self.network, (whole.good, whole.drawn, whole.taught), (sums.good, sums.drawn, sums.taught), marked,
            lambda scores: self._limit(scores.tolist(), self.wish),
            lambda done, of: self.tick("defects", done, of),
        )  # fmt: skip
        return lesson.learned() if len(whole.taught) else lesson.nothing()

    def changes(self) -> tuple[Change, ...]:
        """What is found and what is rejected, before and after."""
        limit, told = self.manifest.threshold, []
        if self.bad is not None:
            after = self.chosen.found[-len(self.bad.names) :]
            kinds = np.array(self.bad.kinds)
            for kind in dict.fromkeys(self.bad.kinds):
                of = kinds == kind
                name = f"shown defects{f', {kind}' if kind else ''}, found"
                told.append(Change(name, _above(self.scores_before[0][of] > limit), _above(after[of])))
        drawn = self.chosen.drawn
        before = Counted(round(self.found_before * len(drawn)), len(drawn))
        told.append(Change("drawn defects, found", before, _above(drawn > self.chosen.threshold)))
        if self.good is not None:
            after = self.chosen.good[-len(self.good.names) :] > self.chosen.threshold
            told.append(Change("shown good parts, rejected", _above(self.scores_before[1] > limit), _above(after)))
        return tuple(told)

    def refuse_worse(self) -> None:
        """Raise TrainingError where nothing was learned, or more would be lost than may be."""
        if self.bad is not None and not self.chosen.weight:
            why = self._why_nothing(self.bad)
            if self.good is None:
                raise TrainingError(f"nothing was learned of these defects: {why[0]}", hint=why[1])
            self.notes.append(f"nothing was learned of these defects: {why[0]}")
        earlier = self.manifest.taught
        if earlier is not None and earlier.weight and not self.chosen.weight:
            raise TrainingError(
                "what this release was taught before would be lost",
                hint="show fewer good parts that look like the defects taught before, or teach the release before it",
            )
        lost = self.found_before - self.chosen.share
        if self.good is not None and lost > _LOSS and not self.order.accept_loss:
            now, then, odd = self.found_before, self.chosen.share, self._oddest(self.good)
            raise TrainingError(
                f"{now:.0%} of drawn defects are found now, {then:.0%} would be: parts as different as these good ones "
                f"must not be rejected any more, the oddest are {odd}",
                hint="are they really good? If not, take them out. If so, and you accept that: --accept-loss",
            )

    def _oddest(self, good: Shown) -> str:
        """Names of shown good parts that score highest."""
        scores = self.chosen.good[-self.new :]
        return ", ".join(good.names[i] for i in np.argsort(scores)[: -_ODDEST - 1 : -1])

    def _why_nothing(self, bad: Shown) -> tuple[str, str]:
        """Reason and hint."""
        before, k = self.scores_before[0], len(bad.names)
        if (before > self.manifest.threshold).all():
            return f"all {k} are found already", "show defects that passed"
        plain = [name for name, score in zip(bad.names, before, strict=True) if score < _LIKE_GOOD]
        hint = "show more of them, larger ones, or say by --masks where they are"
        if plain:
            some = ", ".join(plain[:5])
            hint = f"are these really defective? They look like ordinary good parts: {some}; does the camera show it?"
        best = max(self.taught.choices, key=lambda one: int(one.found.sum()))
        gained = int(best.found.sum()) - int(self.taught.without.found.sum())
        if gained > 0:
            lost = f"{best.share:.0%} of drawn defects instead of {self.taught.without.share:.0%}"
            return f"{gained} more of {k} would be found, but only {lost}", hint
        if k == 1:
            return "one picture counts little, and it would still pass, or other defects would be lost", hint
        return "what they have in common, good parts have as well, or they have nothing in common", hint

    def written(self, work: Path) -> Learned:
        """Write the new release and what it can be taught further from."""
        folder, changes = work / "bundle", self.changes()
        folder.mkdir(parents=True)
        graph = self.network.written(self.taught.term)
        (folder / bundles.NETWORK).write_bytes(graph)
        draft = self._draft()
        kept, own = work / "samples", work / "teach"
        digest = self.whole.bounded().write(own)
        draft = draft.model_copy(update={"material": digest})
        with OnnxEngine(Bundle(folder, draft, "", ""), graph=graph) as engine:
            self._check(engine)
            samples = self._samples(engine, folder, kept)
            seen = page.seen(engine, self.bad, self.good, self.bundle)
        draft = draft.model_copy(update={"samples": samples})
        self._reports(folder, page.render(draft, self.manifest, self.promise, changes, self.notes, seen))
        manifest = draft.model_copy(update={"files": bundles.file_entries(folder)})
        bundles.write_manifest(folder, manifest)
        identity = bundles.sign(folder, self.order.key)
        with OnnxEngine(Bundle(folder, manifest, "", identity)) as engine:
            judge_samples(engine)
        shutil.rmtree(material.beside(self.order.out), ignore_errors=True)
        own.rename(material.beside(self.order.out))
        folder.rename(self.order.out)
        return Learned(
            self.order.out, manifest.release, self.promise, self.chosen.weight, changes, tuple(self.notes), identity
        )  # fmt: skip

    def _draft(self) -> Manifest:
        """The manifest of the new release, but for samples and files."""
        promise, old, chosen = self.promise, self.manifest, self.chosen
        found = scoring.found(chosen.drawn.tolist(), chosen.good.tolist(), self.wish, self._limit)
        bad, good = (len(seen.names) if seen is not None else 0 for seen in (self.bad, self.good))
        return old.model_copy(
            update={
                "release": old.release + 1, "created_at": utc_now(), "command": self.order.command,
                "threshold": promise.threshold,
                "calibration": Calibration(
                    n=promise.n, alpha=promise.alpha, confidence=promise.wish.confidence, kept=promise.kept,
                    scores=tuple(sorted(chosen.good.tolist())), method=old.calibration.method, review=promise.review,
                ),
                "rates": self.rates.model_copy(
                    update={
                        "expected": promise.expected, "at_most": promise.at_most, "found": found.here,
                        "found_at_half": found.at_half, "found_at_twice": found.at_twice,
                    }
                ),
                "metrics": {key: value for key, value in old.metrics.items() if not key.startswith("smallest_found")},
                "taught": Taught(
                    parent=self.bundle.sha256, defects=bad, good=good, weight=chosen.weight,
                    changes=tuple(str(change) for change in self.changes()),
                ),
            }
        )  # fmt: skip

    def _check(self, engine: OnnxEngine) -> None:
        """Raise TrainingError where the graph does not compute what was chosen by."""
        if self.bad is None:
            return
        image = region_of(self.bundle, self.bad.paths[-1])
        score, wanted = picture_score(engine, image), float(self.chosen.taught[-1])
        if abs(score - wanted) > _PARITY * self.promise.threshold:
            raise TrainingError(
                f"{self.bad.names[-1]} scores {score:.4g} in the new network, {wanted:.4g} was computed",
                hint="please report this with your versions: edge-inspector doctor",
            )

    def _samples(self, engine: OnnxEngine, folder: Path, work: Path) -> tuple[Sample, ...]:
        """The old release's good samples and a blot, judged anew, then some of the defects that are found now."""
        work.mkdir()
        old = [sample for sample in self.manifest.samples if sample.verdict is Verdict.PASS]
        for sample in old:
            (work / sample.file).write_bytes(self.bundle.read(sample.file))
        limit = self.promise.threshold
        ordered = sorted((work / sample.file for sample in old), key=lambda path: picture_score(engine, pictures.read(path)))
        samples = list(calibrate.limit_samples(engine, ordered, limit, folder))
        for path in self.bad.paths if self.bad is not None else ():
            image = region_of(self.bundle, path)
            score = picture_score(engine, image)
            number = len(samples)
            if score > _CLEAR * limit and number < _MOST_SAMPLES:
                name = f"sample-taught-{number}.png"
                pictures.write(folder / name, image)
                samples.append(Sample(file=name, score=score, verdict=Verdict.FAIL))
        return tuple(samples)

    def _reports(self, folder: Path, rendered: str) -> None:
        """The lesson's own page, and that of the training."""
        (folder / bundles.REPORT).write_text(rendered)
        listed = self.manifest.files
        first = next((name for name in (TRAINED_REPORT, bundles.REPORT) if name in listed), None)
        if first is not None:
            (folder / TRAINED_REPORT).write_bytes(self.bundle.read(first))


def _above(flags: NDArray[np.bool_]) -> Counted:
    return Counted(int(flags.sum()), len(flags))
