"""Audits of samples, each against a second route: a formula, another library, brute force, or a planted answer."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Trained, refused, said
from scipy.ndimage import gaussian_filter
from scipy.special import ndtr
from scipy.stats import wasserstein_distance
from skimage.metrics import structural_similarity

import medvdm
from medvdm.cli.tables import audit_table
from medvdm.data import phantom
from medvdm.errors import InputError, RunError
from medvdm.evaluation import baselines
from medvdm.evaluation.audit import Set, Space, audit_set, draw, nearest, pca_features, spectrum_features
from medvdm.evaluation.components import exact_components
from medvdm.evaluation.measures import bands, gray_distance, ms_ssim, num_scales, pair_similarity, power_spectrum
from medvdm.evaluation.statistics import auc, clustered_stderr, logistic, two_sample
from medvdm.runs import audit as audit_module
from medvdm.runs import sample as sample_module
from medvdm.runs.audit import audit, audit_sets
from medvdm.runs.run import Run, load, load_data


@pytest.fixture(scope="module")
def phantoms() -> np.ndarray:
    return phantom.render(np.arange(0, 240, 2), size=32)[0]  # 120 patients, one image each


@pytest.fixture(scope="module")
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# MS-SSIM


def test_ms_ssim_of_an_image_with_itself_is_one(phantoms: np.ndarray) -> None:
    np.testing.assert_allclose(ms_ssim(phantoms[:5], phantoms[:5]), 1.0, atol=1e-4)
    black = np.zeros((1, 32, 32, 1), np.float32)
    assert ms_ssim(black, 1 - black)[0] < 1e-3


def test_one_scale_of_ms_ssim_is_skimages_ssim(phantoms: np.ndarray) -> None:
    """Images below 22 pixels have room for one scale, whose weight is then 1."""
    a, b = phantoms[:6, :20, :21], phantoms[6:12, :20, :21]
    assert num_scales(20, 21) == 1
    for i in range(6):
        _, full = structural_similarity(
            a[i, ..., 0],
            b[i, ..., 0],
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )
        expected = full[5:-5, 5:-5].mean()
        assert ms_ssim(a[i : i + 1], b[i : i + 1])[0] == pytest.approx(max(expected, 0), abs=2e-5)


def naive_ms_ssim(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> float:
    """One pair of gray images in float64, window by window, from the definition."""
    half = np.arange(-5, 6)
    window = np.exp(-(half[:, None] ** 2 + half**2) / (2 * 1.5**2))
    window /= window.sum()
    a, b = a.astype(np.float64), b.astype(np.float64)
    value = 1.0
    for j, weight in enumerate(weights):
        terms = []
        for row in range(a.shape[0] - 10):
            for column in range(a.shape[1] - 10):
                x, y = a[row : row + 11, column : column + 11], b[row : row + 11, column : column + 11]
                m_x, m_y = np.sum(window * x), np.sum(window * y)
                v_x, v_y = np.sum(window * (x - m_x) ** 2), np.sum(window * (y - m_y) ** 2)
                term = (2 * np.sum(window * (x - m_x) * (y - m_y)) + 9e-4) / (v_x + v_y + 9e-4)
                if j == len(weights) - 1:
                    term *= (2 * m_x * m_y + 1e-4) / (m_x**2 + m_y**2 + 1e-4)
                terms.append(term)
        value *= max(np.mean(terms), 0) ** weight
        a, b = (v[: len(v) // 2 * 2, : v.shape[1] // 2 * 2] for v in (a, b))
        a, b = (v.reshape(len(v) // 2, 2, -1, 2).mean(axis=(1, 3)) for v in (a, b))
    return value


def test_ms_ssim_of_several_scales_is_the_definition() -> None:
    a, b = phantom.render(np.array([0, 2]), size=45)[0]  # 45, 22 and 11 pixels: three scales, the first of odd side
    weights = np.array([0.0448, 0.2856, 0.3001]) / (0.0448 + 0.2856 + 0.3001)
    assert num_scales(45, 45) == 3 and num_scales(256, 256) == 5 and num_scales(10, 99) == 0
    assert ms_ssim(a[None], b[None])[0] == pytest.approx(naive_ms_ssim(a[..., 0], b[..., 0], weights), abs=1e-4)


def test_pairs_of_one_patient_are_left_out(phantoms: np.ndarray) -> None:
    """Each image twice: unless the copies are one patient, some pairs are copies and the set seems less varied."""
    twice = np.concatenate([phantoms[:6], phantoms[:6]])
    names = np.tile(np.arange(6), 2)
    apart, _ = pair_similarity(twice, names, pairs=10_000)
    mixed, _ = pair_similarity(twice, pairs=10_000)
    every = [ms_ssim(phantoms[i : i + 1], phantoms[j : j + 1])[0] for i in range(6) for j in range(i)]
    assert apart == pytest.approx(np.mean(every), abs=1e-5)
    assert mixed == pytest.approx((60 * apart + 6) / 66, abs=1e-5)


def test_the_error_of_pair_similarity_covers_other_images(phantoms: np.ndarray) -> None:
    """Against the spread over sets of other images."""
    parts = [pair_similarity(part, pairs=200) for part in np.split(phantoms, 8)]
    spread = np.std([value for value, _ in parts], ddof=1)
    errors = np.mean([error for _, error in parts])
    assert 0.5 < errors / spread < 3  # a deviation from 8 values is known to about a quarter


def visits(seed: int, patients: int = 10, times: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Smooth random images of 16x16 pixels, nearly the same at each visit of a patient, and the patients' numbers."""
    rng = np.random.default_rng(seed)
    smooth = 0.5 + 0.9 * gaussian_filter(rng.standard_normal((patients, 16, 16)), (0, 2, 2))
    x = smooth.repeat(times, axis=0) + 0.01 * rng.standard_normal((patients * times, 16, 16))
    return np.clip(x, 0, 1)[..., None].astype(np.float32), np.arange(patients).repeat(times)


