"""A real parser and builder of NVIDIA's, on the CPU: TensorRT-RTX compiles every family at every precision. It cannot run them."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_inspector.bundles import NETWORK, Bundle, open_bundle
from edge_inspector.errors import EngineError
from edge_inspector.runtime import OnnxEngine, tensorrt
from edge_inspector.runtime.precision import Precision, converted
from edge_inspector.scoring import Wish
from tests.line import ENGINES
from tests.nvidia.parts import needs

pytest.importorskip("onnx", reason='onnx is not installed: pip install "edge-inspector[tensorrt]"')

import onnx

from tests.tiny import tiny_bundle


@pytest.fixture(scope="module")
def rtx() -> Any:
    needs(find_spec("tensorrt_rtx_bindings") is not None, "TensorRT-RTX")
    import tensorrt_rtx_bindings

    return tensorrt_rtx_bindings


@pytest.fixture(scope="module", params=["paper", "fanogan", "int8"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The shipped bundle, and a small one of each other kind, trained here."""
    if request.param == "paper":
        return open_bundle(ENGINES / "paper", ENGINES / "trust")
    pytest.importorskip("torch", reason='torch is not installed: pip install "edge-inspector[train]"')
    from edge_inspector import training
    from tests.test_training import INT8, TINY, drawn, order

    folder = tmp_path_factory.mktemp(request.param)
    family: Any = INT8 if request.param == "int8" else dataclasses.replace(TINY, gan_steps=20, encoder_steps=60)
    good = drawn(folder / "good", 24, size=64)
    return open_bundle(training.train(order(folder, good, family=family, wish=Wish(0.2))).folder, folder / "trust")


def precisions(bundle: Bundle) -> tuple[Precision, ...]:
    return ("int8",) if tensorrt_precision(bundle) == "int8" else ("fp32", "fp16")


def tensorrt_precision(bundle: Bundle) -> str:
    with OnnxEngine(bundle) as engine:
        return engine.precision


def test_every_family_is_parsed_and_built_at_every_precision(rtx: Any, bundle: Bundle) -> None:
    graph = bundle.read(NETWORK)
    sizes = {}
    for precision in precisions(bundle):
        told: list[str] = []

        def tell(phase: str, step: int, steps: int, told: list[str] = told) -> None:
            told.append(phase)

        plan, cache = tensorrt.compiled(rtx, converted(graph, precision), 2, tell)
        assert len(plan) > 10_000
        assert cache == b""
        assert told, "the build tells its phases"
        sizes[precision] = len(plan)
    assert len(sizes) == 1 or sizes["fp16"] < sizes["fp32"]


def test_every_family_judges_the_same_at_half_precision(bundle: Bundle) -> None:
    for precision in precisions(bundle):
        graph = converted(bundle.read(NETWORK), precision)
        with OnnxEngine(bundle, batch=2) as full, OnnxEngine(bundle, batch=2, graph=graph) as other:
            rng = np.random.default_rng(3)
            for _ in range(4):
                full.images[:] = rng.integers(0, 256, full.images.shape)
                full.valid[:] = 1
                other.images[:], other.valid[:] = full.images, full.valid
                assert other().score == pytest.approx(full().score, rel=0.01)


def test_what_the_parser_does_not_know_is_told_in_its_own_words(rtx: Any, tmp_path: Path) -> None:
    model = onnx.load_from_string(tiny_bundle(tmp_path).read(NETWORK))
    model.graph.node[-1].op_type = "Det"
    del model.graph.node[-1].attribute[:]
    with pytest.raises(EngineError, match=r"TensorRT cannot read the graph: .*operator: Det"):
        tensorrt.compiled(rtx, model.SerializeToString(), 1, lambda phase, step, steps: None)
