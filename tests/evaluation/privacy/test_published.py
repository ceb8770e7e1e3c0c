"""What published components give away: by hand, by the whole covariance, and on phantoms for few and many images."""

from __future__ import annotations

import json

import numpy as np
import pytest

from medvdm.data import phantom
from medvdm.errors import InputError
from medvdm.evaluation.components import exact_components
from medvdm.evaluation.privacy import published


@pytest.fixture(scope="module")
def pictures():
    """Phantoms of 32 pixels a side and their patients, 120 to train on and 60 of other patients."""
    data = phantom.load(num_images=400, image_size=32)
    train, test = data.indices("train")[:120], data.indices("test")[:60]
    return data.read(train), data.read(test), data.patients[train], data.patients[test]


def test_residuals_by_hand() -> None:
    """A mean at (1, 1, 1), one component along x: of (3, 2, 1) a fifth is outside, of (0, 1, 1) nothing."""
    images = np.array([[3.0, 2.0, 1.0], [0.0, 1.0, 1.0], [1.0, 0.0, 3.0]])
    found = published.residuals(images, np.ones(3), np.array([[1.0, 0.0, 0.0]]))
    np.testing.assert_allclose(found, [1 / 5, 0, 1], atol=1e-15)
    with pytest.raises(InputError, match=r"^images: 4 pixels per image; expected 3, as the mean has$"):
        published.residuals(np.zeros((2, 2, 2)), np.ones(3), np.eye(3))


def test_the_completion_is_the_conditional_mean_by_the_whole_covariance() -> None:
    """E[x_unknown | x_known] = mean + S_uk S_kk^-1 (x_known - mean), with S = U^T L U + s^2 I of all 24 pixels."""
    rng = np.random.default_rng(0)
    components = np.linalg.qr(rng.standard_normal((24, 5)))[0].T
    variances, mean = np.array([4.0, 2.0, 1.0, 0.5, 0.3]), rng.standard_normal(24)
    images = rng.standard_normal((3, 3, 4, 2))
    known = np.array([[1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 1]], bool)
    found = published.complete(images, mean, components, variances, known, ridge=0.2)
    seen = np.repeat(known.reshape(-1), 2)
    covariance = components.T @ np.diag(variances) @ components + 0.2 * 0.3 * np.eye(24)
    solved = np.linalg.solve(covariance[np.ix_(seen, seen)], (images.reshape(3, 24) - mean)[:, seen].T)
    expected = images.reshape(3, 24).copy()
    expected[:, ~seen] = mean[~seen] + (covariance[np.ix_(~seen, seen)] @ solved).T
    assert found.shape == images.shape
    np.testing.assert_allclose(found.reshape(3, 24), expected, atol=1e-10)
    # The correlation by numpy's own, of the pixels that are not known.
    agree = published.agreement(images, found, mean, known)
    for i in range(3):
        pair = [(x.reshape(3, 24)[i] - mean)[~seen] for x in (images, found)]
        assert agree[i] == pytest.approx(np.corrcoef(*pair)[0, 1])


def test_as_many_components_as_images_have_give_every_training_image_away(pictures) -> None:
    """No error at all with k = n - 1; and who holds the left half of a training image has the right half."""
    train, held_out, patients, others = pictures
    people = {"patients": patients[:20], "held_out_patients": others}
    mean, components, variances = exact_components(train[:20].reshape(20, -1), 19)
    found = published.components_give(train[:20], held_out, mean, components, variances, **people)
    json.dumps(found, allow_nan=False)
    assert found["residual_train"] < 1e-6 and found["residual_held_out"] > 0.1
    assert found["attack"]["auc"] == found["attack"]["patients"]["auc"] == 1
    assert found["completion_train"] > 0.99 > 0.8 > found["completion_held_out"]
    # The mean image as the completion tells nothing: noise of any size in place of the components leaves only it.
    noisy = published.complete(train[:5], mean, components, variances, published.left_half(train), ridge=1e12)
    np.testing.assert_allclose(noisy[:, :, 16:].reshape(5, -1), np.tile(mean.reshape(32, 32)[:, 16:].ravel(), (5, 1)))


def test_more_images_per_component_give_less_away(pictures) -> None:
    train, held_out, patients, others = pictures
    people = {"patients": patients, "held_out_patients": others}
    rows = published.table(train, held_out, **people, images=(20, 120), components=(8, 500))
    assert [(row["images"], row["components"]) for row in rows] == [(20, 8), (20, 19), (120, 8), (120, 119)]
    few, all_of_few, many, all_of_many = rows
    assert all_of_few["auc"] == all_of_many["auc"] == 1
    assert few["auc"] > 0.8 and many["auc_interval"][0] < few["auc_interval"][0] - 0.1
    gap = lambda row: row["completion_train"] - row["completion_held_out"]  # noqa: E731
    assert gap(few) > gap(many) + 0.1 and gap(all_of_few) > gap(few)
    assert abs(gap(many)) < 0.1
    with pytest.raises(InputError, match="^images: 121; expected 2 to 120, the number of training images$"):
        published.table(train, held_out, **people, images=(121,), components=(8,))


def test_a_mask_that_knows_all_or_nothing_is_refused(pictures) -> None:
    train = pictures[0][:3]
    mean, components, variances = exact_components(train.reshape(3, -1), 2)
    for known in (np.ones((32, 32), bool), np.zeros((32, 32), bool), np.ones((16, 32), bool)):
        with pytest.raises(InputError, match=r"^known: \d+ pixels of a mask .*; expected a part of \(32, 32\)$"):
            published.complete(train, mean, components, variances, known)
