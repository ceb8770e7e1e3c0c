"""Evaluation: each number against its definition, its errors against simulation, and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import jax
import numpy as np
import pytest
import scipy.stats

from medvdm.data import ImageData, from_arrays
from medvdm.errors import DataError, InputError
from medvdm.evaluation import baselines, held_out
from medvdm.evaluation.held_out import evaluate_weights
from medvdm.evaluation.statistics import clustered_stderr
from medvdm.models import vdm

SHAPE = (8, 9, 1)
PIXELS = math.prod(SHAPE)


def model(**changes: Any) -> tuple[Any, Any]:
    """Graph and parameters of a tiny model with random weights everywhere."""
    sizes = {"latent": 3, "embedding_dim": 8, "encoder_width": 8, "decoder_width": 8, "inner_width": 8}
    layers = dict.fromkeys(("encoder_layers", "decoder_layers", "score_layers"), 1)
    config = vdm.VDMConfig(**{"image_shape": SHAPE, "classes": 2, **sizes, **layers, **changes})
    leaves, treedef = jax.tree.flatten(vdm.init(config, 0))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [p + 0.3 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    return vdm.graph_of(config), jax.tree.unflatten(treedef, leaves)


def images(n: int, shape: tuple[int, ...] = SHAPE, seed: int = 0, **more: Any) -> ImageData:
    """Blocks of smooth random images, three a patient, all in the test split unless told."""
    rng = np.random.default_rng(seed)
    pixels = rng.beta(0.5, 0.7, (n, *shape)).astype(np.float32)
    given = {"patients": [str(i // 3) for i in range(n)], "splits": ["test"] * n, "class_names": ["a", "b"]}
    return from_arrays(pixels, rng.integers(0, 2, n), **{**given, **more})


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    return model()


@pytest.fixture(scope="module")
def fitted() -> baselines.Baselines:
    train = images(80, seed=5).read(np.arange(80))
    return baselines.fit(train, train[:10])


@pytest.fixture(scope="module")
def result(small: tuple[Any, Any], fitted: baselines.Baselines) -> dict[str, Any]:
    return evaluate_weights(*small, images(14), "test", baselines=fitted, draws=4, batch_size=14)


# The numbers


def test_total_excess_and_rate_follow_from_the_terms(result: dict[str, Any]) -> None:
    terms = result["reconstruction_bpd"] + result["diffusion_bpd"] + result["latent_bpd"]
    assert result["vlb_bpd"] == pytest.approx(terms, rel=1e-9)
    assert result["excess_bpd"] == pytest.approx(result["vlb_bpd"] - result["floor_bpd"], rel=1e-9)
    rate = (result["diffusion_bpd"] + result["latent_bpd"]) * PIXELS
    assert result["rate_bits_per_image"] == pytest.approx(rate, rel=1e-6)
    assert result["vlb_nats_per_image"] == pytest.approx(result["vlb_bpd"] * PIXELS * math.log(2), rel=1e-9)
    assert min(result["diffusion_bpd"], result["latent_bpd"], result["excess_bpd"]) > 0
    assert (result["num_images"], result["num_patients"], result["draws"]) == (14, 5, 4)


def test_the_floor_is_the_mean_binary_entropy(result: dict[str, Any]) -> None:
    x = images(14).read(np.arange(14)).astype(np.float64)
    floor = scipy.stats.entropy(np.stack([x, 1 - x]), base=2, axis=0).mean()
    assert result["floor_bpd"] == pytest.approx(floor, rel=1e-9)


def test_black_and_white_images_have_no_floor(small: tuple[Any, Any]) -> None:
    data = from_arrays(np.eye(9, dtype=np.float32)[None, :8].repeat(4, 0), splits=["test"] * 4)
    found = evaluate_weights(*small, data, "test", null=True, draws=1)
    assert found["floor_bpd"] == 0.0 and found["excess_bpd"] == found["vlb_bpd"]


def test_a_perfect_reconstruction_of_one_image_reaches_the_floor() -> None:
    """A decoder whose bias is the logit of the image: reconstruction = floor, so the excess is the rate."""
    x = np.random.default_rng(0).uniform(0.1, 0.9, SHAPE).astype(np.float32)
    graph, params = model(classes=0)
    params = jax.tree.map(jax.numpy.zeros_like, params)
    assert [leaf.shape for leaf in jax.tree.leaves(params["decoder"])].count((PIXELS,)) == 1, "one bias, the last"
    logits = jax.numpy.asarray(np.log(x / (1 - x)).ravel())
    params["decoder"] = jax.tree.map(lambda p: logits if p.shape == (PIXELS,) else p, params["decoder"])
    found = evaluate_weights(graph, params, from_arrays(x[None], splits=["test"]), "test", draws=3)
    assert found["reconstruction_bpd"] == pytest.approx(found["floor_bpd"], rel=1e-5)
    assert found["excess_bpd"] * PIXELS == pytest.approx(found["rate_bits_per_image"], rel=1e-3)
    assert found["psnr_db"] > 100 and found["ssim"] == pytest.approx(1.0, abs=1e-5)
    assert found["labels"] == "none"


def test_the_baselines_are_those_of_the_images(result: dict[str, Any]) -> None:
    train = images(80, seed=5).read(np.arange(80)).reshape(80, -1)
    x = images(14).read(np.arange(14)).reshape(14, -1).astype(np.float64)

    def bits(p: np.ndarray) -> float:
        p = np.clip(p, 0.001, 0.999)
        return float(-(x * np.log2(p) + (1 - x) * np.log2(1 - p)).mean())

    mean = train.mean(axis=0, dtype=np.float64)
    assert result["mean_image_bpd"] == pytest.approx(bits(mean), rel=1e-5)
    basis = np.linalg.svd(train - mean, full_matrices=False)[2][:64]
    assert result["pca64_bpd"] == pytest.approx(bits(mean + (x - mean) @ basis.T @ basis), rel=1e-4)
    assert result["floor_bpd"] < result["pca64_bpd"] < result["mean_image_bpd"]
    assert result["lingauss_rate_bits_per_image"] > 0


def test_psnr_and_ssim_are_scikit_images(small: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    data = images(6)
    x = data.read(np.arange(6))
    x_hat = np.clip(x + np.random.default_rng(3).normal(0, 0.1, x.shape), 0, 1).astype(np.float32)
    monkeypatch.setattr(held_out, "reconstruct", lambda *_, **__: x_hat)
    found = evaluate_weights(*small, data, "test", draws=1, batch_size=6)
    psnr = [peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in zip(x, x_hat, strict=True)]
    ssim = [structural_similarity(a[..., 0], b[..., 0], data_range=1.0) for a, b in zip(x, x_hat, strict=True)]
    assert found["psnr_db"] == pytest.approx(np.mean(psnr), rel=1e-5)
    assert found["ssim"] == pytest.approx(np.mean(ssim), rel=1e-5)


def test_ssim_is_none_where_its_window_does_not_fit() -> None:
    shape = (6, 12, 1)
    found = evaluate_weights(*model(image_shape=shape), images(3, shape), "test", draws=1)
    assert found["ssim"] is None and found["psnr_db"] > 0


def test_what_is_not_known_is_none_and_never_nan(small: tuple[Any, Any]) -> None:
    alone = evaluate_weights(*small, images(3), "test", draws=1)  # one patient, one draw, no baselines
    for name in ("vlb_bpd_stderr", "vlb_bpd_stderr_noise", "mean_image_bpd", "pca64_bpd", "lingauss_bpd"):
        assert alone[name] is None, name
    few = images(20, seed=5).read(np.arange(20))
    found = evaluate_weights(*small, images(6), "test", baselines=baselines.fit(few, None), draws=2)
    assert found["pca64_bpd"] is None and found["lingauss_bpd"] is None, "cannot be fitted on 20 images"
    assert found["lingauss_rate_bits_per_image"] is None and found["mean_image_bpd"] > 0
    assert json.loads(json.dumps(found, allow_nan=False))["pca64_bpd"] is None


# The errors


def test_clustered_error_against_brute_force() -> None:
    rng = np.random.default_rng(0)
    values, groups = rng.normal(3, 2, 40), rng.integers(0, 9, 40)
    total = 0.0
    for group in set(groups):
        residual = sum(v - values.mean() for v, g in zip(values, groups, strict=True) if g == group)
        total += residual**2
    count = len(set(groups))
    expected = math.sqrt(count / (count - 1) * total) / 40
    assert clustered_stderr(values, [f"patient {g}" for g in groups]) == pytest.approx(expected, rel=1e-12)


def test_clustered_error_of_groups_of_one_is_the_usual_one() -> None:
    values = np.random.default_rng(1).normal(size=25)
    assert clustered_stderr(values, [str(i) for i in range(25)]) == pytest.approx(scipy.stats.sem(values), rel=1e-12)


def test_clustered_error_of_copies_is_that_of_the_originals() -> None:
    """Four copies of each image are not four times the evidence."""
    values = np.random.default_rng(2).normal(size=25)
    groups = np.arange(25)
    assert clustered_stderr(values.repeat(4), groups.repeat(4)) == pytest.approx(scipy.stats.sem(values), rel=1e-12)
    assert scipy.stats.sem(values.repeat(4)) < 0.6 * clustered_stderr(values.repeat(4), groups.repeat(4))


def test_clustered_error_needs_two_patients() -> None:
    assert math.isnan(clustered_stderr(np.array([1.0, 2.0]), ["p", "p"]))


def test_clustered_error_covers_the_mean() -> None:
    """Patients of 1 to 9 images that are alike: 95 % intervals hold the truth, those that ignore patients do not."""
    rng = np.random.default_rng(3)
    inside = naive = 0
    for _ in range(600):
        sizes = rng.integers(1, 10, 60)
        groups = np.arange(60).repeat(sizes)
        values = rng.normal(0, 1, 60).repeat(sizes) + rng.normal(0, 0.5, len(groups))
        inside += abs(values.mean()) < 1.96 * clustered_stderr(values, groups)
        naive += abs(values.mean()) < 1.96 * scipy.stats.sem(values)
    assert 0.91 < inside / 600 < 0.98
    assert naive / 600 < 0.75


def test_patients_enter_the_error(small: tuple[Any, Any]) -> None:
    """The same images, once as six patients and once each as its own: other errors, the same means."""
    one = images(18)
    by_patient = evaluate_weights(*small, one, "test", draws=2, batch_size=18)
    alone = evaluate_weights(*small, images(18, patients=list(range(18))), "test", draws=2, batch_size=18)
    assert alone["vlb_bpd"] == by_patient["vlb_bpd"]
    assert alone["vlb_bpd_stderr"] != by_patient["vlb_bpd_stderr"]
    assert (by_patient["num_patients"], alone["num_patients"]) == (6, 18)

    graph, params = small
    x, labels = one.read(np.arange(18)), one.labels.astype(np.float32)
    key = jax.random.split(jax.random.fold_in(jax.random.key(0), 0))[0]
    totals = held_out.bound_terms(graph, params, x, labels, draws=2, key=key).total.mean(axis=0)
    expected = clustered_stderr(totals, one.patients) / PIXELS / math.log(2)
    assert by_patient["vlb_bpd_stderr"] == pytest.approx(expected, rel=1e-6)


def test_the_error_against_the_linear_gaussian_vdm_is_that_of_the_paired_difference_by_patient(
    small: tuple[Any, Any], fitted: baselines.Baselines, result: dict[str, Any]
) -> None:
    data = images(14)
    x, labels = data.read(np.arange(14)), data.labels.astype(np.float32)
    key = jax.random.split(jax.random.fold_in(jax.random.key(0), 0))[0]
    terms = held_out.bound_terms(*small, x, labels, draws=4, key=key)
    ours, theirs = terms.total.mean(axis=0), sum(fitted.linear_gaussian(x))
    bits = PIXELS * math.log(2)
    assert result["over_lingauss_bpd"] == pytest.approx((ours - theirs).mean() / bits, rel=1e-6)
    paired = clustered_stderr(ours - theirs, data.patients) / bits
    assert result["over_lingauss_bpd_stderr"] == pytest.approx(paired, rel=1e-6)
    # The test could fail: the error without pairs, and that without patients, are others.
    unpaired = math.hypot(clustered_stderr(ours, data.patients), clustered_stderr(theirs, data.patients)) / bits
    alone = scipy.stats.sem(ours - theirs) / bits
    assert min(abs(unpaired / paired - 1), abs(alone / paired - 1)) > 1e-4


def test_the_error_over_noise_is_the_spread_of_repeats_and_shrinks_with_draws(small: tuple[Any, Any]) -> None:
    data = images(6)

    def repeats(draws: int) -> tuple[float, float]:
        """Root mean square of the stated error, and the actual deviation over seeds."""
        found = [evaluate_weights(*small, data, "test", draws=draws, seed=s, batch_size=6) for s in range(24)]
        stated = np.sqrt(np.mean([f["vlb_bpd_stderr_noise"] ** 2 for f in found]))
        return float(stated), float(np.std([f["vlb_bpd"] for f in found], ddof=1))

    (stated_few, actual_few), (stated_many, actual_many) = repeats(4), repeats(36)
    assert stated_few / stated_many == pytest.approx(3.0, rel=0.3)  # sqrt(36 / 4)
    assert actual_few / stated_few == pytest.approx(1.0, rel=0.45)  # 23 degrees of freedom: +- 15 %
    assert actual_many / stated_many == pytest.approx(1.0, rel=0.45)


# Which images count


def test_padding_never_enters_a_mean() -> None:
    """13 images in batches of 5: the last batch is filled up with copies of one that is unlike the others."""
    pixels = np.full((13, *SHAPE), 0.5, np.float32)
    pixels[10] = 0.0  # the first of the last batch, whose copies fill it
    pixels[:, 0, 0, 0] = np.linspace(0.3, 0.7, 13)
    data = from_arrays(pixels, splits=["test"] * 13)
    graph, params = model(classes=0, gamma_min=-25.0)  # no noise in the reconstruction: it is exactly comparable
    fitted = baselines.fit(pixels, None)
    found = {
        size: evaluate_weights(graph, params, data, "test", baselines=fitted, draws=64, batch_size=size)
        for size in (5, 32)
    }
    for name in ("reconstruction_bpd", "latent_bpd", "psnr_db", "ssim"):
        assert found[5][name] == pytest.approx(found[32][name], rel=1e-4), name
    for name in ("floor_bpd", "mean_image_bpd", "num_images", "num_patients"):
        assert found[5][name] == pytest.approx(found[32][name], rel=1e-9), name
    noise = math.hypot(found[5]["vlb_bpd_stderr_noise"], found[32]["vlb_bpd_stderr_noise"])
    assert abs(found[5]["diffusion_bpd"] - found[32]["diffusion_bpd"]) < 4 * noise


def test_only_the_split_that_was_asked_for_is_read(small: tuple[Any, Any]) -> None:
    data = images(12, splits=["train"] * 3 + ["val"] * 3 + ["test"] * 6)
    read: list[int] = []
    inner = data.reader
    object.__setattr__(data, "reader", lambda i: (read.extend(i.tolist()), inner(i))[1])
    for split, expected in {"train": range(3), "val": range(3, 6), "test": range(6, 12), "all": range(12)}.items():
        read.clear()
        found = evaluate_weights(*small, data, split, draws=1)
        assert set(read) == set(expected) and found["num_images"] == len(expected) and found["split"] == split


def test_true_labels_count_and_the_null_ignores_them(small: tuple[Any, Any]) -> None:
    data = images(6)
    swapped = from_arrays(
        data.read(np.arange(6)), 1 - data.labels.argmax(axis=1), class_names=["a", "b"], splits=["test"] * 6
    )
    true, other = (evaluate_weights(*small, d, "test", draws=2) for d in (data, swapped))
    null, same = (evaluate_weights(*small, d, "test", draws=2, null=True) for d in (data, swapped))
    assert (true["labels"], null["labels"]) == ("true", "null")
    assert len({true["diffusion_bpd"], other["diffusion_bpd"], null["diffusion_bpd"]}) == 3
    assert null["diffusion_bpd"] == same["diffusion_bpd"]
    for name in ("latent_bpd", "reconstruction_bpd"):  # only the score network is told the label
        assert true[name] == null[name]


def test_an_evaluation_repeats_itself_and_depends_on_its_seed(small: tuple[Any, Any]) -> None:
    first, again, other = (evaluate_weights(*small, images(6), "test", draws=2, seed=s) for s in (3, 3, 4))
    differ = {name for name in first if first[name] != again[name]}
    assert differ <= {"seconds"}
    assert first["diffusion_bpd"] != other["diffusion_bpd"] and first["floor_bpd"] == other["floor_bpd"]


@pytest.mark.parametrize("on_pixels", [False, True])
def test_the_look_during_training_agrees_with_the_evaluation(small: tuple[Any, Any], on_pixels: bool) -> None:
    data, draws = images(60), 4 if on_pixels else 1
    if on_pixels:
        small = model(architecture="unet", width=4, scales=2, blocks=1, gamma_min=-9.0, gamma_max=5.0)
    full = evaluate_weights(*small, data, "test", draws=32)
    looks = [
        held_out.quick(*small, data, np.arange(60), batch_size=size, labelled=True)["vlb_bpd"] for size in (16, 60)
    ]
    off = full["vlb_bpd_stderr_noise"] * math.sqrt(32 / draws)
    for look in looks:
        assert abs(look - full["vlb_bpd"]) < 4 * off


@pytest.mark.parametrize(
    ("options", "named"),
    [({"draws": 0}, "draws: 0"), ({"batch_size": 0}, "batch_size: 0"), ({"seed": -1}, "seed: -1")],
)
def test_counts_that_cannot_be_are_refused(options: dict[str, int], named: str, small: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match=named):
        evaluate_weights(*small, images(3), "test", **options)


def test_data_that_do_not_fit_the_model_are_refused(small: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match=r"shape \(9, 8, 1\); expected \(8, 9, 1\)"):
        evaluate_weights(*small, images(3, (9, 8, 1)), "test")
    three = images(3, class_names=["a", "b", "c"])
    with pytest.raises(InputError, match="3 classes; expected 2, or --null"):
        evaluate_weights(*small, three, "test")
    assert evaluate_weights(*small, three, "test", null=True, draws=1)["labels"] == "null"
    with pytest.raises(DataError, match="'val' has no images"):
        evaluate_weights(*small, images(3), "val")
    with pytest.raises(InputError, match="did you mean 'test'"):
        evaluate_weights(*small, images(3), "tset")


def test_the_error_of_an_image_leaves_out_what_changes_slowly_with_time() -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((16, 20_000))
    nothing = np.zeros_like(noise)
    true = 1.0 / math.sqrt(16)  # of a mean of 16
    flat = held_out.Terms(nothing, noise, nothing).stderr
    assert np.sqrt(np.mean(flat**2)) == pytest.approx(true, rel=0.02)
    slope = held_out.Terms(nothing, noise + np.linspace(0, 10, 16)[:, None], nothing)
    stated = np.sqrt(np.mean(slope.stderr**2))
    naive = np.sqrt(np.mean(slope.total.var(axis=0, ddof=1) / 16))
    assert true < stated < 1.2 * true and naive > 3 * true
    assert np.isnan(held_out.Terms(*(np.zeros((1, 3)),) * 3).stderr).all()
