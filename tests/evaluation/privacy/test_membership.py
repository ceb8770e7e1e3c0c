"""Membership attacks: against the closed forms of fitted Gaussians, loops by hand, coverage, and a model overfitted."""

from __future__ import annotations

import json
from functools import partial

import jax
import numpy as np
import pytest
import tiny
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from medvdm.data import phantom
from medvdm.errors import InputError
from medvdm.evaluation import components, held_out
from medvdm.evaluation.privacy import membership
from medvdm.evaluation.statistics import auc
from medvdm.models import cascade, vdm
from medvdm.theory import membership as game

UNET = {
    **{"architecture": "unet", "image_shape": (8, 8, 1), "gamma_min": -13.0, "gamma_max": 5.0, "embedding_dim": 4},
    **{"width": 4, "scales": 1, "base_scales": 1, "blocks": 1, "details": "none"},
}

# What the model says of an image


@pytest.fixture(scope="module", params=["latent", "pixels", "cascade"])
def model(request, small):
    """Graph, parameters, images and labels of a latent model with classes, one on pixels, and a cascade."""
    rng = np.random.default_rng(0)
    if request.param == "latent":
        config, graph, params = small
        labels = np.eye(3, dtype=np.uint8)[rng.integers(0, 3, 7)]
        return graph, params, rng.random((7, *config.image_shape)).astype(np.float32), labels
    config = vdm.VDMConfig(**UNET, reduce=2 if request.param == "cascade" else 0)
    levels = rng.integers(0, 256, (7, 8, 8, 1), np.uint8)
    return vdm.graph_of(config), tiny.weights(config, 0.2), levels, None


def test_level_losses_are_those_of_a_loop_by_hand(model) -> None:
    """One image, level and draw at a time, with the diffusion and the mean of squares written out."""
    graph, params, images, labels = model
    gammas, draws, seed = [-4.0, 0.5], 3, 5
    found = membership.level_losses(
        graph, params, images, gammas=gammas, draws=draws, seed=seed, batch_size=3, labels=labels
    )
    assert found.shape == (2, 7) and found.dtype == np.float64
    keys = jax.random.split(jax.random.key(seed), (2, draws))

    @jax.jit
    def answer(params, x, label, gamma, eps, alpha, sigma):
        whole = vdm.merge(graph, params)
        network = whole if not whole.config.reduce else cascade.given(whole, cascade.reduced(x, 2))
        z = alpha * network.encode(x) + sigma * eps
        return network.eps_hat(z, network.condition(gamma, network.embed(label, n=1)))

    for i in (0, 6):
        label = None if labels is None else labels[i : i + 1].astype(np.float32)
        for level, gamma in enumerate(gammas):
            errors = []
            alpha, sigma = 1 / np.sqrt(1 + np.exp(gamma)), 1 / np.sqrt(1 + np.exp(-gamma))
            for key in keys[level]:
                eps = jax.random.normal(key, (1, *images.shape[1:]) if labels is None else (1, 4))
                found_eps = answer(params, images[i : i + 1], label, np.array([gamma], np.float32), eps, alpha, sigma)
                errors.append(float(np.mean((np.asarray(eps) - found_eps) ** 2)))
            assert found[level, i] == pytest.approx(np.mean(errors), rel=2e-4)


def test_an_image_has_the_same_scores_whatever_is_beside_it(model) -> None:
    graph, params, images, labels = model
    order = np.array([6, 1, 1, 0])
    given = None if labels is None else labels[order]
    losses = partial(membership.level_losses, graph, params, gammas=[-2.0], draws=2)
    bounds = partial(membership.bounds, graph, params, draws=3)
    for scores in (losses, bounds):
        whole = scores(images, labels=labels, seed=1, batch_size=3)
        np.testing.assert_allclose(
            scores(images[order], labels=given, seed=1, batch_size=3), whole[..., order], rtol=1e-4
        )
        assert abs(scores(images, labels=labels, seed=2, batch_size=3) / whole - 1).max() > 1e-4, "another seed"


def test_bounds_are_those_of_the_evaluation(model) -> None:
    """Other noise and other times, so within the error of two means over draws: 4.5 standard errors."""
    graph, params, images, labels = model
    labels = None if labels is None else labels.astype(np.float32)
    ours = membership.bounds(graph, params, images, draws=32, seed=0, batch_size=3, labels=labels)
    terms = held_out.bound_terms(graph, params, images, labels, draws=32, key=jax.random.key(1))
    assert (np.abs(ours - terms.total.mean(axis=0)) < 4.5 * np.sqrt(2) * terms.stderr).all()


