"""What the label does to a model, and what it does not: the null, label dropout and guidance by second routes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny

import medvdm
from medvdm.models.generate import generate
from medvdm.theory import bound, gaussian, sampling

Shapes = dict[tuple[str, ...], np.ndarray]


def leaves(params: object) -> Shapes:
    return {
        tuple(str(getattr(k, "key", k)) for k in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def test_a_model_whose_labels_are_always_dropped_is_the_unconditional_model(tmp_path: Path) -> None:
    """The same weights after training, and the same samples from the null."""

    def fitted(name: str, **changes: Any) -> medvdm.Run:
        config = tiny.config(encoder_layers=0, decoder_layers=0, ema_decay=0.0, **changes)
        return medvdm.fit(config, tmp_path / name, progress=False)

    with_labels, without = fitted("dropped", label_dropout=1.0), fitted("unconditional", conditional=False)
    a, b = leaves(with_labels.params), leaves(without.params)
    assert [path for path in a if path not in b] == [("labels", "table")] and set(b) < set(a)
    for path, leaf in b.items():
        np.testing.assert_allclose(a[path], leaf, rtol=1e-5, atol=1e-7, err_msg="/".join(path))
    drawn = [medvdm.sample(run, 3, steps=5, seed=2).images for run in (with_labels, without)]
    np.testing.assert_allclose(*drawn, atol=1e-5)


def test_guidance_goes_to_the_conditional_model_as_its_weight_goes_to_zero(small) -> None:
    """A weight of 1e-9 takes the guided path of the code, 0 does not."""
    _, graph, params = small
    labels = np.eye(3, dtype=np.float32)[[1, 1, 1, 1]]
    plain, nearly, far = (
        generate(graph, params, num=4, steps=8, labels=labels, guidance=w, seed=1).images for w in (0.0, 1e-9, 2.0)
    )
    np.testing.assert_allclose(nearly, plain, atol=1e-5)
    assert np.abs(far - plain).max() > 1e-2


class TwoGaussians(bound.Diffusion):
    """The exact denoiser of classes N(-1, 0.3^2) and N(1, 0.3^2) in one dimension, both equally likely.

    A condition is (gamma, mean of the class), with NaN for the null.
    """

    spread, timesteps = 0.3, 0

    def log_density(self, z: jax.Array, gamma: jax.Array, mean: float) -> jax.Array:
        alpha = gaussian.alpha(gamma)
        variance = alpha**2 * self.spread**2 + gaussian.sigma(gamma) ** 2

        def of_class(m: float) -> jax.Array:
            return -0.5 * (z - alpha * m) ** 2 / variance

        both = jnp.logaddexp(of_class(-1.0), of_class(1.0))
        return of_class(mean) if not np.isnan(mean) else both

    def eps_hat(self, z: jax.Array, condition: tuple[jax.Array, float]) -> jax.Array:
        gamma, mean = condition
        score = jax.vmap(jax.grad(lambda v: self.log_density(v, gamma, mean)))(z[:, 0])
        return -gaussian.sigma(gamma) * score[:, None]


def test_guided_noise_is_the_score_of_the_sharpened_density() -> None:
    """p(z | y) p(y | z)^w, differentiated as a whole; the guided prediction knows only the two scores."""
    model, z, gamma, w = TwoGaussians(), jnp.linspace(-3, 3, 31)[:, None], jnp.asarray(0.5), 2.5
    guided = sampling.guided_eps(model, z, (gamma, 1.0), (gamma, float("nan")), w)

    def sharpened(v: jax.Array) -> jax.Array:
        ones, minus = (model.log_density(v, gamma, mean) for mean in (1.0, -1.0))
        return ones + w * jax.nn.log_sigmoid(ones - minus)

    score = jax.vmap(jax.grad(sharpened))(z[:, 0])
    np.testing.assert_allclose(guided[:, 0], -gaussian.sigma(gamma) * score, rtol=1e-4, atol=1e-5)


def test_the_null_of_exact_classes_is_their_mean_under_the_posterior() -> None:
    model, z, gamma = TwoGaussians(), jnp.linspace(-3, 3, 31)[:, None], jnp.asarray(-1.0)
    ones, minus = (model.log_density(z[:, 0], gamma, mean) for mean in (1.0, -1.0))
    posterior = jax.nn.sigmoid(ones - minus)[:, None]
    by_class = [model.eps_hat(z, (gamma, mean)) for mean in (1.0, -1.0)]
    expected = posterior * by_class[0] + (1 - posterior) * by_class[1]
    np.testing.assert_allclose(model.eps_hat(z, (gamma, float("nan"))), expected, rtol=1e-4, atol=1e-5)
