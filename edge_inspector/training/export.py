"""PyTorch graph -> the one ONNX graph, checked against PyTorch on real tiles."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

from edge_inspector.errors import TrainingError
from edge_inspector.graphs import OPSET

PARITY = 1e-4
"""Largest allowed difference between PyTorch and ONNX Runtime, relative to the largest score."""


def export(graph: nn.Module, path: Path, example: NDArray[np.uint8]) -> None:
    """Write the graph with inputs image and valid, outputs score, map, expected. example: uint8 [1, H, W, C]."""
    image = torch.from_numpy(example)
    valid = torch.ones(image.shape[:3], dtype=torch.uint8)
    names = ["image", "valid"], ["score", "map", "expected"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that needs no further package calls itself old
        torch.onnx.export(
            graph.cpu(), (image, valid), str(path), input_names=names[0], output_names=names[1], opset_version=OPSET,
            dynamic_axes={name: {0: "N"} for name in names[0] + names[1]}, dynamo=False,
        )  # fmt: skip


def parity(graph: nn.Module, path: Path, tiles: NDArray[np.uint8]) -> float:
    """Largest relative difference of scores and maps on real tiles. Raises TrainingError above PARITY."""
    valid = np.ones(tiles.shape[:3], np.uint8)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(["score", "map"], {"image": tiles, "valid": valid})
    with torch.no_grad():
        wanted = [out.numpy() for out in graph(torch.from_numpy(tiles), torch.from_numpy(valid))[:2]]
    scale = float(np.abs(wanted[0]).max())
    worst = max(float(np.abs(a - b).max()) for a, b in zip(found, wanted, strict=True)) / scale
    if not worst <= PARITY:
        raise TrainingError(
            f"ONNX Runtime and PyTorch differ by {worst:.2g} of the largest score, at most {PARITY:g} is allowed",
            hint="please report this with your versions: edge-inspector doctor",
        )
    return worst
