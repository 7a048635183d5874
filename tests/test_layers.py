"""Modules import only from lines above their own; each outside library has one home; importing the package is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "edge_inspector"
LINES = [
    {"errors", "threads", "durable", "installation", "flood", "confinement"},
    {"access"},
    {"schema"},
    {"frames", "results", "graphs", "packings"},
    {"tiff"},
    {"formats"},
    {"roi", "signatures", "folders", "addresses", "scoring"},
    {"recipes", "bundles", "messages", "pictures"},
    {"door"},
    {"config", "fitting", "outgoing"},
    {"matching", "outputs", "preprocess", "systemd", "documents", "trends", "standing", "journal", "quota", "work"},
    {"database"},
    {"streams", "history"},
    {"salvage"},
    {"cameras", "runtime", "outbox", "mqtt"},
    {"sender"},
    {"resending"},
    {"inspector", "broker", "provenance", "handshake", "health", "subscriber", "capture", "metrics", "selftest", "imaging"},
    {"evidence"},
    {"setting"},
    {"recorder", "readiness"},
    {"training", "wiring", "remote"},
    {"shadow", "replay", "attempts", "rehearsal"},
    {"station"},
    {"updates"},
    {"daemon"},
    {"demo", "checks"},
    {"cli"},
]
HOMES = {
    "torch": {"training"},
    "lightning_fabric": {"training"},
    "onnxruntime": {"runtime", "training"},
    "onnx": {"runtime", "training"},
    "tensorrt": {"runtime"},
    "pycuda": {"runtime"},
    "paho": {"mqtt"},
    "prometheus_client": {"metrics"},
    "sqlite3": {"outbox", "database", "streams", "history", "salvage", "quota", "work", "journal"},
    "yaml": {"schema"},
    "cv2": {"pictures", "preprocess", "cameras", "training"},
    "amqtt": {"demo"},
    "typer": {"cli"},
    "rich": {"cli"},
    "cryptography": {"signatures"},
}


def unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Modules that a file names in import statements: `edge_inspector.x` and outside libraries."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = node.module == "edge_inspector"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if inside else {node.module}
    return names


FILES = [p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py"]


def test_every_module_has_its_line() -> None:
    assert {unit(path) for path in FILES} == set().union(*LINES)


def test_modules_import_only_from_lines_above() -> None:
    line_of = {name: number for number, names in enumerate(LINES) for name in names}
    wrong = [
        f"{unit(path)} imports {name}"
        for path in FILES
        for name in imported(path)
        if name.startswith("edge_inspector.")
        and name.split(".")[1] != unit(path)
        and line_of[name.split(".")[1]] >= line_of[unit(path)]
    ]
    assert wrong == []


def test_each_outside_library_has_its_home() -> None:
    wrong = [
        f"{unit(path)} imports {name}"
        for path in FILES
        for name in imported(path)
        if name.split(".")[0] in HOMES and unit(path) not in HOMES[name.split(".")[0]]
    ]
    assert wrong == []


def test_documents_are_validated_in_one_place() -> None:
    callers = {unit(p) for p in FILES if ".model_validate_json(" in p.read_text()}
    assert callers == {"schema"}


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, edge_inspector; print([m for m in ('torch','cv2','onnxruntime','pydantic') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_modules_and_functions_stay_short() -> None:
    long = [p.name for p in FILES if len(p.read_text().splitlines()) > 500]
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno > 60:
                long.append(f"{path.name}:{node.name}")
    assert long == []
