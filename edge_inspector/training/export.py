"""PyTorch graph -> the one ONNX graph, checked against PyTorch on real tiles."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from edge_inspector.errors import TrainingError
from edge_inspector.graphs import OPSET

PARITY = 1e-4
"""Largest allowed difference between PyTorch and ONNX Runtime, relative to the largest score."""


def write(network: nn.Module, examples: tuple[Tensor, ...], path: Path, inputs: list[str], outputs: list[str]) -> None:
    """Write any network as ONNX; the first axis of everything is the batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that needs no further package calls itself old
        torch.onnx.export(
            network, examples, str(path), input_names=inputs, output_names=outputs, opset_version=OPSET,
            dynamic_axes={name: {0: "N"} for name in inputs + outputs}, dynamo=False,
        )  # fmt: skip


def export(graph: nn.Module, path: Path, example: NDArray[np.uint8]) -> None:
    """Write the graph with inputs image and valid, outputs score, map, expected. example: uint8 [1, H, W, C]."""
    image = torch.from_numpy(example)
    valid = torch.ones(image.shape[:3], dtype=torch.uint8)
    write(graph.cpu(), (image, valid), path, ["image", "valid"], ["score", "map", "expected"])


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


def cost(graph: nn.Module, path: Path, example: NDArray[np.uint8]) -> dict[str, float]:
    """What one tile costs: multiply-adds, the file's size, CPU time on one thread (median of 10, on this machine)."""
    image = torch.from_numpy(example)
    valid = torch.ones(image.shape[:3], dtype=torch.uint8)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        graph(image, valid)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {"image": example, "valid": valid.numpy()}
    times = []
    for _ in range(12):
        began = time.thread_time()
        session.run(None, feed)
        times.append(time.thread_time() - began)
    return {
        "gmac": counted.get_total_flops() / 2e9,
        "megabytes": path.stat().st_size / 1e6,
        "cpu_ms_one_thread": 1e3 * float(np.median(times[2:])),
    }
