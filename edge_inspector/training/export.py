"""PyTorch graph -> the one ONNX graph, checked against PyTorch on real tiles."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_inspector.errors import TrainingError
from edge_inspector.graphs import OPSET, facts_of
from edge_inspector.training import quantise
from edge_inspector.training.networks import feature_anogan as networks
from edge_inspector.training.networks.backbone import OnnxBackbone
from edge_inspector.training.teaching.network import INNER

_LARGE = 2**16
_OUTPUTS = ["score", "map", "expected"]
PARITY = 1e-4
"""Largest allowed difference between PyTorch and ONNX Runtime, relative to the largest score or the unit of scores."""


def write(network: nn.Module, examples: tuple[Tensor, ...], path: Path, inputs: list[str], outputs: list[str]) -> None:
    """Write any network as ONNX; the first axis of everything is the batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that needs no further package calls itself old
        torch.onnx.export(
            network, examples, str(path), input_names=inputs, output_names=outputs, opset_version=OPSET,
            dynamic_axes={name: {0: "N"} for name in inputs + outputs}, dynamo=False,
        )  # fmt: skip


def export(graph: nn.Module, path: Path, example: NDArray[np.uint8]) -> None:
    """Write the graph with inputs image and valid, outputs score, map, expected. example: uint8 [1, H, W, C].

    With a backbone its maps and INNER keep their names.
    """
    image = torch.from_numpy(example)
    valid = torch.ones(image.shape[:3], dtype=torch.uint8)
    backbone: Any = getattr(graph, "backbone", None)
    if isinstance(backbone, OnnxBackbone):
        _export_around(graph, backbone, image, valid, path)
    elif backbone is not None:
        outputs = [*_OUTPUTS, *backbone.taps.names, *INNER]
        write(_Opened(graph.cpu(), "opened"), (image, valid), path, ["image", "valid"], outputs)
    else:
        write(graph.cpu(), (image, valid), path, ["image", "valid"], _OUTPUTS)
    _compact(path)


def _export_around(graph: Any, backbone: OnnxBackbone, image: Tensor, valid: Tensor, path: Path) -> None:
    """Put the backbone's file between what comes before and after it."""
    before, after = _Calling(networks.as_pixels), _Opened(graph, "judge")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        front, rest = Path(folder) / "front.onnx", Path(folder) / "rest.onnx"
        write(before, (image,), front, ["image"], ["pixels"])
        write(after, (*backbone(networks.as_pixels(image)), valid), rest, [*backbone.taps.names, "valid"], [*_OUTPUTS, *INNER])
        attends = "Softmax" in facts_of(backbone.path.read_bytes()).operators
        quantise.joined({"pixels": front, "attention" if attends else "backbone": backbone.path, "": rest}, path)


def _compact(path: Path) -> None:
    """Hide what is not for the outside, and store large constants at half precision where that loses nothing: the exporter
    widened them.
    """
    model = onnx.load(str(path))
    outputs = list(model.graph.output)
    del model.graph.output[:]
    model.graph.output.extend(value for value in outputs if value.name in _OUTPUTS)
    model.graph.value_info.extend(value for value in outputs if value.name not in _OUTPUTS)
    casts = []
    for tensor in model.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        if value.dtype != np.float32 or value.size < _LARGE or not np.array_equal(value, value.astype(np.float16)):
            continue
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(value.astype(np.float16), f"{name}:half"))
        casts.append(onnx.helper.make_node("Cast", [tensor.name], [name], name=f"{name}:cast", to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, str(path))


class _Opened(nn.Module):
    """A graph, by another method than `forward`."""

    def __init__(self, graph: nn.Module, method: str) -> None:
        super().__init__()
        self.graph, self.method = graph, method
        self.eval()  # or exporting would leave the graph in training mode

    def forward(self, *given: Tensor) -> Any:
        return getattr(self.graph, self.method)(*given)


class _Calling(nn.Module):
    """A function, as a module that can be exported."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *given: Tensor) -> Any:
        return self.function(*given)


def parity(graph: nn.Module, path: Path, tiles: NDArray[np.uint8]) -> float:
    """Largest relative difference of scores and maps on real tiles. Raises TrainingError above PARITY.

    A network may find nothing at all odd about parts it was fitted to, and score them 0: hence the unit, a median part's.
    """
    valid = np.ones(tiles.shape[:3], np.uint8)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(["score", "map"], {"image": tiles, "valid": valid})
    with torch.no_grad():
        wanted = [out.numpy() for out in graph(torch.from_numpy(tiles), torch.from_numpy(valid))[:2]]
    scale = max(1.0, float(np.abs(wanted[0]).max()))
    worst = max(float(np.abs(a - b).max()) for a, b in zip(found, wanted, strict=True)) / scale
    if not worst <= PARITY:
        raise TrainingError(
            f"ONNX Runtime and PyTorch differ by {worst:.2g} of the largest score, at most {PARITY:g} is allowed",
            hint="please report this with your versions: edge-inspector doctor",
        )
    return worst


def cost(path: Path, example: NDArray[np.uint8]) -> dict[str, float]:
    """What one tile costs: multiply-adds, numbers held, the file's size, CPU time on one thread of this machine."""
    model = onnx.load(str(path))
    return {
        "gmac": _multiply_adds(model, example) / 1e9,
        "million_parameters": sum(float(np.prod(t.dims)) for t in model.graph.initializer) / 1e6,
        "megabytes": path.stat().st_size / 1e6,
        "cpu_ms_one_thread": _median_ms(path, example, threads=1),
    }


def _multiply_adds(model: onnx.ModelProto, example: NDArray[np.uint8]) -> float:
    """Of its convolutions and matrix products, counted by the sizes that a run gives: uint8 [1, H, W, C]."""
    products = [node for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
    looked_at = {name for node in products for name in (*node.input, *node.output) if name}
    held = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    inputs = {value.name for value in model.graph.input}
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    known = {value.name for value in model.graph.output}
    asked = sorted(looked_at - held.keys() - inputs)
    probed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in asked if name not in known)
    session = onnxruntime.InferenceSession(probed.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {"image": example, "valid": np.ones(example.shape[:3], np.uint8)}
    shapes = held | {name: found.shape for name, found in zip(asked, session.run(asked, feed), strict=True)}
    total = 0.0
    for node in products:
        first, second, made = (shapes[name] for name in (node.input[0], node.input[1], node.output[0]))
        # A kernel is [out, in of its group, ...], that of a transposed convolution [in, out of its group, ...].
        of, each = (first, second[1:]) if node.op_type == "ConvTranspose" else (made, second[1:])
        if node.op_type in ("Gemm", "MatMul"):
            of, each = made, first[-1:]
        total += float(np.prod(of)) * float(np.prod(each))
    return total


def latency_ms(graph: nn.Module, example: NDArray[np.uint8]) -> float:
    """Median time that ONNX Runtime takes for one tile here, with as many threads as it likes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        export(graph, path, example)
        return _median_ms(path, example, threads=0)


def _median_ms(path: Path, example: NDArray[np.uint8], threads: int) -> float:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {"image": example, "valid": np.ones(example.shape[:3], np.uint8)}
    clock = time.thread_time if threads == 1 else time.perf_counter
    times = []
    for _ in range(12):
        began = clock()
        session.run(None, feed)
        times.append(clock() - began)
    return 1e3 * float(np.median(times[2:]))
