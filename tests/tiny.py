"""A bundle whose network is a page long: how far the brightest or darkest 4x4 pixels are from grey. Quick to run and to break."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge_inspector import bundles, pictures, signatures
from edge_inspector.bundles import Bundle, Calibration, InputSpec, Manifest, PictureKind, Sample, TrainedOn
from edge_inspector.frames import utc_now
from edge_inspector.results import Verdict
from edge_inspector.scoring import judge

SIDE = 32
GAIN = 1 / 128


def graph(weight: float = 1.0) -> bytes:
    """The ONNX graph; `weight` of its convolution, which stands in a part of the graph and so is halved."""
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT, name="/Cast"),
        helper.make_node("Transpose", ["pixels"], ["planes"], perm=[0, 3, 1, 2], name="/Transpose"),
        helper.make_node("Sub", ["planes", "grey"], ["centred"], name="/Sub"),
        helper.make_node("Conv", ["centred", "kernel"], ["mean"], name="/network/Conv"),
        helper.make_node("AveragePool", ["mean"], ["pooled"], kernel_shape=[4, 4], strides=[4, 4], name="/network/AveragePool"),
        helper.make_node("Abs", ["pooled"], ["away"], name="/Abs"),
        helper.make_node("Cast", ["valid"], ["inside"], to=TensorProto.FLOAT, name="/Cast_1"),
        helper.make_node("Unsqueeze", ["inside", "one"], ["plane"], name="/Unsqueeze"),
        helper.make_node("MaxPool", ["plane"], ["any"], kernel_shape=[4, 4], strides=[4, 4], name="/MaxPool"),
        helper.make_node("Mul", ["away", "any"], ["counted"], name="/Mul"),
        helper.make_node("Squeeze", ["counted", "one"], ["map"], name="/Squeeze"),
        helper.make_node("ReduceMax", ["map"], ["score"], axes=[1, 2], keepdims=0, name="/ReduceMax"),
    ]
    kernel = np.full((1, 3, 1, 1), weight * GAIN / 3, np.float32)
    constants = [
        numpy_helper.from_array(np.float32(128).reshape(1), "grey"), numpy_helper.from_array(kernel, "kernel"),
        numpy_helper.from_array(np.array([1], np.int64), "one"),
    ]  # fmt: skip
    inputs = [
        helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", SIDE, SIDE, 3]),
        helper.make_tensor_value_info("valid", TensorProto.UINT8, ["N", SIDE, SIDE]),
    ]
    outputs = [
        helper.make_tensor_value_info("score", TensorProto.FLOAT, ["N"]),
        helper.make_tensor_value_info("map", TensorProto.FLOAT, ["N", SIDE // 4, SIDE // 4]),
    ]
    made = helper.make_graph(nodes, "tiny", inputs, outputs, constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString()
    return data


CODED_SIDE = 64
CODE_AT = 13
"""Where a frame of tests.gige holds the last three bytes of its part's number, in the first row."""


def coded_graph() -> bytes:
    """A network whose score is the number of the part that the pixels show: what was judged stands in the result."""
    weights = np.zeros((CODED_SIDE * CODED_SIDE, 1), np.float32)
    weights[CODE_AT : CODE_AT + 3, 0] = (65536, 256, 1)
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT, name="/Cast"),
        helper.make_node("Reshape", ["pixels", "flat"], ["row"], name="/Reshape"),
        helper.make_node("MatMul", ["row", "weights"], ["number"], name="/MatMul"),
        helper.make_node("Squeeze", ["number", "one"], ["score"], name="/Squeeze"),
        helper.make_node("Cast", ["valid"], ["map"], to=TensorProto.FLOAT, name="/Cast_1"),
    ]
    constants = [
        numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(np.array([1], np.int64), "one"),
        numpy_helper.from_array(np.array([-1, CODED_SIDE * CODED_SIDE], np.int64), "flat"),
    ]  # fmt: skip
    shapes: dict[str, list[str | int | None]] = {
        "image": ["N", CODED_SIDE, CODED_SIDE, 1],
        "valid": ["N", CODED_SIDE, CODED_SIDE],
    }
    inputs = [helper.make_tensor_value_info(name, TensorProto.UINT8, shape) for name, shape in shapes.items()]
    outputs = [
        helper.make_tensor_value_info("score", TensorProto.FLOAT, ["N"]),
        helper.make_tensor_value_info("map", TensorProto.FLOAT, ["N", CODED_SIDE, CODED_SIDE]),
    ]
    made = helper.make_graph(nodes, "coded", inputs, outputs, constants)
    data: bytes = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    return data


