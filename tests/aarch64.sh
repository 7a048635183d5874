#!/usr/bin/env bash
# The line on another processor: `make demo`, `inspect` and the outbox's tests in a Debian for arm64 that qemu-user-static emulates.
#
#   tests/aarch64.sh [FOLDER]
#
# Needs root and the network. FOLDER (default /var/tmp/edge-inspector-aarch64) keeps the userland, 2 GB, for the next time.
# Emulated, a part takes seconds. NATIVE: the Python here that has edge-inspector installed, for the scores to compare with.
# Nothing of this machine's /sys is shown: ONNX Runtime would find the wrong processor there and die of it.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$(realpath -m "${1:-/var/tmp/edge-inspector-aarch64}")
root=$folder/root
native=${NATIVE:-.venv/bin/python}
packages=ca-certificates,python3-venv,make,libgl1,libglib2.0-0,mosquitto

[ "$(id -u)" = 0 ] || { echo "tests/aarch64.sh mounts and changes its root: run it as root"; exit 2; }
"$native" -c 'import edge_inspector' || { echo "$native has no edge-inspector to compare with: run make demo, or set NATIVE"; exit 2; }

step() { echo "--- $(date +%T) $*"; }

# Run a command in the userland, in /src. Its mounts and processes end with it.
within() {
  unshare --mount --pid --fork --kill-child bash -c '
    mount --make-rprivate /
    mount -t proc proc "$0/proc"
    mkdir -p "$0/dev/shm"
    mount -t tmpfs tmpfs "$0/dev/shm"
    exec chroot "$0" sh -c "cd /src && $1"
  ' "$root" "$1"
}

install_emulator() {
  command -v debootstrap >/dev/null && [ -x /usr/bin/qemu-aarch64-static ] ||
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends debootstrap qemu-user-static >/dev/null; }
  local kernel=/proc/sys/fs/binfmt_misc
  [ -e $kernel/register ] || mount -t binfmt_misc binfmt_misc $kernel
  # What the package has systemd do at boot.
  [ -e $kernel/qemu-aarch64 ] || cat /usr/lib/binfmt.d/qemu-aarch64.conf >$kernel/register
}

make_userland() {
  [ -e "$folder/complete" ] && return
  rm -rf "$root"
  mkdir -p "$folder"
  debootstrap --arch=arm64 --variant=minbase --include=$packages bookworm "$root" >"$folder/debootstrap.log"
  touch "$folder/complete"
}

# The working tree, and how this machine reaches the network.
fill_userland() {
  cp /etc/resolv.conf /etc/hosts "$root/etc/"
  cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
  mkdir -p "$root/src"
  find "$root/src" -mindepth 1 -maxdepth 1 ! -name '.venv' -exec rm -rf {} +
  git ls-files -coz --exclude-standard | tar --null -T - -c --ignore-failed-read | tar -x -C "$root/src"
}

inspect='-m edge_inspector.cli inspect engines/paper engines/recording/paper-*[05].png --trust engines/trust --json'

compare_scores() {
  local code=0
  # shellcheck disable=SC2086 # several words, and a pattern
  "$native" $inspect >"$folder/native.json" || code=$?
  [ $code -le 1 ] || exit $code
  code=0
  within ".venv/bin/python $inspect" >"$folder/aarch64.json" || code=$?
  [ $code -le 1 ] || exit $code
  "$native" - "$folder/native.json" "$folder/aarch64.json" <<'PYTHON'
import json
import sys

here, there = (json.load(open(name)) for name in sys.argv[1:])
assert len(here) == len(there) > 0
scores = [[result["findings"][0]["score"] for result in results] for results in (here, there)]
worst = max(abs(a - b) for a, b in zip(*scores, strict=True))
print(f"{len(here)} pictures: scores differ by {worst:.2g} at most")
assert worst < 0.005, "the scores are not the same to two digits"
assert [a["verdict"] for a in here] == [b["verdict"] for b in there], "the verdicts differ"
PYTHON
}

step "an arm64 userland in $root"
install_emulator
make_userland
fill_userland
within 'uname -m'
step "make demo"
within 'make demo'
step "inspect: scores there and here"
compare_scores
step "the outbox's tests"
within '.venv/bin/pip install -q --disable-pip-version-check pytest hypothesis jsonschema psutil && .venv/bin/python -m pytest tests/test_outbox.py'
step "done"