def test_the_error_of_pair_similarity_is_by_patient() -> None:
    """Against the spread over sets of other patients, each seen six times; those visits are no new evidence."""
    parts = [pair_similarity(*visits(seed), pairs=300, seed=seed) for seed in range(40)]
    values, errors = np.array(parts).T
    assert 0.7 < math.sqrt(np.mean(errors**2)) / values.std(ddof=1) < 1.5  # a deviation of 40 values is known to 11 %


def test_the_error_of_pair_similarity_needs_three_patients() -> None:
    images, patients = visits(0, patients=3, times=2)
    value, error = pair_similarity(images[:4], patients[:4])
    assert 0 < value < 1 and math.isnan(error)
    assert pair_similarity(images, patients)[1] > 0


# The power spectrum


def test_white_noise_has_its_variance_at_every_frequency(rng: np.random.Generator) -> None:
    x = 0.5 + 0.1 * rng.standard_normal((400, 32, 32, 1))
    power = power_spectrum(x)
    error = power.std(axis=0, ddof=1) / math.sqrt(len(x))
    assert power.shape == (400, 16)
    # The weighted mean is taken away, so k = 1 (inside the window's main lobe) loses a little.
    assert (np.abs(power.mean(axis=0) - 0.01)[1:] < 4.5 * error[1:]).all()


@pytest.mark.parametrize("shape", [(64, 64), (64, 96)])
def test_a_wave_is_found_at_its_frequency_and_with_its_power(shape: tuple[int, int]) -> None:
    """Parseval: summed over all frequencies, the power is the squared deviation under the squared window."""
    side, k = 64, 11
    rows, columns = np.mgrid[: shape[0], : shape[1]] / side
    wave = 0.5 + 0.3 * np.sin(2 * np.pi * k * (columns * 0.6 + rows * 0.8))  # k cycles a shorter side, slanted
    power = power_spectrum(wave[None, ..., None].astype(np.float32))[0]
    assert power.argmax() == k - 1 and power[k - 1] > 50 * np.delete(power, [k - 3, k - 2, k - 1, k, k + 1]).max()
    frequency = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.fftfreq(shape[1])) * side
    count = np.bincount(np.rint(frequency).astype(int).ravel())[1 : side // 2 + 1]
    total = np.sum(power * count) / math.prod(shape)
    assert total == pytest.approx(0.3**2 / 2, rel=0.01)


def test_blur_shows_as_its_transfer_function(rng: np.random.Generator) -> None:
    """White noise through a Gaussian of deviation 1 pixel, as a product of Fourier coefficients."""
    x = rng.standard_normal((300, 64, 64, 1))
    frequency = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64))
    transfer = np.exp(-2 * (np.pi * frequency) ** 2)[..., None]
    blurred = np.fft.ifft2(np.fft.fft2(x, axes=(1, 2)) * transfer, axes=(1, 2)).real
    ratio = power_spectrum(blurred).mean(axis=0) / power_spectrum(x).mean(axis=0)
    k = np.arange(1, 33)
    np.testing.assert_allclose(ratio[2:24], np.exp(-4 * (np.pi * k[2:24] / 64) ** 2), rtol=0.06)


