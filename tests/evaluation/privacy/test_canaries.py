"""Exposure: uniform ranks give the closed form, a known shift gives the known AUC, and the limits are reached."""

from __future__ import annotations

import json
import math
from statistics import NormalDist

import numpy as np
import pytest

from medvdm.errors import InputError
from medvdm.evaluation.privacy import canaries


def gaussian(number: int, num_references: int, shift: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Losses whose references are N(0, 1) and whose canaries N(-shift, 1)."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal(number) - shift, rng.standard_normal((number, num_references))


def test_ranks_count_smaller_losses_and_half_of_the_equal_ones() -> None:
    references = np.array([[1.0, 2.0, 3.0], [1.0, 1.0, 2.0], [4.0, 5.0, 6.0], [0.0, 0.0, 0.0]])
    assert canaries.ranks(np.array([2.5, 1.0, 1.0, 7.0]), references).tolist() == [3.0, 2.0, 1.0, 4.0]


def test_exposure_by_hand() -> None:
    references = np.arange(1.0, 8.0)[None].repeat(3, axis=0)  # 7 of them: 3 bits at most
    found = canaries.exposure(np.array([0.0, 1.5, 9.0]), references)
    np.testing.assert_allclose(found, [3.0, 2.0, 0.0], atol=1e-12)
    assert canaries.most_exposure(7) == 3.0


def test_any_rising_function_of_the_losses_gives_the_same() -> None:
    losses = gaussian(20, 50, 1.0)
    np.testing.assert_array_equal(canaries.exposure(*losses), canaries.exposure(*map(np.exp, losses)))


@pytest.mark.parametrize("num_references", [1, 7, 99, 1000])
def test_chance_is_the_mean_over_all_ranks(num_references: int) -> None:
    ranks = np.arange(1, num_references + 2)
    expected = np.mean(np.log2(num_references + 1) - np.log2(ranks))
    assert canaries.chance_exposure(num_references) == pytest.approx(expected, rel=1e-12)


def test_chance_rises_to_one_over_ln_2() -> None:
    """Stirling: n log2 n - log2 n! = n / ln 2 - log2(2 pi n) / 2 + O(1 / n)."""
    values = [canaries.chance_exposure(10**k) for k in range(1, 8)]
    assert values == sorted(values) and values[-1] < 1 / math.log(2)
    for k, value in enumerate(values, start=1):
        n = 10**k + 1
        assert value == pytest.approx(1 / math.log(2) - math.log2(2 * math.pi * n) / (2 * n), abs=0.2 / n**2 + 1e-9)


def test_a_model_that_has_learnt_nothing_gives_chance() -> None:
    found = canaries.summary(np.ones(3000), *gaussian(3000, 199, 0.0))
    (group,) = found["by_copies"]
    for name, chance in (("exposure", found["exposure_chance"]), ("auc", 0.5), ("tpr", found["tpr_chance"])):
        assert abs(group[name] - chance) < 4 * group[f"{name}_stderr"], name
    assert found["tpr_chance"] == 0.01  # 2 of 200 ranks
    # The error of the mean of an exposure: ranks are uniform, so its variance is known. 4 of its own errors, about 3 %.
    deviation = np.log2(np.arange(1, 201)).std()
    assert group["exposure_stderr"] == pytest.approx(deviation / math.sqrt(3000), rel=0.12)


@pytest.mark.parametrize("shift", [0.5, 1.5])
def test_a_known_shift_gives_the_known_auc_and_power(shift: float) -> None:
    r"""AUC = Phi(shift / sqrt 2). With R references, the test is for the k = 10 smallest of R + 1 = 1000: by the
    distribution of their order statistic its power tends to Phi(shift - z) with z the 99 % quantile."""
    normal = NormalDist()
    (group,) = canaries.summary(np.ones(2000), *gaussian(2000, 999, shift, seed=1))["by_copies"]
    assert abs(group["auc"] - normal.cdf(shift / math.sqrt(2))) < 4 * group["auc_stderr"]
    # The 1 % quantile of 999 has a deviation of sqrt(p q / R) / density = 0.12, which moves the mean power by half its
    # square times the second derivative of Phi, at most 0.242 in size: 0.0017.
    power = normal.cdf(shift - normal.inv_cdf(0.99))
    assert abs(group["tpr"] - power) < 4 * group["tpr_stderr"] + 0.002


def test_what_is_memorised_reaches_the_top_and_its_opposite_the_bottom() -> None:
    losses = np.zeros(6), np.ones((6, 99))
    best = canaries.summary(np.array([1, 1, 1, 4, 4, 4]), *losses)
    assert [group["copies"] for group in best["by_copies"]] == [1, 4]
    for group in best["by_copies"]:
        assert group["exposure"] == best["exposure_most"] == math.log2(100)
        assert (group["auc"], group["tpr"], group["auc_stderr"]) == (1.0, 1.0, 0.0)
    (worst,) = canaries.summary(np.ones(6), 2 + losses[0], losses[1])["by_copies"]
    assert (worst["exposure"], worst["auc"], worst["tpr"]) == (0.0, 0.0, 0.0)
    (blank,) = canaries.summary(np.ones(6), 1 + losses[0], losses[1])["by_copies"]  # all losses equal
    assert (blank["auc"], blank["tpr"]) == (0.5, 0.0)


def test_groups_are_by_copies() -> None:
    copies = np.array([1, 2, 4] * 10)
    losses = gaussian(30, 120, 1.0)
    found = canaries.summary(copies, *losses)
    each = canaries.exposure(*losses)
    for group in found["by_copies"]:
        mine = each[copies == group["copies"]]
        assert group["num_canaries"] == 10
        assert group["exposure"] == pytest.approx(mine.mean())
        assert group["exposure_stderr"] == pytest.approx(np.std(mine, ddof=1) / math.sqrt(10))
    assert (found["num_canaries"], found["references"]) == (30, 120)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_too_few_to_say_is_none() -> None:
    found = canaries.summary(np.array([1]), *gaussian(1, 98, 0.0))
    (group,) = found["by_copies"]
    assert group["exposure_stderr"] is group["auc_stderr"] is group["tpr"] is group["tpr_stderr"] is None
    assert found["tpr_chance"] is None
    assert canaries.summary(np.array([1]), *gaussian(1, 99, 0.0))["tpr_chance"] == 0.01


@pytest.mark.parametrize(
    ("copies", "canary", "reference", "words"),
    [
        (np.ones(2), np.zeros(2), np.zeros((3, 4)), "losses: shapes"),
        (np.ones(2), np.zeros(2), np.zeros(2), "losses: shapes"),
        (np.ones(2), np.zeros(2), np.zeros((2, 0)), "losses: shapes"),
        (np.ones(0), np.zeros(0), np.zeros((0, 3)), "losses: shapes"),
        (np.ones(2), np.array([0.0, np.nan]), np.zeros((2, 4)), "finite"),
        (np.ones(2), np.zeros(2), np.full((2, 4), np.inf), "finite"),
        (np.ones(3), np.zeros(2), np.zeros((2, 4)), r"copies: shape \(3,\); expected \(2,\)"),
    ],
)
def test_bad_losses(copies: np.ndarray, canary: np.ndarray, reference: np.ndarray, words: str) -> None:
    with pytest.raises(InputError, match=words):
        canaries.summary(copies, canary, reference)
