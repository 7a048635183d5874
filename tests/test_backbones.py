"""Backbones: the packaged ones, and any ONNX file that gives feature maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='torch is not installed: pip install "edge-inspector[train]"')

import onnx  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from edge_inspector import bundles, pictures, signatures, training  # noqa: E402
from edge_inspector.cameras.synthetic import draw_part  # noqa: E402
from edge_inspector.errors import TrainingError  # noqa: E402
from edge_inspector.runtime import OnnxEngine, judge_samples  # noqa: E402
from edge_inspector.runtime.precision import halved  # noqa: E402
from edge_inspector.training import export  # noqa: E402
from edge_inspector.training.networks.backbone import LITES, LiteBackbone  # noqa: E402
from edge_inspector.training.networks.backbone_file import MOST_CHANNELS, source  # noqa: E402
from edge_inspector.training.networks.feature_fit import FeatureAnogan  # noqa: E402
from edge_inspector.training.orders import Order  # noqa: E402
from edge_inspector.training.teaching import lesson  # noqa: E402


class Plain(nn.Module):
    """Two convolutions of random weights, tapped after each; or one of them, or what no feature map is."""

    def __init__(
        self, channels: tuple[int, ...] = (12, 20), strides: tuple[int, ...] = (8, 16), *, mixes: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Conv2d(3, c, s, s) for c, s in zip(channels, strides, strict=True))
        self.mixes = mixes

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        found = [torch.relu(layer(pixels / 255)) for layer in self.layers]
        return tuple(f + f.mean(0, keepdim=True) * pixels.shape[0] for f in found) if self.mixes else tuple(found)


class Dead(nn.Module):
    """Says nothing of any picture."""

    def forward(self, pixels: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(pixels, 8).clamp(max=-1.0)


class Coarse(nn.Module):
    """The first map of lite0 by pictures made smaller, so that its stride is 14: as vision transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.lite = LiteBackbone(LITES["lite0"])

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self.lite(nn.functional.interpolate(pixels, scale_factor=8 / 14, mode="bilinear"))
        return found[:1]