@pytest.mark.parametrize("num", [5, 8, 16, 32, 128])
def test_bands_cover_all_scales_but_the_first_once(num: int) -> None:
    parts = [np.arange(num)[band] for band in bands(num)]
    assert all(len(part) for part in parts)
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(1, num))


# Gray values


def test_gray_distance_is_the_wasserstein_distance(phantoms: np.ndarray) -> None:
    a, b = phantoms[:20], np.clip(phantoms[20:50] ** 1.3, 0, 1)
    assert gray_distance(a, b) == pytest.approx(wasserstein_distance(a.ravel(), b.ravel()), abs=2**-16)
    assert gray_distance(a, a + 0.25) == pytest.approx(0.25, abs=1e-5)


# Classifiers


def test_logistic_regression_is_at_its_minimum(rng: np.random.Generator) -> None:
    """The log odds of two Gaussians with one covariance are linear, with known weights."""
    n, shift = 20_000, np.array([1.0, -0.5, 0.0])
    labels = np.arange(n) % 2
    x = rng.standard_normal((n, 3)) * [1, 2, 3] + labels[:, None] * shift
    fitted = logistic(x, labels, penalty=0.0)
    weights = fitted(np.eye(3)) - fitted(np.zeros((1, 3)))
    expected = shift / np.array([1, 4, 9])
    # Fisher information of a logistic regression: at most n / 4 per unit variance, here at least half of that.
    error = np.sqrt(8 / n) / np.array([1, 2, 3])
    assert (np.abs(weights - expected) < 4.5 * error).all()
    assert np.linalg.norm(logistic(x, labels, penalty=10.0)(np.eye(3))) < 0.3 * np.linalg.norm(weights)


def test_auc_counts_pairs(rng: np.random.Generator) -> None:
    scores, labels = rng.integers(0, 6, 60).astype(float), rng.integers(0, 2, 60)
    ones, zeros = scores[labels == 1], scores[labels == 0]
    wins = np.mean([(a > b) + 0.5 * (a == b) for a in ones for b in zeros])
    assert auc(scores, labels).value == pytest.approx(wins)
    assert auc(-scores, labels).value == pytest.approx(1 - wins)
    assert auc(labels, labels) == (1.0, 0.0)


def test_auc_of_two_gaussians_is_known_and_so_is_its_error(rng: np.random.Generator) -> None:
    """AUC = Phi(d / sqrt 2); the error is compared with the spread over repeated draws."""
    labels = np.arange(200) % 2
    parts = [auc(rng.standard_normal(200) + labels, labels) for _ in range(200)]
    values, errors = np.array(parts).T
    assert abs(values.mean() - ndtr(1 / math.sqrt(2))) < 4.5 * values.std() / math.sqrt(200)
    assert errors.mean() == pytest.approx(values.std(), rel=0.2)  # a deviation of 200 values is known to 5 %


def test_the_error_of_the_auc_is_by_patient(rng: np.random.Generator) -> None:
    """Every image twice says nothing new; and the bootstrap over patients agrees."""
    labels = np.arange(80) % 2
    scores = rng.standard_normal(80) + labels
    once = auc(scores, labels)
    twice = auc(np.tile(scores, 2), np.tile(labels, 2), np.tile(np.arange(80), 2))
    assert twice == pytest.approx(once)
    assert auc(np.tile(scores, 2), np.tile(labels, 2)).stderr < 0.8 * once.stderr
    patients = np.arange(80) // 4  # of both labels
    drawn = []
    for _ in range(500):
        rows = np.concatenate([np.flatnonzero(patients == p) for p in rng.integers(0, 20, 20)])
        drawn.append(auc(scores[rows], labels[rows]).value)
    assert auc(scores, labels, patients).stderr == pytest.approx(np.std(drawn), rel=0.25)


def test_the_error_of_the_auc_of_one_kind_is_that_of_a_mean(rng: np.random.Generator) -> None:
    """With a crowd of zeros whose law is known, the AUC is the mean of F(score) over the ones."""
    groups = np.repeat(np.arange(20), 3)
    ones = np.repeat(rng.random(20), 3)
    zeros = np.linspace(0, 1, 200_001)
    area = auc(
        np.append(ones, zeros), np.repeat([1, 0], [60, len(zeros)]), np.append(groups, 20 + np.arange(len(zeros)))
    )
    assert area.value == pytest.approx(ones.mean(), abs=1e-4)
    assert area.stderr == pytest.approx(clustered_stderr(ones, groups), rel=0.05)