def test_levels_out_of_the_schedule_are_refused(small) -> None:
    config, graph, params = small
    ask = partial(membership.level_losses, graph, params, np.zeros((2, *config.image_shape), np.float32), seed=0)
    with pytest.raises(InputError, match=r"^gammas: 2; expected -5 to 1, the model's schedule$"):
        ask(gammas=[0.0, 2.0], draws=1, batch_size=2)
    with pytest.raises(InputError, match=r"^draws: 0; expected at least 1$"):
        ask(gammas=[0.0], draws=0, batch_size=2)


# How well a score tells


def test_an_attack_on_a_fitted_gaussian_reaches_the_closed_form() -> None:
    """AUC and the true positive rates, each within 4 of its standard errors over 24 unrelated fits; per image."""
    n, d, fits = 120, 50, 24
    found = []
    for seed in range(fits):
        rng = np.random.default_rng(seed)
        points, others = rng.standard_normal((n, d)), rng.standard_normal((999, d))
        mean, precision = points.mean(axis=0), np.linalg.inv(np.cov(points, rowvar=False))
        both = np.concatenate([points, others]) - mean
        scores = -np.einsum("ni,ij,nj->n", both, precision, both)
        member = np.arange(len(both)) < n
        told = membership._told(scores, member, np.arange(len(both)), seed) if seed == 0 else None
        area = auc(scores, member).value
        rates = [membership._rates(scores, member, np.ones((1, len(both))), fpr)[0] for fpr in (0.01, 0.001)]
        if told:
            assert [told["auc"], told["tpr_at_1pct_fpr"], told["tpr_at_01pct_fpr"]] == [area, *rates]
        found.append([area, *rates])
    closed = game.covariance_fitted(n, d)
    # A threshold at the k-th of 999 others has a false positive rate of Beta(k, 1000 - k), the mean is over that law.
    rng = np.random.default_rng(99)
    expected = [closed.auc(), *(closed.tpr(rng.beta(k, 1000 - k, 4000)).mean() for k in (10, 1))]
    error = np.std(found, axis=0, ddof=1) / np.sqrt(fits)
    assert (np.abs(np.mean(found, axis=0) - expected) < 4 * error).all()
    assert expected[0] > 0.96 and error.max() < 0.04


