"""Half precision and the gate behind every build: on the shipped bundle's real frames, and on a network small enough to break."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_inspector import pictures
from edge_inspector.bundles import NETWORK, Bundle, open_bundle
from edge_inspector.errors import EngineError, EngineRefused
from edge_inspector.inspector import Inspector
from edge_inspector.recipes import CameraRecipe, Recipe, RoiRecipe
from edge_inspector.results import Reason, Verdict
from edge_inspector.roi import Rectangle
from edge_inspector.runtime import OnnxEngine, parity
from edge_inspector.runtime.engine import picture_score
from edge_inspector.runtime.precision import Precision, chosen, converted, halved
from tests.line import ENGINES

pytest.importorskip("onnx", reason='onnx is not installed: pip install "edge-inspector[tensorrt]"')

from tests.test_preprocess import frame
from tests.tiny import SIDE, graph, picture, score_of, tiny_bundle


def untold(done: int) -> None:
    pass


class Other(OnnxEngine):
    """The same bundle by another graph, called what the gate takes for its precision."""

    def __init__(self, bundle: Bundle, graph: bytes, precision: Precision = "fp16") -> None:
        super().__init__(bundle, batch=3, graph=graph)
        self.called: Precision = precision

    def __enter__(self) -> Other:
        super().__enter__()
        self.precision = self.called
        return self


def refused(bundle: Bundle, graph: bytes, precision: Precision = "fp16") -> parity.Parity:
    with OnnxEngine(bundle) as reference:
        near = parity.near_threshold(reference, parity.MARGIN[precision], untold, 60)
    with Other(bundle, graph, precision) as engine:
        return parity.refuse_unlike(engine, near)


def test_frames_near_the_threshold_lie_within_a_fifth_of_it_on_both_sides(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    with OnnxEngine(bundle) as reference:
        near = parity.near_threshold(reference, 0.01, untold, 200)
    ratio = near.scores / bundle.manifest.threshold
    assert len(ratio) == 200
    assert ((abs(ratio - 1) < 0.2) & (abs(ratio - 1) > 0.01)).all()
    assert 60 < (ratio > 1).sum() < 140
    assert len({image.tobytes() for image in near.images}) == 200


def test_the_same_network_passes_and_says_how_well(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    found = refused(bundle, halved(graph()))
    assert found.frames == 60
    assert found.flips == 0
    assert 0 < found.largest < 0.002


def test_one_weight_that_flips_one_sample_is_refused(tmp_path: Path) -> None:
    """The score differs by 0.4 % of the threshold, which is allowed; but a sample that should pass now fails."""
    bundle = tiny_bundle(tmp_path, threshold=0.5005, levels=(140, 192, 220))
    assert refused(bundle, graph(1.0)).flips == 0
    with pytest.raises(EngineRefused, match=r"sample-192.png scores 0.502 \(fail\), expected 0.5 \(pass\)"):
        refused(bundle, graph(1.004))


def test_frames_are_refused_for_a_difference_and_for_a_flip_though_every_sample_passes(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path, levels=(130, 140))
    assert refused(bundle, graph(1.0005)).flips == 0
    with pytest.raises(EngineRefused, match=r"by 0\.9\d% of the threshold, .* \(at most 1%\), [1-9]\d* of 60 verdicts flip"):
        refused(bundle, graph(1.008))
    with pytest.raises(EngineRefused, match=r"by [12]\.\d+% of the threshold"):
        refused(bundle, graph(1.016))
    assert refused(bundle, graph(1.005), "int8").largest > 0.004


def test_a_map_that_shows_the_defect_elsewhere_is_refused(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    with OnnxEngine(bundle) as reference:
        near = parity.near_threshold(reference, 0.01, untold, 20)
    with Other(bundle, graph()) as engine:
        assert parity.refuse_unlike(engine, near).largest_map < 0.002
        moved = parity.Near(near.images, near.valid, near.scores, near.maps[:, ::-1])
        with pytest.raises(EngineRefused, match=r"scores differ .* by 0\.\d+% .*, maps by [1-9]\d+\.\d+%"):
            parity.refuse_unlike(engine, moved)


def test_scores_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    with OnnxEngine(bundle) as reference:
        near = parity.near_threshold(reference, 0.01, untold, 20)
    with Other(bundle, graph()) as engine:
        lost = parity.Near(near.images, near.valid, np.full_like(near.scores, np.nan), near.maps)
        with pytest.raises(EngineRefused, match="nan% of the threshold"):
            parity.refuse_unlike(engine, lost)


def test_a_network_that_no_blot_moves_cannot_be_compared_and_says_so(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path, threshold=5.0, levels=(140,))
    with OnnxEngine(bundle) as reference, pytest.raises(EngineRefused, match="0 of 10 frames near its threshold"):
        parity.near_threshold(reference, 0.01, untold, 10)


def test_the_shipped_bundle_judges_real_parts_the_same_at_half_precision() -> None:
    bundle = open_bundle(ENGINES / "paper", ENGINES / "trust")
    paths = pictures.listed(ENGINES / "recording").taken
    half = halved(bundle.read(NETWORK))
    with OnnxEngine(bundle) as full, Other(bundle, half) as halves:
        for path in paths[::4]:
            image = pictures.read(path)
            assert picture_score(halves, image) == pytest.approx(picture_score(full, image), rel=1e-3, abs=1e-3)
        assert halves.images.dtype == np.uint8
        assert halves().score.dtype == np.float32
        expected = halves().expected
        assert expected is not None
        assert expected.dtype == np.uint8


def test_layers_are_halved_and_distances_are_not() -> None:
    import onnx

    bundle = open_bundle(ENGINES / "paper", ENGINES / "trust")
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(halved(bundle.read(NETWORK))), data_prop=True)
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    by = {node.name: {kinds[name] for name in node.output if name in kinds} for node in model.graph.node}
    half, full = {onnx.TensorProto.FLOAT16}, {onnx.TensorProto.FLOAT}
    layers = [found for name, found in by.items() if name.endswith("/Conv") and name.startswith("/backbone")]
    assert len(layers) > 30
    assert all(found == half for found in layers)
    measures = [found for name, found in by.items() if name.startswith(("/bank", "/gaussian")) and "Constant" not in name]
    assert len(measures) > 10
    assert half not in measures
    assert full in measures


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 16])
def test_regions_that_go_through_the_network_together_keep_their_own_scores(tmp_path: Path, batch: int) -> None:
    """Two cameras, five regions each, one of them outside the frame: whatever the batch, each finding is its region's."""
    bundle = tiny_bundle(tmp_path)
    levels = {"left": (130, 240, 150, 160), "right": (140, 135, 10, 145)}
    images = {name: np.hstack([picture(level) for level in of]) for name, of in levels.items()}
    rois = {
        f"r{n}": RoiRecipe(bundle="tiny", rectangle=Rectangle(x_px=SIDE * n, y_px=0, w_px=SIDE, h_px=SIDE)) for n in range(5)
    }
    recipe = Recipe(cameras={name: CameraRecipe(rois=rois) for name in levels})
    with OnnxEngine(bundle, batch=batch) as engine:
        inspector = Inspector(recipe, {"tiny": engine})
        for _ in range(2):
            found = inspector.inspect({name: [frame(image)] for name, image in images.items()})
            assert found.verdict is Verdict.FAIL
            assert [(f.camera, f.roi) for f in found.findings] == [(c, f"r{n}") for c in levels for n in range(5)]
            wanted = [score_of(level) for of in levels.values() for level in of]
            assert [f.score for f in found.findings if f.score is not None] == pytest.approx(wanted, abs=1e-3)
            assert [f.reason for f in found.findings].count(Reason.WRONG_FORMAT) == 2
            assert [(v.finding.camera, v.finding.roi, v.offset_px) for v in found.views] == [
                ("left", "r1", (SIDE, 0)), ("right", "r2", (2 * SIDE, 0)),
            ]  # fmt: skip
            assert [region.peak for v in found.views for region in v.finding.regions] == pytest.approx([0.875, 0.922], abs=1e-3)


def test_a_precision_that_a_bundle_cannot_have_is_refused() -> None:
    plain = graph()
    assert chosen(plain, "auto", "b") == "fp16"
    assert chosen(plain, "fp32", "b") == "fp32"
    assert converted(plain, "fp32") is plain
    with pytest.raises(EngineError, match="was not trained as int8"):
        chosen(plain, "int8", "b")
