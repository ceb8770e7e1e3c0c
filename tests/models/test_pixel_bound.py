"""The 8-bit bound against exact entropies: independent pixels with a known law, and the U-Net's head told all of it."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from medvdm.models import cascade, likelihoods
from medvdm.models.unet import PIXEL_VARIANCE, UNet
from medvdm.theory import bound, gaussian
from medvdm.theory.schedules import FixedLinear

BIT = np.log(2.0)
GAMMAS = (-13.0, 5.0)  #: the preset's
LAWS = {
    "uniform": np.full(256, -np.log(256.0)),
    "gaussian": oracle.gaussian_levels(0.2, 0.1),
    "narrow": oracle.gaussian_levels(-1.0 + 0.4 * likelihoods.SPACING, 0.6 * likelihoods.SPACING),  # cut off by black
    "twelve": np.log(np.where(np.arange(256) % 22 == 3, 1 / 12, 1e-30)),  # 12 of 256 levels
}


def drawn(model, n=2**13, side=4):
    """Images from the law of the model; the same for every model of one law."""
    return jnp.asarray(model.sample(np.random.default_rng(1), (n, side, side, 1)))


def by_time(model, x):
    """The bound of each image in bits per pixel, in the order of the times at which it was estimated."""
    terms = jax.jit(lambda x: bound.terms(model, x, key=jax.random.key(2)))(x)
    return np.asarray(terms.total, np.float64)[np.argsort(terms.times)] / x[0].size / BIT


def mean_and_error(values):
    """The mean and its standard error.

    The times are spread evenly over the images. So the error is that of images with almost the same time: neighbours
    in time, whose difference has twice their variance.
    """
    return values.mean(), np.sqrt(np.mean(np.diff(values) ** 2) / 2 / len(values))


def bits(model):
    """The bound's mean in bits per pixel, and its standard error, by images drawn from the law of the model."""
    return mean_and_error(by_time(model, drawn(model)))


@pytest.mark.parametrize(("law", "entropy"), [("uniform", 8.0), ("gaussian", None), ("narrow", None), ("twelve", None)])
def test_the_bound_of_the_exact_denoiser_is_the_entropy_and_two_small_gaps(law, entropy):
    exact = oracle.levels_entropy(LAWS[law]) / BIT
    if entropy:
        assert exact == pytest.approx(entropy, rel=1e-12)
    if law == "twelve":
        assert exact == pytest.approx(np.log2(12), rel=1e-6)
    gaps = [gap / BIT for gap in oracle.levels_gaps(LAWS[law], *GAMMAS)]
    assert all(-1e-9 <= gap < 0.04 for gap in gaps), "what the ends of the schedule cost is little"
    found, error = bits(oracle.Levels(LAWS[law], FixedLinear(*GAMMAS)))
    assert error < 0.045
    assert found == pytest.approx(exact + sum(gaps), abs=4 * error)


def test_what_an_early_start_costs_is_the_gap_of_the_observation_model():
    """With noise of 3.8 levels at the start the decoder pays for what it does not know: 0.5 bits, by quadrature."""
    law = oracle.gaussian_levels(0.2, 0.03)
    observation, prior = (gap / BIT for gap in oracle.levels_gaps(law, -7.0, 5.0))
    found, error = bits(oracle.Levels(law, FixedLinear(-7.0, 5.0)))
    exact = oracle.levels_entropy(law) / BIT
    assert found == pytest.approx(exact + observation + prior, abs=4 * error)
    assert found - 4 * error > exact, "above the entropy"
    assert observation > 10 * error, "by more than the test could miss"


class Told(UNet):
    """A U-Net whose network is replaced by what it should say: each pixel is N(mean, variance), the rest is no help."""

    def __init__(self, mean, variance, *, rounding, reduce=0):
        self.mean, self.variance, self.rounding, self.reduce = mean, variance, rounding, reduce

    def condition(self, gamma, label):
        return (), gamma

    def answers(self, z, condition, shown=None):
        gamma = condition[1][:, None, None, None]
        alpha2, sigma2 = gaussian.sigma2(-gamma), gaussian.sigma2(gamma)
        alpha, sigma = jnp.sqrt(alpha2), jnp.sqrt(sigma2)
        total = alpha2 * PIXEL_VARIANCE + sigma2
        of_bell = sigma * (z - alpha * self.mean) / (alpha2 * self.variance + sigma2)
        said = (of_bell * total - sigma * z) / jnp.sqrt(alpha2 * PIXEL_VARIANCE * total)
        return jnp.concatenate([said, jnp.full_like(z, 0.5 * (np.log(self.variance) + 5.0))], axis=-1)


