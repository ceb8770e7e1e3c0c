"""The Gaussian of gray values against SciPy's densities, against exact masses, and on images of a known law."""

import math

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import scipy.stats

import medvdm
from medvdm.data import DataConfig
from medvdm.errors import InputError, InputTypeError, RunError
from medvdm.evaluation import gaussian_images as gaussian
from medvdm.evaluation.statistics import clustered_stderr
from medvdm.theory.bound import bits_per_dim

SHAPE = (4, 5, 2)
SIZE = math.prod(SHAPE)


def law(shape=SHAPE, seed=0, scale=8.0):
    """Mean and covariance of smooth images that stay within the gray values; deviations of at least two of them."""
    rng = np.random.default_rng(seed)
    size = math.prod(shape)
    directions = rng.standard_normal((size, size)) * scale * 0.8 ** np.arange(size)
    return rng.uniform(100, 150, size), directions @ directions.T + 4.0 * np.eye(size)


def draw(n, mean, covariance, shape=SHAPE, seed=1):
    x = np.random.default_rng(seed).multivariate_normal(mean, covariance, n, method="cholesky")
    assert -0.5 < x.min() and x.max() < 255.5, "a law that the gray values hold"
    return np.rint(x).astype(np.uint8).reshape(n, *shape)


def dense(fitted):
    """The covariance matrix of a fitted Gaussian, without its own transforms."""
    h, w, c = fitted.mean.shape
    if fitted.basis is None:
        one = [scipy.fft.dct(np.eye(m), axis=0, norm="ortho") for m in (h, w)]
        basis = np.kron(np.kron(*one), np.eye(c))
    else:
        basis = fitted.basis.astype(np.float64)
    return basis.T @ np.diag(fitted.variances + fitted.noise) @ basis


@pytest.fixture(scope="module")
def many():
    mean, covariance = law()
    return gaussian.fit([draw(3000, mean, covariance)], draw(200, mean, covariance, seed=2))


@pytest.fixture(scope="module")
def few():
    mean, covariance = law(shape=(12, 12, 1), scale=3.0)
    covariance = scipy.linalg.toeplitz(150 * 0.9 ** np.arange(144.0))  # about what a stationary image has
    return gaussian.fit([draw(12, mean, covariance, (12, 12, 1))], draw(12, mean, covariance, (12, 12, 1), seed=2))


def test_the_better_basis_is_chosen_on_validation_images(many, few):
    """Many images know their covariance; twelve of 144 pixels do not."""
    assert many.basis is not None and many.num_images == 3000
    assert few.basis is None and few.num_images == 12


@pytest.mark.parametrize("which", ["many", "few"])
def test_it_is_scipys_density_under_uniform_noise(which, request):
    """E_u -log p(k + u) = -log p(k) + tr(Sigma^-1) / 24, and the mean of draws of u agrees."""
    fitted = request.getfixturevalue(which)
    shape = fitted.mean.shape
    levels = np.random.default_rng(5).integers(90, 160, (3, *shape), dtype=np.uint8)
    covariance = dense(fitted)
    density = scipy.stats.multivariate_normal(fitted.mean.ravel(), covariance)
    flat = levels.reshape(3, -1).astype(np.float64)
    expected = -density.logpdf(flat) + np.trace(np.linalg.inv(covariance)) / 24
    np.testing.assert_allclose(fitted.nats(levels), expected, rtol=1e-6)
    u = np.random.default_rng(6).uniform(-0.5, 0.5, (4000, flat.shape[1]))
    for value, x in zip(fitted.nats(levels), flat, strict=True):
        drawn = -density.logpdf(x + u)
        assert abs(drawn.mean() - value) < 4.5 * scipy.stats.sem(drawn)


def test_it_is_above_the_mass_of_every_image():
    """Independent pixels, whose masses are differences of the distribution function: the sum is the exact -log P."""
    rng = np.random.default_rng(0)
    deviations = np.array([0.2, 0.5, 1.0, 4.0])
    fitted = gaussian.GaussianImages(
        mean=np.array([100.2, 101.0, 30.5, 200.0]).reshape(2, 2, 1),
        basis=np.eye(4, dtype=np.float32),
        variances=deviations**2 - 0.01,
        noise=0.01,
        num_images=1,
    )
    levels = np.rint(fitted.mean.ravel() + deviations * rng.standard_normal((50, 4))).astype(np.uint8)
    pixels = scipy.stats.norm(fitted.mean.ravel(), deviations)
    exact = -np.log(pixels.cdf(levels + 0.5) - pixels.cdf(levels - 0.5)).sum(axis=1)
    found = fitted.nats(levels.reshape(50, 2, 2, 1))
    assert (found > exact).all()
    wide = gaussian.GaussianImages(**{**vars(fitted), "variances": np.full(4, 400.0)})
    pixels = scipy.stats.norm(fitted.mean.ravel(), math.sqrt(400.01))
    exact = -np.log(pixels.cdf(levels + 0.5) - pixels.cdf(levels - 0.5)).sum(axis=1)
    gap = wide.nats(levels.reshape(50, 2, 2, 1)) - exact
    # Jensen's gap is half the variance of log p in the cube, (k - mu)^2 / 12 s^4 for each pixel.
    expected = ((levels - wide.mean.ravel()) ** 2).sum(axis=1) / (24 * 400.01**2)
    np.testing.assert_allclose(gap, expected, rtol=0.01, atol=1e-7)


