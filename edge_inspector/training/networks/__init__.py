"""Networks that can be trained. A family is a class whose instance holds its settings; `fit` gives one graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from edge_inspector.bundles import BackboneUsed, InputSpec
from edge_inspector.preprocess import Window
from edge_inspector.training.data import Pictures
from edge_inspector.training.run import Run
from edge_inspector.training.teaching.material import Material


@dataclass(frozen=True)
class Half:
    """What networks that were fitted to half of the pictures say: how much more pictures would bring is seen from it."""

    good: NDArray[np.float64]
    """The score of each picture by one that was not fitted to it."""
    drawn: NDArray[np.float64]
    """Scores of drawn defects."""


@dataclass(frozen=True)
class Fitted:
    """What a family makes of good parts."""

    graph: nn.Module
    """(image uint8 [N, H, W, C], valid uint8 [N, H, W]) -> score [N], map [N, h, w], expected uint8 [N, H, W, C].

    Its buffer `unit` is what scores are divided by; it is 1 so far.
    """
    scores: NDArray[np.float64]
    """The score of each picture by a network that was not fitted to it; NaN for pictures that have none."""
    drawn: NDArray[np.float64]
    """Scores of drawn defects, by networks that knew neither the part nor the kind; empty: none were drawn."""
    method: str
    """How the scores were made, for people: held out, or cross-fitted."""
    figures: dict[str, float] = field(default_factory=dict)
    """What was measured on the way."""
    notes: tuple[str, ...] = ()
    """What a person should know of this fit."""
    generator: tuple[nn.Module, int] | None = None
    """Where the family draws pictures: latents [N, n] -> uint8 [N, H, W, C] in frame order, and n."""
    sheets: str = ""
    """What the pictures show that were written while it was fitted (`Run.sheet`)."""
    half: Half | None = None
    """None: it was not tried."""
    backbone: BackboneUsed | None = None
    """The pretrained network it rests on; None: it has none."""
    material: Material | None = None
    """What the bundle can be taught from; None: it cannot."""


class Family(Protocol):
    """One way to learn what good parts look like."""

    name: ClassVar[str]

    def input_spec(self, surveyed: Pictures, tile: int | None, overlap: float) -> InputSpec:
        """What the network takes of such pictures. Raises TrainingError for settings that do not work."""
        ...

    def within_ms(self, surveyed: Pictures, tile: int | None, overlap: float, latency_ms: float) -> Family:
        """These settings, made light enough to judge a picture within that time here. Raises TrainingError."""
        ...

    def fit(self, surveyed: Pictures, spec: InputSpec, window: Window | None, run: Run) -> Fitted:
        """Learn. Resumes from the checkpoints in the run's folder. Raises TrainingError, PictureError."""
        ...


__all__ = ["Family", "Fitted", "Half"]
