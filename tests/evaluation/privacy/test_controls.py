"""The sets of controls against their laws, and the verdict on them."""

import numpy as np
import pytest

from medvdm.data.phantom import render
from medvdm.errors import InputError
from medvdm.evaluation.privacy import controls, registration
from medvdm.evaluation.privacy.search import Shelf

SIZE = 32


@pytest.fixture(scope="module")
def images():
    return render(np.arange(0, 60, 2), size=SIZE)[0]


def test_changed_copies_are_what_they_say(images):
    found = controls.changed_copies(images, 0)
    middle = (images > 0.2) & (images < 0.8)  # not clipped
    noise = (found["noise"] - images)[middle]
    assert noise.std() == pytest.approx(controls.NOISE, abs=4 * controls.NOISE / np.sqrt(2 * noise.size))
    np.testing.assert_array_equal(found["mirrored"][:, :, ::-1], images)
    for name, changed in found.items():
        assert changed.shape == images.shape and 0 <= changed.min() and changed.max() <= 1, name
        assert (changed != images).any(axis=(1, 2, 3)).all(), name
        np.testing.assert_array_equal(changed, controls.changed_copies(images, 0)[name])
        assert name == "mirrored" or (changed != controls.changed_copies(images, 1)[name]).any()


def test_kernel_density_has_the_images_as_centres(images):
    """With no bandwidth to speak of every draw is one of the images, and each equally often, within 4 errors."""
    draws = controls.kernel_density(images[:3], 1e-6, 600, 0)
    which = np.abs(draws[:, None] - images[None, :3]).max(axis=(2, 3, 4)) < 1e-4
    assert (which.sum(axis=1) == 1).all()
    np.testing.assert_allclose(which.mean(axis=0), 1 / 3, atol=4 * np.sqrt(2 / 9 / 600))


def test_linear_gaussian_has_mean_and_covariance_of_the_images():
    """Of gray values far from 0 and 1; with all components, by the sample's own mean and covariance."""
    rng = np.random.default_rng(0)
    x = (0.5 + 0.02 * rng.standard_normal((6, 2, 2, 1))).astype(np.float32)
    n = 20000
    draws = controls.linear_gaussian(x, 4, n, 0).reshape(n, -1)
    rows = x.reshape(6, -1)
    covariance = np.cov(rows.T)
    error = np.sqrt(np.diag(covariance) / n)
    assert (np.abs(draws.mean(axis=0) - rows.mean(axis=0)) < 4.5 * error).all()
    variances = np.outer(np.diag(covariance), np.diag(covariance)) + covariance**2
    assert (np.abs(np.cov(draws.T) - covariance) < 4.5 * np.sqrt(variances / n)).all()


def test_draws_of_a_linear_gaussian_lie_in_the_span_of_the_images(images):
    """Why it is membership that finds it: every draw is an affine mixture of the images, and none of them is one."""
    draws = controls.linear_gaussian(images[:10], 9, 5, 0).reshape(5, -1)
    mean, rows = images[:10].reshape(10, -1).mean(axis=0), images[:10].reshape(10, -1)
    kept = (draws > 0) & (draws < 1)  # clipping leaves the span
    for draw, inside in zip(draws, kept, strict=True):
        weights, *_ = np.linalg.lstsq((rows - mean)[:, inside].T, (draw - mean)[inside], rcond=None)
        assert np.abs((rows - mean)[:, inside].T @ weights - (draw - mean)[inside]).max() < 1e-4
        assert np.abs(weights - weights.max()).max() > 0.1 and (np.abs(draw - rows).mean(axis=1) > 0.01).all()
    with pytest.raises(InputError, match="k: 10; expected 1 to 9 components, for 10 images"):
        controls.linear_gaussian(images[:10], 10, 5, 0)


def shelf(first, n, prefix):
    rows = np.arange(first, first + n)
    return Shelf.from_arrays(render(rows, size=SIZE)[0], [f"{prefix}{i // 2}" for i in rows])


@pytest.fixture(autouse=True)
def small_moves(monkeypatch):
    """A search over shifts of up to a pixel, which is as far as the controls go at this size."""
    monkeypatch.setattr(registration, "REACH", 1)


@pytest.fixture(scope="module")
def sets():
    return shelf(0, 80, "t"), shelf(1000, 80, "h")


def test_controls_behave(sets):
    found = controls.run_controls(*sets, num=12)
    assert list(found) == [*controls.FOUND, *controls.CLEAN]
    for name, one in found.items():
        assert one["behaved"], (name, one)
        assert one["num"] == 12 and one["must"] == ("be found" if name in controls.FOUND else "be clean")


def test_controls_say_when_the_rule_does_not_work(sets, monkeypatch):
    """A rule that calls nothing fails all that must be found; one that calls everything, all that must be clean."""
    monkeypatch.setattr(controls, "measure", lambda *_, **__: None)
    monkeypatch.setattr(controls, "calibrate", lambda *_: None)
    for answer, good in ((False, controls.CLEAN), (True, controls.FOUND)):
        monkeypatch.setattr(controls, "flagged", lambda found, limits, answer=answer: np.full(8, answer))
        found = controls.run_controls(*sets, num=8)
        assert [name for name, one in found.items() if one["behaved"]] == list(good)


def test_too_few_patients(sets):
    with pytest.raises(InputError, match="held_out: 3 patients; expected at least 4"):
        controls.run_controls(sets[0], shelf(1000, 6, "h"))