def test_two_halves_of_one_set_cannot_be_told_apart(phantoms: np.ndarray) -> None:
    mean, components, variances = exact_components(phantoms.reshape(120, -1), 8)
    features = pca_features(phantoms, mean, components, variances)
    found = [two_sample(features[::2], features[1::2], seed=seed) for seed in range(3)]
    assert all(abs(f.value - 0.5) < 4 * f.stderr and 0.01 < f.stderr < 0.1 for f in found)


def test_training_images_are_no_yardstick_for_others_have_not_been_seen_by_the_components() -> None:
    """Three sets of one law, Gaussian with falling variances: only the one that the components were fitted on is told
    from another, for its scores vary as much as their variances say, and the others' vary less."""
    rng = np.random.default_rng(0)
    train, held_out, fresh = rng.standard_normal((3, 100, 400)).astype(np.float32) * np.arange(1, 401) ** -0.6
    space = exact_components(train, 64)
    seen, one, other = (pca_features(x, *space) for x in (train, held_out, fresh))
    found = two_sample(other, one)
    assert abs(found.value - 0.5) < 4 * 1.5 * found.stderr  # folds share images, which the stated error leaves out
    assert two_sample(seen, one).value > 0.8


def test_black_and_white_are_told_apart(rng: np.random.Generator) -> None:
    black, white = 0.1 * rng.random((2, 30, 8))
    found = two_sample(black, white + 0.9)
    assert found == (1.0, 0.0)


def test_the_squares_let_a_linear_classifier_see_a_spread(rng: np.random.Generator) -> None:
    a, b = rng.standard_normal((300, 4)), 2 * rng.standard_normal((300, 4))
    space = (np.zeros(4), np.eye(4), np.ones(4))
    linear = two_sample(a, b)
    both = two_sample(pca_features(a, *space), pca_features(b, *space))
    assert abs(linear.value - 0.5) < 4 * linear.stderr
    # The best statistic is the sum of squares: chi-squared against four times chi-squared, 4 degrees of freedom.
    best = np.mean(np.sum(a**2, axis=1)[:, None] < np.sum(b**2, axis=1))
    assert both.value == pytest.approx(best, abs=0.03)


def test_a_patient_is_in_one_fold(rng: np.random.Generator) -> None:
    """Two sets of the same law, but with 12 near-copies of each of 10 patients. Split by image, the classifier knows
    each patient from training and tells the sets apart; split by patient, it has nothing to go by."""
    a, b = (np.repeat(rng.standard_normal((10, 40)), 12, axis=0) for _ in range(2))
    names = np.repeat(np.arange(10), 12)
    leaky = two_sample(a, b)
    honest = two_sample(a, b, [f"a{n}" for n in names], [f"b{n}" for n in names])
    assert leaky.value > 0.99
    assert abs(honest.value - 0.5) < 0.35 and honest.stderr > 5 * leaky.stderr


# Nearest


def test_nearest_finds_a_planted_copy(phantoms: np.ndarray) -> None:
    train = phantoms[20:].copy()
    train[33] = phantoms[4] + 0.001
    distance, where = nearest(phantoms[:20], train)
    assert where[4] == 33 and distance[4] == pytest.approx(0.001, rel=1e-3)
    brute = np.sqrt(((phantoms[:20, None] - train) ** 2).mean(axis=(2, 3, 4)))
    np.testing.assert_array_equal(where, brute.argmin(axis=1))
    np.testing.assert_allclose(distance, brute.min(axis=1), rtol=1e-4)
    in_parts = nearest(phantoms[:20], (train[i : i + 17] for i in range(0, 100, 17)))
    np.testing.assert_array_equal(in_parts[1], where)
    np.testing.assert_allclose(in_parts[0], distance, rtol=1e-6)


