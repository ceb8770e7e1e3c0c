"""The membership game in closed form: against points that were drawn and fitted, other formulas, and limits."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2, f, norm

from medvdm.errors import InputError
from medvdm.theory import membership

FITS = 400


def played(n: int, d: int, seed: int = 0) -> dict[str, np.ndarray]:
    """D of all n members and n others in each of many fits, (FITS, 2, n), for each attack."""
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((FITS, 2, n, d))
    mean = points[:, :1].mean(axis=2, keepdims=True)
    offset = points - mean
    from_mean = np.sum(offset**2, axis=3)
    covariance = np.einsum("fni,fnj->fij", offset[:, 0], offset[:, 0]) / (n - 1)
    whitened = np.einsum("fsni,fij->fsnj", offset, np.linalg.inv(covariance))
    return {
        "mean_fitted": from_mean,
        "covariance_fitted": np.sum(whitened * offset, axis=3),
        "law_known": n / (n - 1) * from_mean - np.sum(points**2, axis=3),
    }


@pytest.mark.parametrize("n, d", [(6, 3), (20, 12)])
def test_the_laws_are_those_of_points_that_were_drawn_and_fitted(n: int, d: int) -> None:
    """The mean over unrelated fits of TPR and FPR at thresholds, within 4.5 standard errors over the fits."""
    for name, distance in played(n, d).items():
        game = getattr(membership, name)(n, d)
        for fpr in (0.02, 0.1, 0.4, 0.8):
            below = np.mean(distance <= game.other_quantile(fpr), axis=2)  # of each fit
            error = below.std(axis=0, ddof=1) / np.sqrt(FITS)
            assert abs(below[:, 1].mean() - fpr) < 4.5 * error[1], (name, fpr)
            assert abs(below[:, 0].mean() - game.tpr(fpr)) < 4.5 * error[0] + 1e-12, (name, fpr)


@pytest.mark.parametrize("name", ["mean_fitted", "covariance_fitted"])
def test_the_auc_is_the_mean_of_that_in_one_fit(name: str) -> None:
    """Members and others of one and the same fit, whose distances are independent although the fit is shared."""
    distance = played(14, 6, seed=1)[name]
    area = np.mean(distance[:, 0, :, None] < distance[:, 1, None, :], axis=(1, 2))
    error = area.std(ddof=1) / np.sqrt(FITS)
    assert abs(area.mean() - getattr(membership, name)(14, 6).auc()) < 4 * error


@pytest.mark.parametrize("n, d", [(2, 1), (5, 40), (100, 7)])
def test_of_a_fitted_mean_everything_has_a_formula(n: int, d: int) -> None:
    game, a, b = membership.mean_fitted(n, d), 1 - 1 / n, 1 + 1 / n
    assert game.auc() == pytest.approx(f(d, d).cdf(b / a), abs=1e-9)
    crossing = d * np.log(b / a) / (1 / a - 1 / b)
    assert chi2(d, scale=a).pdf(crossing) == pytest.approx(chi2(d, scale=b).pdf(crossing))
    largest = chi2(d).cdf(crossing / a) - chi2(d).cdf(crossing / b)
    assert largest - 1e-6 < game.advantage() <= largest + 1e-12
    np.testing.assert_allclose(game.tpr(np.array([0.0, 1.0])), [0, 1])
    two = membership.mean_fitted(n, 2).tpr(0.3)  # in two dimensions chi^2 is exponential: 1 - (1 - fpr)^(b / a)
    assert two == pytest.approx(1 - 0.7 ** (b / a))


def test_limits() -> None:
    """Many points give nothing away, hardly more than dimensions everything; a known S is as one of many points."""
    for name in ("mean_fitted", "covariance_fitted", "law_known"):
        areas = [getattr(membership, name)(n, 10).auc() for n in (13, 100, 1000, 100_000)]
        assert areas == sorted(areas, reverse=True) and areas[-1] == pytest.approx(0.5, abs=5e-3), name
    assert membership.covariance_fitted(52, 50).auc() > 1 - 1e-6
    assert membership.covariance_fitted(52, 50).advantage() > 1 - 1e-6
    at = np.array([0.01, 0.2, 0.9])
    for d in (1, 5):
        known, fitted = membership.mean_fitted(10**6, d), membership.covariance_fitted(10**6, d)
        np.testing.assert_allclose(fitted.tpr(at), known.tpr(at), atol=1e-4)
    # The normal approximations of the docstring, whose next terms are of order 1 / d and 1 / n.
    assert membership.mean_fitted(50, 400).auc() == pytest.approx(norm.cdf(np.sqrt(400) / 50), abs=2e-3)
    assert membership.law_known(400, 400).auc() == pytest.approx(norm.cdf(np.sqrt(0.5)), abs=2e-3)


def test_no_attack_is_better_than_the_ratio_of_likelihoods() -> None:
    fpr = np.array([1e-3, 0.01, 0.1, 0.5, 0.9])
    for n, d in ((3, 3), (30, 30), (1000, 30)):
        best, plain = membership.law_known(n, d), membership.mean_fitted(n, d)
        assert (best.tpr(fpr) > plain.tpr(fpr)).all()
        assert best.auc() > plain.auc() and best.advantage() > plain.advantage()
        # Neyman and Pearson: the slope of the best ROC is the likelihood ratio, which falls along the curve.
        points = np.linspace(0.01, 0.99, 99)
        assert (np.diff(best.tpr(points), 2) < 0).all(), "concave"


def test_others_can_be_nearer_than_members_too() -> None:
    """Members' Mahalanobis distances add up to d (n - 1), so they are pressed together."""
    game = membership.covariance_fitted(4, 2)
    assert game.auc() > 0.7 and game.tpr(0.01) < 0.009
    assert membership.covariance_fitted(200, 100).tpr(0.01) > 0.99, "not so of many dimensions"


def test_numbers_that_cannot_be_are_refused() -> None:
    for function, least in ((membership.mean_fitted, 2), (membership.law_known, 2), (membership.covariance_fitted, 6)):
        with pytest.raises(InputError, match=rf"^n: {least - 1}; expected at least {least} points in 4 dimensions$"):
            function(least - 1, 4)
        with pytest.raises(InputError, match="^d: 0; expected at least 1 dimension$"):
            function(10, 0)
