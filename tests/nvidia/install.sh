#!/usr/bin/env bash
# For tests without a GPU: PyCUDA (built here), TensorRT-RTX and the bindings of TensorRT 10.3, 10.16 and 11.4.
#   tests/nvidia/install.sh PYTHON
# PyCUDA and RTX go into that Python's virtual environment, the bindings beside it, into its folder nvidia. Nothing of it ships.
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")  # absolute, and still the environment's own link
folder=$("$python" -c 'import sys; print(sys.prefix)')/nvidia
pip=("$python" -m pip --disable-pip-version-check -q)

if ! "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("pycuda") is None)'; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  "${pip[@]}" install --no-deps --target "$work/cuda" nvidia-cuda-runtime==13.0.96 nvidia-cuda-profiler-api==13.0.85
  "${pip[@]}" download --no-deps --no-binary=pycuda -d "$work" pycuda==2026.1
  tar xzf "$work"/pycuda-*.tar.gz -C "$work"
  # An empty libcuda to link against: the real one comes with a driver, the tests' own is made by tests/nvidia/parts.py.
  mkdir "$work/lib"
  echo | gcc -shared -x c - -o "$work/lib/libcuda.so" -Wl,-soname,libcuda.so.1
  (cd "$work"/pycuda-*/ && "${pip[@]}" install numpy setuptools &&
    "$python" configure.py --cuda-root="$work/cuda/nvidia/cu13" --cudadrv-lib-dir="$work/lib" --no-cuda-enable-curand >/dev/null &&
    CFLAGS="-O1 -g0" LDFLAGS=-Wl,--no-as-needed "${pip[@]}" install .)
fi

"${pip[@]}" install tensorrt-rtx-cu13-libs==1.7.1.116 tensorrt-rtx-cu13-bindings==1.7.1.116

for wanted in tensorrt-cu12-bindings==10.3.0 tensorrt-cu13-bindings==10.16.1.11 tensorrt-cu13-bindings==11.4.0.106; do
  into=$folder/${wanted#*==}
  [ -d "$into/tensorrt_bindings" ] || [ -d "$into/tensorrt" ] || "${pip[@]}" install --no-deps --target "$into" "$wanted"
done
