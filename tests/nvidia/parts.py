"""Parts for tests without a GPU: PyCUDA on a stand-in driver, a stand-in TensorRT, NVIDIA's own bindings, TensorRT-RTX."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
BINDINGS = Path(sys.prefix) / "nvidia"
VERSIONS = ("10.3.0", "10.16.1.11", "11.4.0.106")


def needs(present: bool, what: str) -> None:
    """Skip by name, but fail where everything should have been installed."""
    if present:
        return
    message = f"{what} is not installed: tests/nvidia/install.sh"
    pytest.fail(message) if os.environ.get("EDGE_INSPECTOR_NVIDIA") else pytest.skip(message)


def needs_pycuda() -> None:
    needs(find_spec("pycuda") is not None, "PyCUDA")


def undefined(library: Path, prefix: str) -> list[str]:
    """Symbols that a library expects from another."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True).stdout
    return sorted({line.split()[-1].split("@")[0] for line in listed.splitlines() if line.split()[-1].startswith(prefix)})


def stand_in_driver(folder: Path) -> Path:
    """Compile libcuda.c, with every other call that PyCUDA links as `not supported`; returns the folder to load from."""
    spec = find_spec("pycuda")
    assert spec is not None
    assert spec.origin is not None
    driver = next(Path(spec.origin).parent.glob("_driver*.so"))
    source = (HERE / "libcuda.c").read_text()
    others = [name for name in undefined(driver, "cu") if f" {name}(" not in source]
    rest = "\n".join(f"int {name}(void) {{ return 801; }}" for name in others)
    (folder / "rest.c").write_text(rest)
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1"),
         str(HERE / "libcuda.c"), str(folder / "rest.c")],
        check=True,
    )  # fmt: skip
    return folder


def environment(driver: Path, **more: str) -> dict[str, str]:
    """For a process that finds the stand-in driver, and the stand-in TensorRT as `tensorrt`."""
    paths = [str(HERE / "stand_in"), str(HERE.parents[1])]
    return {**os.environ, "LD_LIBRARY_PATH": str(driver), "PYTHONPATH": os.pathsep.join(paths), **more}


def stub_libraries(bindings: Path, folder: Path) -> Path:
    """Compile what NVIDIA's bindings link to, with every function of it giving nothing: enough to import them."""
    module = next(bindings.glob("tensorrt*/tensorrt.so"))
    listed = subprocess.run(["readelf", "-d", str(module)], capture_output=True, text=True, check=True).stdout
    wanted = [line.split("[")[1].rstrip("]") for line in listed.splitlines() if "[libnv" in line]
    names = {name for prefix in ("create", "get", "init") for name in undefined(module, prefix)}
    (folder / "stub.c").write_text("\n".join(f"void *{name}(void) {{ return 0; }}" for name in sorted(names)))
    for name in wanted:
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", "-o", str(folder / name), str(folder / "stub.c")],
            check=True,
        )
    return folder
