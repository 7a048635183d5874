"""Every call that our builder and runner make exists in NVIDIA's own bindings of 10.3, 10.16 and 11.4."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.nvidia.parts import BINDINGS, VERSIONS, environment, needs, stub_libraries

pytest.importorskip("onnx", reason='onnx is not installed: pip install "edge-inspector[tensorrt]"')

from tests.tiny import graph

SOURCE = Path(__file__).resolve().parents[2] / "edge_inspector" / "runtime" / "tensorrt.py"

CALLS = """
import sys, json, hashlib
from pathlib import Path
from edge_inspector.runtime import tensorrt as ours
import tensorrt
plan, cache = ours.compiled(tensorrt, Path(sys.argv[1]).read_bytes(), 1, lambda *told: None, b"")
try:
    ours.compiled(tensorrt, b"no graph", 1, lambda *told: None)
    sys.exit("what is no graph was compiled")
except ours.EngineError as error:
    assert "this is no graph" in error.message
log = ours.log_of(tensorrt)
engine = ours.TensorRtEngine(None, Path("none"), "", "fp32")
from edge_inspector.runtime.cuda import gpu
engine._gpu, engine._log, engine._buffers = gpu(), log, {}
with engine._gpu:
    engine._load(tensorrt, plan)
    engine._bind(tensorrt)
engine()
engine.stages_ms()
engine._close()
print(json.dumps(sorted(tensorrt.CALLS)))
"""
FOUND = """
import sys, json
sys.path.insert(0, sys.argv[1])
import tensorrt_bindings as trt
from edge_inspector.runtime import tensorrt as ours
def has(name):
    thing = trt
    for part in name.split("."):
        if not hasattr(thing, part):
            return False
        thing = getattr(thing, part)
    return True
kind = trt.NetworkDefinitionCreationFlag
print(json.dumps({
    "version": trt.__version__,
    "has": {name: has(name) for name in json.loads(sys.argv[2])},
    "flags": ours._flags(kind, "EXPLICIT_BATCH", "STRONGLY_TYPED"),
    "typed": 1 << int(kind.STRONGLY_TYPED),
    "members": sorted(kind.__members__),
    "log": ours.log_of(trt).tail(),
    "monitor": isinstance(ours._monitor_of(trt, lambda *told: None), trt.IProgressMonitor),
    "types": [str(trt.nptype(trt.DataType.UINT8)), str(trt.nptype(trt.DataType.FLOAT))],
}))
"""


@pytest.fixture(scope="module")
def calls(driver: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Members that are looked at while the stand-in is built for and run, and those that the source names."""
    file = tmp_path_factory.mktemp("graph") / "graph.onnx"
    file.write_bytes(graph())
    done = subprocess.run([sys.executable, "-c", CALLS, str(file)], env=environment(driver), capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    named = re.findall(r"\btrt((?:\.[A-Za-z_0-9]+)+)", SOURCE.read_text())
    return sorted({*json.loads(done.stdout), *(name[1:] for name in named)} - {"__version__"})


def test_the_calls_are_those_of_a_whole_life(calls: list[str]) -> None:
    assert {"Builder.build_serialized_network", "OnnxParser.parse", "IBuilderConfig.clear_flag", "OnnxParser.get_error",
            "ICudaEngine.get_tensor_dtype", "IExecutionContext.execute_async_v3", "MemoryPoolType.WORKSPACE"} <= set(calls)  # fmt: skip
    assert len(calls) > 35


@pytest.mark.parametrize("version", VERSIONS)
def test_every_call_exists_in_nvidias_bindings(calls: list[str], version: str, tmp_path: Path) -> None:
    bindings = BINDINGS / version
    needs(bindings.exists(), f"tensorrt's bindings {version}")
    libraries = stub_libraries(bindings, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", FOUND, str(bindings), json.dumps(calls)], env=environment(libraries), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["version"] == version
    missing = [name for name, there in found["has"].items() if not there]
    print(f"{version}: {len(calls) - len(missing)} of {len(calls)} calls, flags {found['flags']}, {found['members']}")
    assert missing == []
    assert found["flags"] & found["typed"], "the network is strongly typed"
    assert ("EXPLICIT_BATCH" in found["members"]) == (not version.startswith("11")), "the flag that newer versions lack"
    assert found["monitor"]
    assert found["types"] == ["<class 'numpy.uint8'>", "<class 'numpy.float32'>"]