def test_images_of_a_gaussian_cost_its_entropy_and_what_the_fit_costs(many):
    """The cost of unseen images: above the entropy of the law, by rounding and half a nat per fitted number and image.

    Gray values and the uniform noise on them are both off by one twelfth of a squared gray level.
    """
    mean, covariance = law()
    rounded = scipy.stats.multivariate_normal(mean, covariance + np.eye(SIZE) / 6).entropy()
    entropy = scipy.stats.multivariate_normal(mean, covariance).entropy()
    found = many.nats(draw(4000, mean, covariance, seed=3))
    error = scipy.stats.sem(found)
    # A likelihood fitted with p numbers to n images loses p / 2n on others; p = D of the mean, D (D + 1) / 2 beside.
    numbers = SIZE + SIZE * (SIZE + 1) / 2
    loss = numbers / (2 * many.num_images)
    assert entropy - 4 * error < found.mean() < rounded + 2 * loss + 4 * error
    assert rounded + 2 * loss + 8 * error < 1.02 * entropy, "the test could fail"


def test_the_diagonal_is_chosen_on_validation_images_and_never_on_training_images():
    """Ten images: without a diagonal, directions that they do not span would cost without end."""
    mean, covariance = law()
    train, validation, test = (draw(n, mean, covariance, seed=s) for n, s in ((10, 4), (50, 5), (200, 6)))
    fitted = gaussian.fit([train], validation)
    assert gaussian.NOISES[0] < fitted.noise < gaussian.NOISES[-1]
    costs = [gaussian.GaussianImages(**{**vars(fitted), "noise": r}).nats(validation).mean() for r in gaussian.NOISES]
    assert fitted.noise == gaussian.NOISES[int(np.argmin(costs))]
    other = gaussian.fit([train], train)
    assert other.noise < fitted.noise and other.nats(test).mean() > fitted.nats(test).mean()


def test_parts_do_not_change_the_fit():
    mean, covariance = law()
    train, validation = draw(50, mean, covariance), draw(20, mean, covariance, seed=2)
    one, parts = gaussian.fit([train], validation), gaussian.fit(np.array_split(train, 7), validation)
    np.testing.assert_allclose(one.nats(validation), parts.nats(validation), rtol=1e-9)
    np.testing.assert_allclose(one.mean, train.mean(axis=0), rtol=1e-12)


def test_one_image_many_times_and_alone():
    """No variance at all: what is left is the diagonal, and best is that of the uniform noise, one twelfth."""
    image = np.random.default_rng(0).integers(0, 256, (1, 6, 6, 1), dtype=np.uint8)
    for train in (image, image.repeat(9, axis=0)):
        fitted = gaussian.fit([train], image)
        assert fitted.noise == pytest.approx(1 / 12, rel=0.1) and np.isfinite(fitted.nats(255 - image)).all()


def test_a_large_image_takes_the_cosine_transform():
    images = np.random.default_rng(0).integers(0, 256, (6, 46, 46, 1), dtype=np.uint8)
    assert math.prod(images.shape[1:]) > gaussian.MAX_DIMENSIONS
    fitted = gaussian.fit([images[:4]], images[4:])
    assert fitted.basis is None and fitted.variances.shape == (46 * 46,)
    # Independent uniform gray values have 8 bits each and a Gaussian of their variance spends 8.25.
    bits = fitted.nats(images[4:]).mean() / math.log(2) / 46**2
    assert 8.0 < bits < 8.6


def test_what_is_refused():
    images = np.zeros((2, 3, 4, 1), np.uint8)
    fitted = gaussian.fit([images], images)
    with pytest.raises(InputTypeError, match="float64; expected uint8"):
        fitted.nats(images / 255.0)
    with pytest.raises(InputError, match=r"shape \(2, 4, 3, 1\); expected \(n, 3, 4, 1\)"):
        fitted.nats(images.swapaxes(1, 2))
    with pytest.raises(InputError, match="validation: 0 images"):
        gaussian.fit([images], images[:0])
    with pytest.raises(InputError, match="train: 0 images"):
        gaussian.fit([], images)
    with pytest.raises(InputTypeError, match="float32; expected uint8"):
        gaussian.fit([images.astype(np.float32)], images)


@pytest.mark.parametrize("which", ["many", "few"])
def test_save_and_load_round_trip(which, request, tmp_path):
    fitted, path = request.getfixturevalue(which), tmp_path / "gaussian.npz"
    gaussian.save(fitted, path)
    loaded = gaussian.load(path)
    for name, value in vars(fitted).items():
        np.testing.assert_array_equal(getattr(loaded, name), value)
        assert type(getattr(loaded, name)) is type(value)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(RunError, match="gaussian.npz: .*; expected the Gaussian"):
        gaussian.load(path)
    with pytest.raises(RunError, match="none.npz"):
        gaussian.load(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("name", "folder", "full", "reference"),
    [("pneumoniamnist", "medmnist", True, 4.33), ("nih", "nih-chestxray8-256", False, 3.91)],
)
def test_reference_values_on_chest_xrays(name, folder, full, reference, real_data):
    """Bits per pixel that were measured independently, on other held-out images and with other training images."""
    data = medvdm.data.load(DataConfig(data=name, data_dir=str(real_data / folder)))
    levels = {split: data.levels(data.indices(split)) for split in ("train", "val", "test")}
    fitted = gaussian.fit([levels["train"]], levels["val"])
    bits = bits_per_dim(fitted.nats(levels["test"]), data.image_shape)
    assert (fitted.basis is not None) == full
    # Two samples of about this size, and a little for the different fits.
    error = math.sqrt(2) * clustered_stderr(bits, data.patients[data.indices("test")])
    assert abs(bits.mean() - reference) < 3 * error + 0.02
    assert error < 0.1, "the test could fail"