def coded_bundle(folder: Path) -> Bundle:
    """A signed bundle `coded` in `folder`, trusted by folder/trust. It passes whatever it judges."""
    sample = np.full((CODED_SIDE, CODED_SIDE), 128, np.uint8)
    sample[0, CODE_AT : CODE_AT + 3] = (0, 1, 4)
    spec = InputSpec(height=CODED_SIDE, width=CODED_SIDE, channels=1, order="grey")
    return _signed(folder, "coded", coded_graph(), spec, {"sample-260.png": (sample, 260.0)}, threshold=2.0**24)


def picture(level: int, *, size: int = SIDE) -> NDArray[np.uint8]:
    """Grey, with a square of that level in its middle."""
    image = np.full((size, size, 3), 128, np.uint8)
    third = size // 4
    image[third:-third, third:-third] = level
    return image


def score_of(level: int) -> float:
    return abs(level - 128) * GAIN


def tiny_bundle(
    folder: Path, *, name: str = "tiny", weight: float = 1.0, threshold: float = 0.5, levels: tuple[int, ...] = (140, 220),
    place: str = "", channels: Literal[1, 3] | None = None, **manifest: Any,
) -> Bundle:  # fmt: skip
    """A signed bundle in folder/PLACE, its name if none is given, trusted by folder/trust, with a sample of each level."""
    samples = {f"sample-{level}.png": (picture(level), score_of(level)) for level in levels}
    spec = InputSpec(height=SIDE, width=SIDE)
    return _signed(folder, name, graph(weight), spec, samples, threshold, place or name, channels, **manifest)


def _signed(
    folder: Path,
    name: str,
    network: bytes,
    spec: InputSpec,
    shown: dict[str, tuple[NDArray[np.uint8], float]],
    threshold: float,
    where: str = "",
    channels: Literal[1, 3] | None = None,
    **more: Any,
) -> Bundle:
    place = folder / (where or name)
    place.mkdir(parents=True, exist_ok=True)
    (place / "network.onnx").write_bytes(network)
    for file, (image, _) in shown.items():
        pictures.write(place / file, image)
    samples = [Sample(file=file, score=score, verdict=judge(score, threshold)[0]) for file, (_, score) in shown.items()]
    trained = TrainedOn(digest="0", pictures=1, height_px=spec.height, width_px=spec.width, depth_bits=8, aspects=(0.1, 10.0))
    kind = PictureKind(sizes=((8, 8), (8192, 8192)), channels=channels)
    manifest = Manifest(**{
        "schema": "ei.bundle.v1", "name": name, "release": 1, "product": "tiny", "created_at": utc_now(), "input": spec,
        "network": f"{name}: by hand", "threshold": threshold, "scale": 1.0, "samples": tuple(samples), "training": trained, "pictures": kind,
        "min_version": "0.1.0", "calibration": Calibration(n=1, alpha=0.5, confidence=0.95, kept=True, scores=(0.1,)),
        "files": bundles.file_entries(place), **more,
    })  # fmt: skip
    bundles.write_manifest(place, manifest)
    key = folder / "keys" / "signing.key"
    if not key.exists():
        signatures.create_key(key, folder / "trust")
    bundles.sign(place, signatures.read_private_key(key))
    assert Verdict.PASS in {sample.verdict for sample in samples}
    return bundles.open_bundle(place, folder / "trust")