def test_nearest_of_another_patient(phantoms: np.ndarray) -> None:
    itself, where = nearest(phantoms[:8], phantoms)
    assert (itself == 0).all() and where.tolist() == list(range(8))
    names = np.arange(120) // 2
    other, where = nearest(phantoms[:8], phantoms, names[:8], names)
    assert (other > 0.01).all() and (names[where] != names[:8]).all()
    with pytest.raises(InputError, match="another patient"):
        nearest(phantoms[:2], phantoms[:2], names[:2], names[:2])
    texts = [str(name) for name in names]  # one set's names may be numbers and the other's text
    for ours, theirs in ((names, texts), (texts, names), (texts, np.array(texts))):
        np.testing.assert_array_equal(nearest(phantoms[:8], phantoms, ours[:8], theirs)[1], where)


# All of it


def test_an_audit_is_its_parts_with_the_patients_of_each_set() -> None:
    """Three sets of repeated visits that share some patients, against direct calls."""
    (x, patients), (real, others), (more, new) = visits(0, 9, 3), visits(1, 14, 2), visits(2, 5, 2)
    real, others = real[:27], others[:27]
    real, others = 0.5 + 0.8 * (real - 0.5), others + 100
    train, known = np.concatenate([x[:18], more]), np.concatenate([patients[:18], new + 50])
    components = np.linalg.qr(np.random.default_rng(3).standard_normal((256, 70)))[0].T  # any directions, over 64
    space = Space(train.mean(axis=0).ravel(), components.astype(np.float32), np.linspace(2, 0.1, 70))
    names = {"groups": patients, "real_groups": others, "train_groups": known}
    found = audit_set(x, real, train, space, **names, seed=4)
    assert found["num_images"] == 27
    assert (found["ms_ssim"], found["ms_ssim_stderr"]) == pair_similarity(x, patients, seed=4)
    power, real_power = (power_spectrum(images).mean(axis=0) for images in (x, real))
    for name, band in zip(("low", "middle", "high"), bands(8), strict=True):
        assert found[f"power_{name}"] == pytest.approx(power[band].mean() / real_power[band].mean())
    assert found["power_low"] > 1.2  # the images have more contrast than the real ones
    assert found["gray_distance"] == gray_distance(x, real)
    for name, features in {
        "coarse": lambda images: pca_features(images, *space, k=8),
        "pca": lambda images: pca_features(images, *space, k=64),
        "spectrum": spectrum_features,
    }.items():
        direct = two_sample(features(x), features(real), patients, others, folds=4, seed=4)
        assert (found[f"c2st_{name}"], found[f"c2st_{name}_stderr"]) == direct, name
    stranger = patients[:, None] != known
    pixels = np.sqrt(((x[:, None] - train).astype(np.float64) ** 2).mean(axis=(2, 3, 4)))
    assert found["nearest_pixel"] == pytest.approx(np.median(np.where(stranger, pixels, np.inf).min(axis=1)), rel=1e-6)
    assert found["nearest_pixel_least"] == pytest.approx(pixels[stranger].min(), rel=1e-6)
    onto = components[:64].T @ components[:64]  # projected back to pixels, whose root mean square is the distance
    project = lambda images: images.reshape(len(images), -1) @ onto  # noqa: E731
    linear = np.sqrt(((project(x)[:, None] - project(train)).astype(np.float64) ** 2).mean(axis=2))
    assert found["nearest_pca"] == pytest.approx(np.median(np.where(stranger, linear, np.inf).min(axis=1)), rel=1e-3)
    # The test could fail: each set's patients count.
    alone = audit_set(x, real, train, space, seed=4)
    for name in ("ms_ssim", "ms_ssim_stderr", "c2st_coarse", "c2st_pca", "nearest_pixel", "nearest_pca"):
        assert found[name] != pytest.approx(alone[name], rel=1e-3), name
    assert alone["nearest_pixel_least"] == 0.0


def other_splits(loaded: Run, **splits: str) -> tuple[Run, medvdm.data.ImageData]:
    """The run's data with other splits of some training patients, and the run as if it had been trained on that."""
    data = load_data(loaded)
    data = replace(data, splits=np.array([splits.get(p, s) for p, s in zip(data.patients, data.splits, strict=True)]))
    record = {**loaded.record, "data": {**loaded.record["data"], "fingerprint": data.fingerprint()}}
    return replace(loaded, record=record), data


def rows_of(images: np.ndarray, all_images: np.ndarray) -> list[int]:
    """Where each image is found among all."""
    return [int(np.flatnonzero((all_images == image).all(axis=(1, 2, 3)))[0]) for image in images]


