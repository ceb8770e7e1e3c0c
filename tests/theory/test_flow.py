"""The probability flow's density against closed forms (tests/oracle.py)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from medvdm.errors import InputError
from medvdm.models.likelihoods import SPACING
from medvdm.theory import flow, gaussian
from medvdm.theory.flow import FlowConfig
from medvdm.theory.schedules import FixedLinear

KEY = jax.random.key(0)
NONE = jnp.zeros((1, 1))  #: the label of none
MIXTURE = ([0.3, 0.7], [[-1.0, 0.5, 0.0], [0.8, -0.2, 0.3]], np.diag([0.02, 0.3, 0.1]) + 0.02)


def density(model, z, **settings):
    config = FlowConfig(**settings)
    return jax.jit(lambda z: flow.log_density(model, z, NONE, key=KEY, config=config))(z)


def sigma2(gamma):
    return 1 / (1 + math.exp(-gamma))


def normal(z, mean, covariance):
    """log N(z; mean, covariance) in float64."""
    values, vectors = np.linalg.eigh(covariance)
    rotated = (np.asarray(z, np.float64).reshape(len(z), -1) - mean) @ vectors
    return -0.5 * np.sum(rotated**2 / values + np.log(2 * math.pi * values), axis=1)


def of_gaussian(z, mean, covariance, low, high):
    """The flow of the exact denoiser is affine: (z - alpha m) / sqrt(v) stays the same in every principal direction."""
    values, vectors = np.linalg.eigh(covariance)
    v = [(1 - sigma2(g)) * values + sigma2(g) for g in (low, high)]
    shrink = vectors * np.sqrt(v[0] / v[1]) @ vectors.T
    alpha = [math.sqrt(1 - sigma2(g)) for g in (low, high)]
    return normal(z, alpha[0] * mean - alpha[1] * shrink @ mean, shrink @ shrink)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
def test_of_a_gaussian_it_is_the_normal_density_to_the_tolerance_asked(tolerance):
    """Also where the schedule ends before all is noise, so that the flow's law is not that of the data."""
    rng = np.random.default_rng(1)
    root = rng.standard_normal((5, 5)) * [1, 0.7, 0.3, 0.1, 0.02]
    mean, covariance = rng.standard_normal(5), root.T @ root
    for low, high in ((-13.0, 5.0), (-4.0, 1.0)):
        model = oracle.Mixture([1.0], mean[None], covariance, FixedLinear(low, high))
        z = math.sqrt(1 - sigma2(low)) * model.sample(rng, 6)
        found = density(model, z, rtol=tolerance, atol=tolerance)
        assert found.finished and found.log_density.shape == (1, 6)
        steps = (int(found.evaluations) - 1) / 6
        error = np.abs(found.log_density[0] - of_gaussian(z, mean, covariance, low, high)) / 5
        assert error.max() < 2 * steps * tolerance, "each step may err by the tolerance per dimension, about"


@pytest.mark.parametrize("shape", [(1,), (200,), (3, 4, 2)])
def test_of_each_shape_with_what_is_exact_by_itself(shape):
    """The Jacobian is a multiple of the identity: probes of +-1 know its trace, and z of 200 numbers takes them."""
    model = (oracle.OnImages if len(shape) == 3 else oracle.Isotropic)(0.7, FixedLinear(-13.0, 5.0))
    z = 0.7 * jax.random.normal(jax.random.key(1), (3, *shape))
    size = math.prod(shape)
    found = density(model, z)
    assert found.log_density.shape == (4 if size == 200 else 1, 3)
    exact = of_gaussian(z, np.zeros(size), 0.49 * np.eye(size), -13.0, 5.0)
    np.testing.assert_allclose(found.log_density, np.tile(exact, (len(found.log_density), 1)), atol=1e-3 * size)
    v = [(1 - sigma2(g)) * 0.49 + sigma2(g) for g in (-13.0, 5.0)]
    np.testing.assert_allclose(found.z_1, z * math.sqrt(v[1] / v[0]), atol=1e-3)


@pytest.fixture(scope="module")
def of_mixture():
    """Two Gaussians of one full covariance: the model, z at gamma -6, and its density by the exact divergence."""
    model = oracle.Mixture(*MIXTURE, FixedLinear(-6.0, 4.0))
    z = jnp.asarray(model.sample(np.random.default_rng(2), 5))
    return model, z, density(model, z, rtol=1e-5, atol=1e-5)