class ToldLevels(oracle.Levels):
    """:class:`oracle.Levels` with the head of the U-Net for a denoiser."""

    def __init__(self, mean, deviation, schedule, *, rounding=True):
        super().__init__(oracle.gaussian_levels(mean, deviation), schedule)
        self.net = Told(mean, deviation**2, rounding=rounding)

    def condition(self, gamma, label):
        return self.net.condition(gamma, label)

    def eps_hat(self, z, condition):
        return self.net(z, condition)


BELLS = {
    "wide": (0.2, 0.1),
    "narrow": (-1.0 + 100.3 * likelihoods.SPACING, 0.6 * likelihoods.SPACING),
    "at black": (-1.0 + 0.4 * likelihoods.SPACING, 0.6 * likelihoods.SPACING),
    "at white": (1.0 - 0.2 * likelihoods.SPACING, 0.9 * likelihoods.SPACING),
}


@pytest.mark.parametrize("bell", BELLS)
def test_the_head_of_the_u_net_told_mean_and_variance_is_the_exact_denoiser(bell):
    """A bell times the noise's bell is a bell, on the gray values too: centre c, deviation d."""
    model = ToldLevels(*BELLS[bell], FixedLinear(*GAMMAS))
    x = model.encode(jnp.asarray(model.sample(np.random.default_rng(0), (37, 6, 6, 1))))
    gamma = jnp.linspace(*GAMMAS, 37)
    z = gaussian.diffuse(x, jax.random.normal(jax.random.key(1), x.shape), gamma[:, None, None, None])
    found = jax.jit(lambda z, g: model.eps_hat(z, model.condition(g, None)))(z, gamma)
    exact = jax.jit(lambda z, g: super(ToldLevels, model).eps_hat(z, g[:, None, None, None]))(z, gamma)
    np.testing.assert_allclose(found, exact, rtol=0, atol=2e-3)  # float32 of z, by the least sigma, 1.5e-3
    assert np.abs(exact).max() > 1.0


def test_the_bound_of_the_head_of_the_u_net_comes_close_to_the_entropy():
    bell = "at black"
    law = oracle.gaussian_levels(*BELLS[bell])
    exact = (oracle.levels_entropy(law) + sum(oracle.levels_gaps(law, *GAMMAS))) / BIT
    found, error = bits(ToldLevels(*BELLS[bell], FixedLinear(*GAMMAS)))
    assert found == pytest.approx(exact, abs=4 * error)
    without, more = bits(ToldLevels(*BELLS[bell], FixedLinear(*GAMMAS), rounding=False))
    assert without > found + 4 * (error + more), "a head that does not know of whole numbers pays for it"


class ToldCopy(ToldLevels):
    """:class:`ToldLevels` that is given the reduced copy of its images as well."""

    def __init__(self, mean, deviation, schedule, x):
        super().__init__(mean, deviation, schedule)
        self.net.reduce = 2
        self.shown = cascade.enlarged(likelihoods.level_values(cascade.reduced(x, 2)), 2)

    def eps_hat(self, z, condition):
        return self.net(z, condition, self.shown)


@pytest.mark.parametrize(("deviation", "least"), [(0.6, 0.5), (3.0, 0.75), (12.0, 0.85)])
def test_the_head_of_the_u_net_makes_use_of_a_reduced_copy(deviation, least):
    """Of what the copy tells, H(b), it takes a part off the bits of the pixels, and never more than there is.

    b is the rounded mean of four independent pixels, whose law is by convolution; H(x | b) = H(x) - H(b). For the head
    the rounding is Gaussian noise, which is the worse the fewer gray levels there are.
    """
    mean = -1.0 + 100.3 * likelihoods.SPACING
    law = oracle.gaussian_levels(mean, deviation * likelihoods.SPACING)
    sums = np.ones(1)
    for _ in range(4):
        sums = np.convolve(sums, np.exp(law))
    copy = np.bincount((np.arange(len(sums)) + 2) // 4, sums)
    told = oracle.levels_entropy(np.log(np.maximum(copy, 1e-300))) / BIT / 4  # per pixel
    plain = ToldLevels(mean, deviation * likelihoods.SPACING, FixedLinear(*GAMMAS))
    x = drawn(plain)
    given = by_time(ToldCopy(mean, deviation * likelihoods.SPACING, FixedLinear(*GAMMAS), x), x)
    found, error = mean_and_error(given)
    assert found > oracle.levels_entropy(law) / BIT - told - 4 * error
    saved, error = mean_and_error(by_time(plain, x) - given)
    assert error < 0.1 * told
    assert saved > least * told - 4 * error
    assert saved < told + 4 * error