def test_the_yardstick_is_the_other_held_out_split_where_it_has_enough_patients(trained: Trained) -> None:
    """And all sets have the images of the smaller split, drawn at random, each with its own patient."""
    loaded = load(trained.path)
    data = load_data(loaded)
    spare = sorted(set(data.patients[data.indices("train")]))[:6]
    assert len(set(data.patients[data.indices("val")])) == 3
    for number, split, other in ((1, "test", "val"), (2, "test", "val"), (2, "val", "test")):
        moved = dict.fromkeys(spare[:number], "val") | dict.fromkeys(spare[5:], "test")
        changed, given = other_splits(loaded, **moved)
        n = 10 if number == 2 else given.counts()["test"]["images"]
        sets = audit_sets(changed, given, num=10, steps=2, split=split)
        assert ("real" in sets) == (number == 2), "ten images of five patients are enough, eight of four are not"
        assert {len(one.images) for one in sets.values()} | {len(one.groups) for one in sets.values()} == {n}
        for name, of in {"held_out": split, "real": other}.items():
            if name in sets:
                everything = given.indices(of)
                rows = everything[rows_of(sets[name].images, given.read(everything))]
                assert len(set(rows)) == n
                np.testing.assert_array_equal(sets[name].groups, given.patients[rows])


def test_sets_of_an_audit_have_one_size_since_its_numbers_depend_on_it() -> None:
    """Images of one law, each with a brightness of its own: their histograms are the further apart the fewer there are,
    so a column of 120 images seems closer than one of 30. Drawn to one size, it does not."""
    rng = np.random.default_rng(0)
    x = np.clip(rng.uniform(0.2, 0.8, (1200, 1, 1, 1)) + 0.05 * rng.standard_normal((1200, 11, 11, 1)), 0, 1)
    x = x.astype(np.float32)
    reference, few, many = x[:30], x[30:630].reshape(20, 30, 11, 11, 1), x[600:].reshape(5, 120, 11, 11, 1)
    mean = lambda sets: float(np.mean([gray_distance(one, reference) for one in sets]))  # noqa: E731
    other_law = [gray_distance(one, x[480:600]) for one in few[:10]]
    assert np.mean(other_law) < 0.85 * mean(few), "more images seem nearer, on either side"
    drawn = [one[draw(120, 30, seed)] for one in many for seed in range(4)]
    error = np.std([gray_distance(one, reference) for one in few]) * math.sqrt(1 / 20 + 1 / 5)
    assert abs(mean(drawn) - mean(few)) < 4 * error
    space = Space(np.zeros(121), np.eye(121)[:8], np.ones(8))
    with pytest.raises(InputError, match="30 and 120 images; expected as many of each"):
        audit_set(few[0], many[0], reference, space)
    np.testing.assert_array_equal(draw(5, 5, 3), np.arange(5))
    assert len(set(draw(50, 9, 0)) | set(draw(50, 9, 1))) > 9 and (np.diff(draw(50, 9, 0)) > 0).all()
    with pytest.raises(InputError, match="n: 6; expected 1 to 5"):
        draw(5, 6)