def test_of_a_mixture_it_is_the_density_of_the_data_and_what_the_prior_lacks(of_mixture):
    """Along the flow the density of the flow over that of the diffusion is constant: N(z_1; 0, I) / q(z_1)."""
    model, z, found = of_mixture

    def q(z, gamma):
        alpha = math.sqrt(1 - sigma2(gamma))
        return np.asarray(model.log_density(z / alpha, jnp.full((1, 1), math.exp(gamma)))) - 3 * math.log(alpha)

    lacks = normal(found.z_1, np.zeros(3), np.eye(3)) - q(found.z_1, 4.0)
    assert np.abs(lacks).max() > 1e-3, "so that it is seen"
    np.testing.assert_allclose(found.log_density[0], q(z, -6.0) + lacks, atol=1e-3)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_probes_are_unbiased(of_mixture, kind):
    model, z, exact = of_mixture
    found = np.asarray(density(model, z, divergence=kind, probes=500).log_density, np.float64)
    error = found.std(axis=0, ddof=1) / math.sqrt(500)
    assert found.shape == (500, 5) and error.max() > 1e-3
    assert (np.abs(found.mean(axis=0) - exact.log_density[0]) < 4.5 * error + 1e-3).all()


def test_evaluations_are_those_that_were_made():
    calls = []

    class Counting(oracle.Isotropic):
        def condition(self, gamma, label):
            jax.debug.callback(lambda: calls.append(1))
            return super().condition(gamma, label)

    found = density(Counting(0.7, FixedLinear(-8.0, 5.0)), jnp.ones((2, 3)))
    jax.effects_barrier()
    assert int(found.evaluations) == len(calls)


def test_what_does_not_come_to_its_end_says_so(of_mixture):
    assert not density(of_mixture[0], of_mixture[1], max_steps=2).finished


def test_the_weight_of_an_exact_model_is_the_density_of_x_in_every_draw():
    model = oracle.Isotropic(0.7, FixedLinear(-8.0, 12.0))
    x = 0.7 * jax.random.normal(jax.random.key(3), (20, 5))
    found = jax.jit(lambda x: flow.log_weight(model, x, key=KEY))(x)
    np.testing.assert_allclose(found.log_weight, normal(x, np.zeros(5), 0.49 * np.eye(5)), atol=5e-3)
    assert (np.asarray(found.probe_variance) == 0).all()


LAWS = {"wide": oracle.gaussian_levels(0.1, 0.2), "seldom": np.log(np.where(np.arange(256) % 22 == 3, 1 / 12, 1e-30))}


@pytest.mark.parametrize("law", LAWS)
def test_gray_values_cost_their_entropy_and_the_gaps_of_the_ends(law):
    """Uniform dequantisation costs little more for a wide law, and for one of twelve values what it does not see."""
    gammas = (-11.0, 5.0)  # noise of half a gray value
    model = oracle.Levels(LAWS[law], FixedLinear(*gammas))
    x = jnp.asarray(model.sample(np.random.default_rng(4), (40, 4, 4, 1)))
    config = FlowConfig(divergence="rademacher", probes=1)  # independent pixels: the Jacobian is diagonal

    def mean_and_error(weight):
        nats = -np.asarray(jax.jit(weight)(x).log_weight, np.float64) / 16
        return nats.mean(), nats.std(ddof=1) / math.sqrt(len(nats))

    found, error = mean_and_error(lambda x: flow.log_weight(model, x, key=KEY, config=config))
    exact = oracle.levels_entropy(LAWS[law]) + sum(oracle.levels_gaps(LAWS[law], *gammas))
    assert error < 0.05 and found == pytest.approx(exact, abs=4.5 * error + 1e-3)

    uniform, error = mean_and_error(
        lambda x: flow.uniform_log_weight(model, x, key=KEY, spacing=SPACING, config=config)
    )
    entropy = oracle.levels_entropy(LAWS[law])
    if law == "wide":
        assert uniform == pytest.approx(entropy, abs=4.5 * error + 1e-3)
    else:
        assert uniform - 4.5 * error > entropy + 0.1


def test_slope_is_that_of_the_flow_in_y_and_tau():
    rng = np.random.default_rng(5)
    eps_hat, z = (jnp.asarray(rng.standard_normal((2, 3)), jnp.float32) for _ in range(2))
    gamma = jnp.float32(-1.3)
    y = z / gaussian.alpha(gamma)
    along = lambda g: gaussian.alpha(g) * (y + (jnp.exp(g / 2) - jnp.exp(gamma / 2)) * eps_hat)  # noqa: E731
    np.testing.assert_allclose(flow.slope(eps_hat, z, gamma), jax.jacfwd(along)(gamma), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"divergence": "exakt"}, "divergence: 'exakt'; did you mean 'exact'"),
        ({"probes": 0}, "probes: 0; expected at least 1"),
        ({"max_steps": 0}, "max_steps: 0; expected at least 1"),
        ({"rtol": 0.0}, "rtol: 0.0; expected a number above 0"),
        ({"atol": -1e-3}, "atol: -0.001; expected"),
        ({"atol": math.nan}, "atol: nan; expected"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(wrong, says):
    with pytest.raises(InputError, match=says) as caught:
        FlowConfig(**wrong)
    assert "\n" not in str(caught.value)
