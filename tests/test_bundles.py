"""Bundles: every way to be refused, each with its own words."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_inspector import bundles, graphs, signatures
from edge_inspector.errors import BundleDamaged, BundleUnsupported, BundleUntrusted, SignatureError
from tests.line import ENGINES

PAPER = ENGINES / "paper"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PAPER, tmp_path / "paper"))


def resigned(folder: Path, trust: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and sign it with a fresh trusted key."""
    values = json.loads((folder / "manifest.json").read_text())
    change(values)
    (folder / "manifest.json").write_text(json.dumps(values))
    key = folder.parent / "k" / "key"
    identity = signatures.create_key(key, trust)
    private = signatures.read_private_key(key)
    import base64

    text = {"algorithm": "ed25519", "key_id": identity,
            "signature": base64.b64encode(private.sign((folder / "manifest.json").read_bytes())).decode()}  # fmt: skip
    (folder / "signature").write_text(json.dumps(text))


def test_the_shipped_bundle_is_trusted_small_and_says_what_it_is() -> None:
    opened = bundles.open_bundle(PAPER, ENGINES / "trust")
    assert opened.manifest.product == "recycled-paper"
    assert opened.manifest.training.pictures == 405
    assert opened.manifest.calibration.kept
    assert {s.verdict.value for s in opened.manifest.samples} == {"pass", "fail"}
    assert sum(p.stat().st_size for p in PAPER.iterdir()) < 30_000_000
    assert "train" in opened.manifest.command


def test_unsigned_wrongly_signed_and_unknown_signers_are_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleUntrusted, match="not trusted"):
        bundles.open_bundle(bundle, tmp_path / "empty")
    manifest = bundle / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"release": 1', '"release": 2'))
    with pytest.raises(BundleUntrusted, match="does not fit"):
        bundles.open_bundle(bundle, ENGINES / "trust")
    (bundle / "signature").write_text("{}")
    with pytest.raises(BundleUntrusted, match="not a signature file"):
        bundles.open_bundle(bundle, ENGINES / "trust")
    (bundle / "signature").unlink()
    with pytest.raises(BundleUntrusted, match="not signed"):
        bundles.open_bundle(bundle, ENGINES / "trust")


def _extra(folder: Path) -> None:
    (folder / "extra.bin").write_bytes(b"x")


def _missing(folder: Path) -> None:
    (folder / "sample-good-1.png").unlink()


def _link(folder: Path) -> None:
    (folder / "report.html").rename(folder.parent / "report.html")
    os.symlink(folder.parent / "report.html", folder / "report.html")


def _size(folder: Path) -> None:
    with (folder / "report.html").open("a") as file:
        file.write(" ")


def _hash(folder: Path) -> None:
    data = bytearray((folder / "network.onnx").read_bytes())
    data[5000] ^= 1
    (folder / "network.onnx").write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_extra, "does not list"),
        (_missing, "missing"),
        (_link, "not a plain file"),
        (_size, "manifest says"),
        (_hash, "sha256"),
    ],
)
def test_files_that_are_not_what_the_manifest_says_are_refused(bundle: Path, spoil: Callable[[Path], None], words: str) -> None:
    spoil(bundle)
    with pytest.raises(BundleDamaged, match=words):
        bundles.open_bundle(bundle, ENGINES / "trust")


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/b", ".hidden", "signature"])
def test_file_names_that_escape_are_refused(bundle: Path, tmp_path: Path, name: str) -> None:
    resigned(bundle, tmp_path / "trust", lambda m: m["files"].update({name: {"size": 1, "sha256": "0" * 64}}))
    with pytest.raises(BundleDamaged, match="not a plain name"):
        bundles.open_bundle(bundle, tmp_path / "trust")


def test_a_newer_bundle_is_refused_even_if_its_manifest_has_unknown_parts(bundle: Path, tmp_path: Path) -> None:
    resigned(bundle, tmp_path / "trust", lambda m: m.update(min_version="9.0.0", schema="ei.bundle.v9"))
    with pytest.raises(BundleUnsupported, match=r"needs edge-inspector 9\.0\.0"):
        bundles.open_bundle(bundle, tmp_path / "trust")


def test_an_expired_bundle_is_refused_only_by_a_trusted_clock(bundle: Path, tmp_path: Path) -> None:
    resigned(bundle, tmp_path / "trust", lambda m: m.update(not_after="2030-01-01T00:00:00.000Z"))
    later = datetime(2030, 1, 1, tzinfo=timezone.utc) + timedelta(days=1)
    with pytest.raises(BundleUnsupported, match="expired"):
        bundles.open_bundle(bundle, tmp_path / "trust", now=later)
    assert bundles.open_bundle(bundle, tmp_path / "trust", now=later, clock_ok=False)


def test_a_network_is_not_needed_to_be_run_to_be_refused() -> None:
    onnx = pytest.importorskip("onnx")
    helper, float_ = onnx.helper, onnx.TensorProto.FLOAT

    def model(**changes: Any) -> Any:
        tensor = helper.make_tensor("w", float_, [1], [1.0])
        if changes.get("external"):
            tensor.ClearField("float_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="../../secret")
        node = helper.make_node(changes.get("op", "Add"), ["x", "w"], ["y"], domain=changes.get("domain", ""))
        nodes = [node]
        if changes.get("inner"):
            body = helper.make_graph([helper.make_node("Foreign", ["x"], ["z"], domain="evil")], "b", [], [
                helper.make_tensor_value_info("z", float_, [1])])  # fmt: skip
            nodes = [helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)]
        graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", float_, [1])],
                                  [helper.make_tensor_value_info("y", float_, [1])], [tensor])  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", changes.get("opset", 17))])

    graphs.refuse_foreign(model().SerializeToString(), "x")
    for change, words in (
        ({"external": True}, "other files"), ({"domain": "com.microsoft"}, "foreign domains"), ({"inner": True}, "evil"),
        ({"opset": 21}, "opset 21"),
    ):  # fmt: skip
        with pytest.raises(BundleUnsupported, match=words):
            graphs.refuse_foreign(model(**change).SerializeToString(), "x")
    facts = graphs.facts_of((PAPER / "network.onnx").read_bytes())
    loaded = onnx.load(PAPER / "network.onnx")
    assert facts.operators == {node.op_type for node in loaded.graph.node}
    assert facts.opset == 17


@given(st.binary(max_size=400))
@settings(deadline=None)
def test_random_bytes_are_refused_not_crashed_on(data: bytes) -> None:
    with pytest.raises(BundleUnsupported):
        graphs.refuse_foreign(data, "x")


def test_a_key_is_never_overwritten_and_is_private(tmp_path: Path) -> None:
    signatures.create_key(tmp_path / "k", tmp_path / "trust")
    assert (tmp_path / "k").stat().st_mode & 0o777 == 0o600
    with pytest.raises(SignatureError, match="exists already"):
        signatures.create_key(tmp_path / "k", tmp_path / "trust")
    with pytest.raises(SignatureError, match="not a signing key"):
        signatures.read_private_key(ENGINES / "README.md")