def test_nearest_training_images_are_found_in_parts(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against one part that holds all, and never more than a part is read."""
    loaded = load(trained.path)
    data = load_data(loaded)
    space = Space(loaded.baselines.mean, loaded.baselines.components, loaded.baselines.variances)
    test = data.indices("test")
    sets = {"held_out": Set(data.read(test), data.patients[test]), "train": Set(data.read(np.arange(3)))}
    whole = audit_module.nearest_training(sets, data, space)
    read: list[int] = []
    inner = data.reader
    data = replace(data, reader=lambda i: (read.append(len(i)), inner(i))[1])
    monkeypatch.setattr(audit_module, "PART", 16 * 16 * 7)
    parts = audit_module.nearest_training(sets, data, space)
    assert read == [7] * 6 + [4]
    for name in sets:
        np.testing.assert_allclose(parts[name].pixel, whole[name].pixel, rtol=1e-6)
        np.testing.assert_allclose(parts[name].pca, whole[name].pca, rtol=1e-5, atol=1e-6)
    assert (whole["held_out"].pixel > 0.01).all()


# The linear-Gaussian VDM's samples


def test_samples_of_the_linear_gaussian_vdm_have_its_moments(rng: np.random.Generator) -> None:
    """In the span of the components: mean 0 and variance lambda^2 / (lambda + r^2), where nothing is clipped."""
    basis = np.linalg.qr(rng.standard_normal((64, 4)))[0].T.astype(np.float32)
    variances, noise = np.array([0.04, 0.02, 0.01, 0.005], np.float32), 0.08
    fitted = baselines.Baselines(
        mean=np.full(64, 0.5, np.float32),
        components=basis,
        variances=variances,
        latent=3,
        noise=noise,
        num_images=9,
    )
    x = fitted.sample(20_000, seed=3)
    assert x.shape == (20_000, 64) and x.min() > 0 and x.max() < 1
    f = (x - 0.5) @ basis.T
    expected = np.append(variances[:3] ** 2 / (variances[:3] + noise**2), 0.0)
    assert (np.abs(f.mean(axis=0)) <= 4.5 * np.sqrt(expected / 20_000) + 1e-6).all()
    np.testing.assert_allclose(f.var(axis=0), expected, rtol=4.5 * math.sqrt(2 / 20_000), atol=1e-8)
    np.testing.assert_array_equal(fitted.sample(5, seed=3), fitted.sample(5, seed=3))
    none = baselines.fit(rng.random((4, 8, 8, 1), np.float32), None)
    assert none.sample(3) is None


# Bad input


def test_bad_input_is_refused_in_one_line(phantoms: np.ndarray) -> None:
    ones = np.ones((4, 3))
    for call, words in [
        (lambda: ms_ssim(phantoms[:2], phantoms[:3]), "b: shape"),
        (lambda: ms_ssim(phantoms[:1, :10], phantoms[:1, :10]), "10x32"),
        (lambda: ms_ssim(phantoms[0], phantoms[0]), "a: shape"),
        (lambda: ms_ssim(np.nan * phantoms[:1], phantoms[:1]), "finite"),
        (lambda: pair_similarity(phantoms[:3], [1, 1, 1]), "two patients"),
        (lambda: power_spectrum(phantoms[:1, :3]), "3x32"),
        (lambda: logistic(ones, np.ones(4)), "both 0 and 1"),
        (lambda: logistic(ones, np.array([0, 1])), "2 labels"),
        (lambda: logistic(ones * np.inf, np.array([0, 1, 0, 1])), "finite"),
        (lambda: auc(np.ones(3), np.array([0, 1, 2])), "both 0 and 1"),
        (lambda: auc(np.array([np.nan, 1]), np.array([0, 1])), "finite"),
        (lambda: two_sample(ones, ones), "a: 4 patients"),
        (lambda: two_sample(ones, ones, folds=1), "folds: 1"),
        (lambda: nearest(ones, np.ones((4, 2))), "2 entries"),
    ]:
        with pytest.raises(InputError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


# The command


def test_audit_for_people_and_for_programs(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    card = (run / "MODEL_CARD.md").read_text()
    options = ("--num", "12", "--steps", "3", "--split", "test")
    out, err = said(capfd, "audit", run, *options, "--json")
    result = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert err == "" and out.count("\n") == 1
    held_out = json.loads((run / "config.json").read_text())["data"]["counts"]["test"]["images"]
    assert (result["split"], result["steps_sampled"], result["num_images"]) == ("test", 3, min(12, held_out))
    assert {result[name]["num_images"] for name in ("samples", "decoded")} == {result["num_images"]}
    assert set(result["samples"]) == set(result["decoded"])
    assert "real" not in result, "the validation split has three patients"
    text, _ = said(capfd, "audit", run, *options)
    heads = text.splitlines()[2], audit_table(result | {"real": result["decoded"]}).splitlines()[2]
    assert ["real" in head.split() for head in heads] == [False, True]
    for name in ("ms_ssim", "power_high", "c2st_coarse"):
        assert f"{result['samples'][name]:.2f}" in text and f"{result['decoded'][name]:.2f}" in text
    assert f"{result['decoded']['nearest_pca']:.4f}" in text
    again = (run / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "## Audit" not in card and "## Audit of its samples" in again
    assert f"| {result['samples']['nearest_pca']:.4f} | {result['decoded']['nearest_pca']:.4f} |" in again
    assert json.loads(next((run / "audits").glob("*.json")).read_text()) == result
    assert len(list((run / "audits").iterdir())) == 1


def test_an_audit_of_a_diffusion_on_pixels_has_no_column_of_decoded_images(
    trained_pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """z_0 is the image itself. All sets are pictures in [0, 1] of one size, drawn in batches of the size asked for."""
    path = Path(shutil.copytree(trained_pixels, tmp_path / "run"))
    loaded = load(path)
    drawn: list[int] = []
    inner = sample_module.batches

    def batches(*args: Any, **more: Any) -> Any:
        return (drawn.append(len(part.images)) or part for part in inner(*args, **more))

    monkeypatch.setattr(sample_module, "batches", batches)
    sets = audit_sets(loaded, load_data(loaded), num=10, steps=2, batch_size=4)
    n = len(sets["held_out"].images)
    assert sum(drawn) == n > 4 and max(drawn) == 4
    assert "decoded" not in sets and {"samples", "held_out"} <= set(sets)
    for one in sets.values():
        assert one.images.shape == (n, 16, 16, 1) and one.images.dtype == np.float32
        assert 0 <= one.images.min() and one.images.max() <= 1
    levels = sets["samples"].images * 255
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-4)
    result = audit(loaded, num=10, steps=2)
    assert "decoded" not in result
    for text in (audit_table(result), (path / "MODEL_CARD.md").read_text().split("## Audit")[1].split("Compare")[0]):
        assert "decoded" not in text


def test_an_audit_of_a_class_takes_its_real_images_from_that_class(trained: Trained) -> None:
    loaded = load(trained.path)
    data = load_data(loaded)
    ill = sorted(set(data.patients[np.flatnonzero((data.labels[:, 1] == 1) & (data.splits == "train"))]))
    loaded, data = other_splits(loaded, **dict.fromkeys(ill[:4], "test"), **dict.fromkeys(ill[4:], "val"))
    sets = audit_sets(loaded, data, num=10, steps=2, label="Pneumonia", guidance=1.0)
    n = len(sets["samples"].images)
    smaller = min(int((data.labels[data.indices(split), 1] == 1).sum()) for split in ("test", "val"))
    assert n == min(10, smaller) and {len(one.images) for one in sets.values()} == {n}
    for name, split in {"held_out": "test", "real": "val"}.items():
        everything = data.indices(split)
        rows = everything[rows_of(sets[name].images, data.read(everything))]
        assert (data.labels[rows, 1] == 1).all() and not (data.labels[everything, 1] == 1).all()
    assert not set(sets["real"].groups) & set(sets["held_out"].groups), "the yardstick has other patients"
    drawn = medvdm.sample(loaded, n, steps=2, label="Pneumonia", guidance=1.0)
    np.testing.assert_allclose(sets["samples"].images, drawn.images, atol=1e-6)


def test_samples_of_an_8_bit_model_are_held_against_gray_levels(trained_pixels: Path) -> None:
    """The phantoms' own values lie between the levels, which alone would tell them from any sample."""
    loaded = load(trained_pixels)
    data = load_data(loaded)
    patients = sorted(set(data.patients[data.indices("train")]))
    loaded, data = other_splits(loaded, **dict.fromkeys(patients[:6], "test"), **dict.fromkeys(patients[6:12], "val"))
    sets = audit_sets(loaded, data, num=10, steps=2)
    for name in ("samples", "real", "held_out"):
        np.testing.assert_allclose(255 * sets[name].images, np.rint(255 * sets[name].images), atol=1e-4)
    everything = data.indices("test")
    rows_of(sets["held_out"].images, data.levels(everything) / np.float32(255))  # each is one of these


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ("--num 9", ["num: 9", "at least 10"]),
        ("--steps 0", ["steps: 0"]),
        ("--split train", ["split: 'train'", "'test'"]),
        ("--split val", ["3 patients", "at least 4"]),
        ("--label Pneumonia", ["2 patients", "at least 4"]),
        ("--label pneumonai", ["label", "did you mean 'Pneumonia'?"]),
        ("--guidance 2", ["guidance: 2.0", "label"]),
        ("--seed -1", ["seed: -1"]),
        ("--guidance nan", ["guidance: nan"]),
        ("--data-dir somewhere", ["data_dir: 'somewhere'"]),
        ("--nun 3", ["--nun"]),
    ],
)
def test_audit_refuses(options: str, names: list[str], run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    refused(capfd, "audit", run, "--steps", "2", *options.split(), names=names)
    assert not (run / "audits").exists()


def test_audit_of_no_run_and_of_other_data(trained: Trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    refused(capfd, "audit", tmp_path / "nothing", names=[str(tmp_path / "nothing"), "not found"])
    refused(capfd, "audit", names=["RUN: missing", "folder of the run"])
    loaded = load(trained.path)
    other = medvdm.data.load(medvdm.DataConfig(num_images=60, image_size=16, data_seed=1))
    with pytest.raises(RunError, match="no longer"):
        audit(loaded, other)