def written(path: Path, network: nn.Module, *, free: bool = True, opset: int = 17, height: int = 64, width: int = 64) -> Path:
    names = [f"map{number}" for number in range(len(network(torch.zeros(1, 3, height, width))))]
    axes = {"x": {0: "N", 2: "H", 3: "W"}, **{name: {0: "N", 2: "h", 3: "w"} for name in names}}
    torch.onnx.export(
        network.eval(), (torch.zeros(1, 3, height, width),), str(path), input_names=["x"], output_names=names,
        dynamic_axes=axes if free else None, opset_version=opset, dynamo=False,
    )  # fmt: skip
    return path


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("name", ["lite0", "lite2"])
def test_packaged_ones_give_what_their_taps_say(name: str, tmp_path: Path) -> None:
    found = LITES[name].opened(tmp_path)(torch.rand(2, 3, 64, 96) * 255)
    taps = LITES[name].taps
    assert [tuple(tap.shape) for tap in found] == [
        (2, channels, 64 // stride, 96 // stride) for channels, stride in zip(taps.channels, taps.strides, strict=True)
    ]
    assert "Apache-2.0" in LITES[name].used.licence


@pytest.mark.parametrize("opset", [13, 17, 18])
def test_a_file_gives_what_it_gave_but_for_the_rounding_of_its_weights(tmp_path: Path, opset: int) -> None:
    network = Plain()
    found = source(str(written(tmp_path / "plain.onnx", network, opset=opset)))
    assert (found.taps.channels, found.taps.strides, found.taps.fixed, found.taps.multiple) == ((12, 20), (8, 16), None, 32)
    pixels = torch.rand(3, 3, 64, 96) * 255
    for ours, theirs in zip(found.opened(tmp_path)(pixels), network(pixels), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-3)
    assert found.used.name == "plain.onnx"
    assert found.used.licence == "not told by the file"


def test_the_order_of_its_maps_does_not_matter_and_its_licence_is_told(tmp_path: Path) -> None:
    path = written(tmp_path / "coarse-first.onnx", Plain((20, 12), (16, 8)))
    model = onnx.load(str(path))
    model.metadata_props.append(onnx.StringStringEntryProto(key="Licence", value="MIT, the plant's own"))
    onnx.save(model, str(path))
    found = source(str(path))
    assert (found.taps.channels, found.taps.strides) == ((12, 20), (8, 16))
    assert found.used.licence == "MIT, the plant's own"


def test_of_many_channels_some_are_taken_and_that_is_said(tmp_path: Path) -> None:
    network = Plain((300, 700), (8, 16))
    found = source(str(written(tmp_path / "wide.onnx", network)))
    assert found.taps.depth == MOST_CHANNELS
    assert found.remarks == (
        f"{MOST_CHANNELS} of the backbone's 1000 channels are used, taken at random: more would only cost",
    )
    pixels = torch.rand(1, 3, 64, 64) * 255
    ours, theirs = found.opened(tmp_path)(pixels)[0], network(pixels)[0]
    assert all((theirs[0] - channel).abs().amax((1, 2)).min() < 1e-3 for channel in ours[0]), "each is one of the file's"


def tampered(path: Path, change: str) -> Path:
    """A file of one kind of harm."""
    network = {
        "classifier": nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(1), nn.Linear(8 * 64, 10)),
        "mixing": Plain(mixes=True),
        "stride 2": Plain((8,), (2,)),
        "uneven": nn.Sequential(nn.Conv2d(3, 8, 6, 6)),
        "no multiple": Plain((8, 8), (8, 12)),
        "dead": Dead(),
    }.get(change, Plain())
    if change == "not ONNX":
        path.write_bytes(b"\x89PNG and so on")
        return path
    if change in ("classifier", "uneven", "dead"):
        torch.onnx.export(network.eval(), (torch.zeros(1, 3, 64, 64),), str(path), input_names=["x"], dynamo=False)
        return path
    written(path, network)
    model = onnx.load(str(path))
    if change == "custom operator":
        model.graph.node[0].domain = "com.example"
        model.opset_import.append(helper.make_opsetid("com.example", 1))
    elif change == "grey":
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1
    elif change == "two inputs":
        model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1]))
    elif change == "beside":
        onnx.save(model, str(path), save_as_external_data=True, location="weights", size_threshold=0)
        return path
    elif change == "too large":
        weight = model.graph.initializer[0]
        weight.CopyFrom(onnx.numpy_helper.from_array(1e6 * np.ones(tuple(weight.dims), np.float32), weight.name))
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("not ONNX", "not an ONNX model that can be read"),
        ("classifier", r"its output \d+ is float32 \[1, 10\]: only feature maps"),
        ("mixing", "batches must not matter"),
        ("stride 2", "has 112x112 places for 224x224 px: strides from 4 to 32 px are taken"),
        ("uneven", "strides from 4 to 32 px are taken, whole"),
        ("no multiple", "its output map1 has 18x18 places for 224x224 px"),
        ("dead", "is the same everywhere"),
        ("custom operator", r"operators of foreign domains \['com.example'\]"),
        ("grey", "its input has 1 channels: RGB pictures have 3"),
        ("two inputs", "its inputs are x, mask: one float"),
        ("beside", "keeps tensors in other files"),
        ("too large", "too large for half precision"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(tmp_path: Path, change: str, said: str) -> None:
    path = tampered(tmp_path / f"{change.replace(' ', '-')}.onnx", change)
    with pytest.raises(TrainingError, match=said) as refused:
        source(str(path))
    assert str(path) in refused.value.message
    assert refused.value.hint


def test_a_name_that_is_neither_is_refused_and_so_is_a_huge_file(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="backbone resnet99: neither lite0 nor lite2, and there is no such file"):
        source("resnet99")
    with (tmp_path / "huge.onnx").open("wb") as file:
        file.truncate(2 << 30)
    with pytest.raises(TrainingError, match="2147 MB; at most 419 MB are taken"):
        source(str(tmp_path / "huge.onnx"))


def test_a_bundle_by_a_file_is_trained_runs_and_is_taught(tmp_path: Path) -> None:
    path = written(tmp_path / "vit-like.onnx", Coarse(), height=112, width=112)
    good = tmp_path / "good"
    good.mkdir()
    for number in range(40):
        pictures.write(good / f"{number:02d}.png", draw_part(np.random.default_rng(number), 112, 112, defect=False))
    signatures.create_key(tmp_path / "signing.key", tmp_path / "trust")
    key = signatures.read_private_key(tmp_path / "signing.key")
    family = FeatureAnogan(side=112, prototypes=64, steps=30, backbone=str(path))
    trained = training.train(Order(folder=good, out=tmp_path / "disc", product="disc", name="disc", key=key, family=family))
    bundle = bundles.open_bundle(trained.folder, tmp_path / "trust")
    assert (bundle.manifest.input.height, bundle.manifest.input.width) == (112, 112)
    assert bundle.manifest.backbone is not None
    assert bundle.manifest.backbone.name == "vit-like.onnx"
    assert "vit-like.onnx" in (trained.folder / bundles.REPORT).read_text()
    assert bundle.manifest.metrics["gmac"] > 0
    with OnnxEngine(bundle) as engine:
        judge_samples(engine)
    half = onnx.load_from_string(halved(bundle.read(bundles.NETWORK)))
    kinds = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    kernels = {node.name: kinds[node.input[1]] for node in half.graph.node if node.op_type == "Conv" and node.input[1] in kinds}
    assert {kind for name, kind in kernels.items() if name.startswith("/backbone/")} == {TensorProto.FLOAT16}
    assert {kind for name, kind in kernels.items() if "/bank/" in name} == {TensorProto.FLOAT}, "distances are measured in full"
    more = tmp_path / "more"
    more.mkdir()
    for number in range(60, 64):
        pictures.write(more / f"{number:02d}.png", draw_part(np.random.default_rng(number), 112, 112, defect=False))
    learned = lesson.teach(
        lesson.Order(
            bundle=trained.folder, trust=tmp_path / "trust", out=tmp_path / "out", key=key, good=more, accept_loss=True
        )
    )
    with OnnxEngine(bundles.open_bundle(learned.folder, tmp_path / "trust")) as engine:
        judge_samples(engine)


def test_multiply_adds_are_those_that_pytorch_counts(tmp_path: Path) -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(
                nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.ConvTranspose2d(8, 4, 2, 2),
                nn.Conv2d(4, 3, 1), nn.Linear(32, 5),
            )  # fmt: skip
            self.requires_grad_(requires_grad=False)

        def forward(self, image: Tensor, valid: Tensor) -> Tensor:
            found: Tensor = self.network(image.float().permute(0, 3, 1, 2)) + 0.0 * valid.float().mean()
            return found

    image, valid = torch.zeros(1, 32, 32, 3, dtype=torch.uint8), torch.ones(1, 32, 32, dtype=torch.uint8)
    export.write(Graph(), (image, valid), tmp_path / "graph.onnx", ["image", "valid"], ["out"])
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        Graph()(image, valid)
    found = export.cost(tmp_path / "graph.onnx", image.numpy())["gmac"]
    assert found * 2e9 == pytest.approx(counted.get_total_flops())
