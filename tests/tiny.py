"""A bundle whose network is a page long: how far the brightest or darkest 4x4 pixels are from grey. Quick to run and to break."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge_inspector import bundles, pictures
from edge_inspector.bundles import Bundle, Calibration, InputSpec, Manifest, Sample, TrainedOn
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


def picture(level: int, *, size: int = SIDE) -> NDArray[np.uint8]:
    """Grey, with a square of that level in its middle."""
    image = np.full((size, size, 3), 128, np.uint8)
    third = size // 4
    image[third:-third, third:-third] = level
    return image


def score_of(level: int) -> float:
    return abs(level - 128) * GAIN


def tiny_bundle(
    folder: Path, *, name: str = "tiny", weight: float = 1.0, threshold: float = 0.5, levels: tuple[int, ...] = (140, 220)
) -> Bundle:
    """A signed bundle in folder/NAME, trusted by folder/trust, with a sample of each level."""
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    (place / "network.onnx").write_bytes(graph(weight))
    samples = []
    for level in levels:
        file = f"sample-{level}.png"
        pictures.write(place / file, picture(level))
        samples.append(Sample(file=file, score=score_of(level), verdict=judge(score_of(level), threshold)[0]))
    manifest = Manifest(
        schema="ei.bundle.v1", name=name, release=1, product="tiny", created_at=utc_now(), network="tiny: by hand",
        input=InputSpec(height=SIDE, width=SIDE), threshold=threshold, scale=1.0, samples=tuple(samples),
        calibration=Calibration(n=1, alpha=0.5, confidence=0.5, kept=True, scores=(0.1,)),
        training=TrainedOn(digest="0", pictures=1, height_px=SIDE, width_px=SIDE, depth_bits=8), min_version="0.1.0",
        files=bundles.file_entries(place),
    )  # fmt: skip
    bundles.write_manifest(place, manifest)
    key = folder / "keys" / "signing.key"
    if not key.exists():
        bundles.create_key(key, folder / "trust")
    bundles.sign(place, bundles.read_private_key(key))
    assert Verdict.PASS in {sample.verdict for sample in samples}
    return bundles.open_bundle(place, folder / "trust")