def drawn(seed: int, shift: float, patients: int, per: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of unit variance, half of it the patient's, members' higher by a shift; member; patient."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(2 * patients), per)
    own, shared = rng.standard_normal(len(patient)), rng.standard_normal(2 * patients)[patient]
    member = patient < patients
    return (own + shared) / np.sqrt(2) + shift * member, member, patient


def covered(runs: list[dict], key: str, truth: float) -> int:
    return sum(one[f"{key}_interval"][0] <= truth <= one[f"{key}_interval"][1] for one in runs)


def test_intervals_cover_the_truth_with_images_that_are_alike() -> None:
    """95 % of 100 runs, per image and per patient; 88 and more in 100 have a chance of 99.8 % if 95 % is true."""
    runs = [membership.attack(*drawn(seed, 1.0, 100, 4), seed=seed) for seed in range(100)]
    assert covered(runs, "auc", norm.cdf(1 / np.sqrt(2))) >= 88
    assert covered(runs, "tpr_at_1pct_fpr", norm.sf(norm.isf(0.01) - 1)) >= 88
    per_patient = [one["patients"] for one in runs]
    deviation = np.sqrt(0.5 + 0.5 / 4)  # of a patient's mean
    assert covered(per_patient, "auc", norm.cdf(1 / np.sqrt(2) / deviation)) >= 88
    # A mean tells more than an image, but images that are alike count for less than as many patients.
    widths = {
        name: np.mean([np.ptp(one["auc_interval"]) for one in part])
        for name, part in (
            ("alike", runs),
            ("unlike", [membership.attack(*drawn(s, 1.0, 100, 4)[:2], np.arange(800)) for s in range(3)]),
        )
    }
    assert widths["alike"] > 1.3 * widths["unlike"]
    assert np.mean([one["auc"] for one in per_patient]) > np.mean([one["auc"] for one in runs]) + 0.03


@pytest.mark.slow
def test_of_one_law_the_classifier_over_all_levels_finds_nothing_95_times_in_100() -> None:
    """With the stretched error; and it is no worse than chance on average. 88 and more: see above."""
    inside, areas = 0, []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        patient = np.repeat(np.arange(60), 2)
        features = rng.standard_normal((60, 4))[patient] + rng.standard_normal((120, 4))
        member = patient < 30
        found = auc(membership._cross_fitted(features, member, patient, seed), member, patient)
        areas.append(found.value)
        inside += abs(found.value - 0.5) < 1.96 * membership.STRETCH * found.stderr
    assert abs(np.mean(areas) - 0.5) < 4 * np.std(areas) / 10
    assert inside >= 88


def test_of_one_law_nothing_is_found_95_times_in_100() -> None:
    runs = [membership.attack(*drawn(seed, 0.0, 60, 2), seed=seed) for seed in range(100)]
    assert covered(runs, "auc", 0.5) >= 88 and covered([one["patients"] for one in runs], "auc", 0.5) >= 88


def test_rates_by_hand_with_ties_and_too_few_others() -> None:
    """With 199 others two may be called members at 1 %: a threshold at the second of them, ties not above."""
    others = np.arange(199.0)
    ones = np.array([300.0, 198.0, 197.5, 197.0, 5.0])
    scores, member = np.concatenate([ones, others]), np.arange(204) < 5
    found = membership.attack(scores, member, np.arange(204))
    assert found["tpr_at_1pct_fpr"] == 3 / 5 and found["tpr_at_1pct_fpr_needs"] is None
    assert found["tpr_at_1pct_fpr_interval"][0] == 0, "0.99^199 is 13 %: the threshold may be above all others"
    assert found["tpr_at_01pct_fpr"] is found["tpr_at_01pct_fpr_interval"] is None
    assert found["tpr_at_01pct_fpr_needs"] == 999
    assert found["auc"] == pytest.approx(roc_auc_score(member, scores))
    np.testing.assert_array_equal(np.array(found["roc"])[:, 0] * 199, np.round(np.array(found["roc"])[:, 0] * 199))
    assert (np.diff(found["roc"], axis=0) >= 0).all() and len(found["roc"]) == 15
    json.dumps(found, allow_nan=False)
    certain = membership.attack(np.where(member, 1.0, 0.0), member, np.arange(204))
    assert certain["auc"] == 1 and certain["auc_interval"] == [pytest.approx(0.025 ** (1 / 5)), 1.0]


def test_wrong_arrays_are_refused() -> None:
    member = np.arange(20) < 10
    with pytest.raises(InputError, match=r"^patients: 3 of members, 10 of others; expected at least 4 each$"):
        membership.attack(np.zeros(20), member, np.where(member, np.arange(20) % 3, np.arange(20)))
    with pytest.raises(InputError, match=r"^scores: shape \(19,\); expected \(20,\), with 20 patients$"):
        membership.attack(np.zeros(19), member, np.arange(20))
    ask = partial(membership.membership, group=["member", "held_out"], patients=["a", "b"], gammas=[0.0])
    with pytest.raises(InputError, match=r"^losses: shape \(2, 2\); expected \(1, 2\), levels and images$"):
        ask(np.ones((2, 2)), np.ones(2))
    with pytest.raises(InputError, match="^bound: numbers that are not finite; expected finite ones$"):
        ask(np.ones((1, 2)), np.array([1.0, np.nan]))
    with pytest.raises(InputError, match="^group: 'train'; expected 'member', 'held_out' or 'other_day'$"):
        ask(np.ones((1, 2)), np.ones(2), group=["train", "held_out"])
    with pytest.raises(InputError, match="^ratio: 3 entries; expected 2, one per image$"):
        ask(np.ones((1, 2)), np.ones(2), ratio=np.ones(3))


# Shadow models


def scores_of_means(x: np.ndarray, inside: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Minus the squared distance of each point from the mean of n points, that are fresh but for the point if inside.

    The mean of m fresh points is drawn from its law, N(0, I / m).
    """
    fresh = rng.standard_normal((*inside.shape, x.shape[1]))
    mean = np.where(inside[..., None], (fresh * np.sqrt(n - 1) + x) / n, fresh / np.sqrt(n))
    return -np.sum((x - mean) ** 2, axis=-1)


def test_shadow_models_bring_the_plain_distance_near_to_the_best_test() -> None:
    n, d, images = 100, 100, 2000
    rng = np.random.default_rng(0)
    x = rng.standard_normal((images, d))
    plain, best = game.mean_fitted(n, d).auc(), game.law_known(n, d).auc()
    member = np.arange(images) < images // 2
    target = scores_of_means(x, member, n, rng)
    areas = {}
    for shadows in (4, 48):
        inside = rng.random((shadows, images)) < 0.5
        ratio = membership.likelihood_ratio(target, scores_of_means(x, inside, n, rng), inside)
        areas[shadows] = auc(ratio, member)
    error = areas[48].stderr
    assert abs(auc(target, member).value - plain) < 4 * error
    assert plain + 0.05 < areas[4].value < areas[48].value - 0.02
    # The score is one number of the fitted mean, and 48 shadows are not all: near the best, and not above it.
    assert best - 0.04 < areas[48].value < best + 4 * error
    # With no shadow trained on an image only the one-sided form is left, which orders the images nearly as well.
    outside = np.zeros((48, images), bool)
    offline = membership.likelihood_ratio(target, scores_of_means(x, outside, n, rng), outside)
    assert abs(auc(offline, member).value - areas[48].value) < 0.02
    inside_only = membership.likelihood_ratio(target, scores_of_means(x, ~outside, n, rng), ~outside)
    assert abs(auc(inside_only, member).value - areas[48].value) < 0.02


def test_shadows_of_halves_of_one_pool_know_the_rest_of_the_pool() -> None:
    """A mean of half a pool varies half as much, and so the area is near Phi(sqrt(d / n)), above that of fresh ones.

    The mean over 12 unrelated pools, within 4 standard errors and 0.02 for the finite number of shadows.
    """
    n, d, areas = 50, 50, []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((2 * n, d))
        inside = np.array([rng.permutation(2 * n) < n for _ in range(129)])
        scores = np.array([-np.sum((x - x[one].mean(axis=0)) ** 2, axis=1) for one in inside])
        areas.append(auc(membership.likelihood_ratio(scores[0], scores[1:], inside[1:]), inside[0]).value)
    assert abs(np.mean(areas) - norm.cdf(1)) < 4 * np.std(areas, ddof=1) / np.sqrt(12) + 0.02
    assert np.mean(areas) > game.law_known(n, d).auc() + 0.03


def test_likelihood_ratio_by_hand() -> None:
    """Few shadows share one variance of each kind; 20 have their own."""
    inside = np.array([[1, 0, 0], [1, 0, 1], [0, 1, 0], [0, 1, 1]], bool)
    shadows = np.array([[1.0, 4, 0], [3.0, 6, 2], [0.0, 9, 0], [2.0, 7, 4]])
    found = membership.likelihood_ratio(np.array([1.0, 8.0, 3.0]), shadows, inside)
    in_ = norm(np.array([2.0, 8.0, 3.0]), np.sqrt((2 + 2 + 2) / 3))
    out = norm(np.array([1.0, 5.0, 0.0]), np.sqrt((2 + 2 + 0) / 3))
    at = np.array([1.0, 8.0, 3.0])
    np.testing.assert_allclose(found, in_.logpdf(at) - out.logpdf(at))
    rng = np.random.default_rng(0)
    many, kind = rng.standard_normal((40, 2)) * np.array([1.0, 5.0]), np.repeat([True, False], 20)[:, None].repeat(2, 1)
    laws = [norm(many[which].mean(axis=0), many[which].std(axis=0, ddof=1)) for which in (slice(20), slice(20, 40))]
    np.testing.assert_allclose(
        membership.likelihood_ratio(np.ones(2), many, kind), laws[0].logpdf(np.ones(2)) - laws[1].logpdf(np.ones(2))
    )
    with pytest.raises(InputError, match=r"^shadows: 1 models; expected at least 2 with, or 2 without, some of the"):
        membership.likelihood_ratio(np.ones(3), shadows[:1], inside[:1])
    with pytest.raises(InputError, match=r"^shadows: shape \(4, 3\); expected \(S, 2\), as inside has \(4, 3\)$"):
        membership.likelihood_ratio(np.ones(2), shadows, inside)


# All attacks


def test_a_linear_gaussian_model_of_20_phantoms_knows_them() -> None:
    """As many components as 20 images have; the model is the exact denoiser of their Gaussian, nothing is trained."""
    data = phantom.load(num_images=140, image_size=32)
    images = data.read(np.arange(140))
    member = np.arange(140) < 20
    mean, directions, variances = components.exact_components(images[:20].reshape(20, -1), 19)
    config = vdm.VDMConfig(
        **{"architecture": "linear-start", "image_shape": (32, 32, 1), "latent": 19, "embedding_dim": 4},
        **{"inner_width": 4, "decoder_width": 4, "decoder_layers": 1, "score_layers": 1},
    )
    params = vdm.with_components(vdm.init(config, 0), {"mean": mean, "components": directions, "variances": variances})
    ask = {"seed": 0, "batch_size": 70}
    gammas = [-4.0, -1.0, 1.0]
    graph = vdm.graph_of(config)
    losses = membership.level_losses(graph, params, images, gammas=gammas, draws=8, **ask)
    bound = membership.bounds(graph, params, images, draws=8, **ask)
    group = np.where(member, "member", "held_out")
    floor = held_out.entropy(images)
    found = membership.membership(losses, bound, group, data.patients[:140], gammas=gammas, yardstick=floor)
    parts = found["member_vs_held_out"]
    assert found["auc"] == parts["all_levels"]["auc"] >= 0.95
    assert found["auc_interval"][0] > 0.85
    # The bound alone hardly tells, as images differ more by what any model has to pay for them.
    assert parts["bound"]["auc"] < 0.75 < 0.9 < parts["over_yardstick"]["auc"]
    assert found["headline"] == ["member_vs_held_out", "all_levels"]
    assert found["other_day_vs_held_out"] is found["member_vs_other_day"] is None
    assert parts["likelihood_ratio"] is None
    assert any("other_day_vs_held_out: 0 patients of 'other_day'" in note for note in found["notes"])
    json.dumps(found, allow_nan=False)


def made(seed: int, person: float, image: float) -> tuple[np.ndarray, ...]:
    """Losses at 3 levels that share each image's difficulty, lower at the middle one by what is remembered."""
    rng = np.random.default_rng(seed)
    kinds = np.array(["member", "other_day", "held_out"])
    group = np.repeat(kinds, 150)
    patient = np.concatenate([np.arange(150) // 3, np.arange(150) // 3, 50 + np.arange(150) // 3])
    hard = rng.standard_normal(100)[patient] + rng.standard_normal(450)
    known = person * (group != "held_out") + image * (group == "member")
    noise = 0.3 * rng.standard_normal((3, 450))
    losses = np.exp(hard - np.array([0.0, 1.0, 0.0])[:, None] * known + noise)
    return losses, losses.sum(axis=0), group, patient.astype(str)


def test_memory_of_a_person_and_of_an_image_are_told_apart() -> None:
    ask = {"gammas": [-4.0, 0.0, 4.0]}
    person = membership.membership(*made(0, 0.5, 0.0), **ask)
    image = membership.membership(*made(0, 0.0, 0.5), **ask, ratio=np.arange(450.0)[::-1])
    area = lambda found, question: found[question]["all_levels"]["auc_interval"]  # noqa: E731
    for question in ("member_vs_held_out", "other_day_vs_held_out"):
        assert area(person, question)[0] > 0.7, question
    assert area(person, "member_vs_other_day")[0] < 0.5 < area(person, "member_vs_other_day")[1]
    for question in ("member_vs_held_out", "member_vs_other_day"):
        assert area(image, question)[0] > 0.7, question
    assert area(image, "other_day_vs_held_out")[0] < 0.5 < area(image, "other_day_vs_held_out")[1]
    # One level sees the difficulty, all see past it: difference of two levels, of which the noise is 0.3 each.
    parts = image["member_vs_held_out"]
    assert parts["level"]["gamma"] == 0.0 and parts["level"]["auc"] < parts["all_levels"]["auc"] - 0.1
    assert parts["level"]["members"] + parts["level"]["others"] == 150, "judged on the other half"
    assert parts["all_levels"]["patients"]["members"] == 50
    assert image["tpr_at_1pct_fpr"] == parts["all_levels"]["tpr_at_1pct_fpr"]
    assert parts["likelihood_ratio"]["auc"] == 1 and parts["over_yardstick"] is None
