"""The ancestral sampler against an analytic variance recursion, a plain loop, and itself in other arrangements."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from medvdm.errors import DivergedError, InputError
from medvdm.models import generate as generate_
from medvdm.models import vdm
from medvdm.models.generate import MAX_STEPS
from medvdm.theory import gaussian, sampling, schedules

S = 0.7
MODEL = oracle.Isotropic(S, schedules.FixedLinear(-8.0, 6.0))
chain = jax.jit(sampling.chain, static_argnums=0, static_argnames=("num_states",))
NO_LABEL = jnp.zeros((1, 1))
LABELS = np.eye(3, dtype=np.float32)[[0, 1, 2, 1, 0, 2, 0]]


def keys_of(n, seed=0):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(n))


def alpha64(gamma):
    return 1 / np.sqrt(1 + np.exp(gamma))


def test_the_recursion_itself_has_its_known_ratios_and_converges_as_1_over_t():
    ratios = []
    for T in (20, 100, 250, 1000, 20_000):
        variance = oracle.isotropic_chain_variance(S, np.linspace(-8, 6, T + 1))
        ratios.append(variance / (alpha64(-8.0) ** 2 * S**2 + 1 - alpha64(-8.0) ** 2))
    np.testing.assert_allclose(ratios[:3], [0.72, 0.933, 0.9725], atol=6e-3)
    np.testing.assert_allclose(ratios[3:], [0.993, 0.9997], atol=6e-4)
    assert 3 < (1 - ratios[1]) / (1 - ratios[3]) / 3 < 4  # ten times the steps, a tenth of the error


@pytest.mark.parametrize("T", [20, 100, 250])
def test_variance_of_an_exact_chain_follows_the_recursion(T):
    d = 40_000
    z = jax.random.normal(jax.random.key(T), (1, d))
    z_0 = np.asarray(chain(MODEL, z, NO_LABEL, keys=keys_of(1), steps=T, first=T)[-1])
    expected = oracle.isotropic_chain_variance(S, np.linspace(-8, 6, T + 1))
    assert abs(z_0.var() - expected) < 5 * expected * math.sqrt(2 / d)
    assert abs(z_0.mean()) < 5 * math.sqrt(expected / d)


def test_a_mixture_is_sampled_with_its_weights_and_widths():
    model = oracle.Mixture([0.7, 0.3], [[-2.0], [2.0]], [[0.04]], schedules.FixedLinear(-8.0, 6.0))
    n = 2000
    z = jax.random.normal(jax.random.key(2), (n, 1))
    x = np.asarray(chain(model, z, NO_LABEL, keys=keys_of(n), steps=300, first=300)[-1])[:, 0] / alpha64(-8.0)
    right = x > 0
    assert abs(right.mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / n)
    for part, mean in ((x[right], 2.0), (x[~right], -2.0)):
        assert abs(part.mean() - mean) < 5 * 0.2 / math.sqrt(len(part)) + 0.01
        assert 0.75 < part.var() / 0.04 < 1.15  # 300 steps shrink it a little, as the recursion says


def plain_loop(z, mean, keys, T, first):
    """The chain in float64 NumPy with the library's noise: posterior q(z_s | z_t, x_hat) in its textbook form."""
    gammas = np.linspace(-8.0, 6.0, T + 1)
    alpha, sigma2 = alpha64(gammas), 1 / (1 + np.exp(-gammas))
    per_key = lambda k: jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(k, i), z.shape[1:]))  # noqa: E731
    noise = np.stack([per_key(k)(jnp.arange(first + 1)) for k in keys], axis=1)
    z = np.asarray(z, np.float64)
    states = [z]
    for t in range(first, 0, -1):
        ratio = alpha[t] / alpha[t - 1]
        v_ts = sigma2[t] - ratio**2 * sigma2[t - 1]
        x_hat = mean + alpha[t] * S**2 / (alpha[t] ** 2 * S**2 + sigma2[t]) * (z - alpha[t] * mean)
        mu = ratio * sigma2[t - 1] / sigma2[t] * z + alpha[t - 1] * v_ts / sigma2[t] * x_hat
        z = mu + np.sqrt(v_ts * sigma2[t - 1] / sigma2[t]) * noise[t]
        states.append(z)
    return np.stack(states)


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 128, 129])
def test_blocks_of_steps_change_nothing_against_a_plain_loop(T):
    z, keys = jax.random.normal(jax.random.key(3), (2, 3)), keys_of(2)
    expected = plain_loop(z, 0.0, keys, T, T)[-1]
    np.testing.assert_allclose(chain(MODEL, z, NO_LABEL, keys=keys, steps=T, first=T)[-1], expected, atol=2e-4)


@pytest.mark.parametrize("T", [20, 21, 22, 43])
def test_one_label_an_example_shortens_the_block_and_still_matches_the_loop(T):
    z, keys, labels = jax.random.normal(jax.random.key(3), (3, 2)), keys_of(3), jnp.asarray([[-1.0], [0.5], [2.0]])
    expected = plain_loop(z, np.asarray(labels, np.float64), keys, T, T)[-1]  # 3 rows: 21 steps a block
    np.testing.assert_allclose(chain(MODEL, z, labels, keys=keys, steps=T, first=T)[-1], expected, atol=2e-4)


@pytest.mark.parametrize(
    ("T", "first", "k"), [(100, 70, 1), (100, 70, 4), (100, 100, 3), (9, 5, 5), (3, 3, 3), (1, 1, 1)]
)
def test_states_are_the_loops_at_even_spaced_steps_from_any_start(T, first, k):
    z, keys = jax.random.normal(jax.random.key(3), (2, 3)), keys_of(2)
    loop = plain_loop(z, 0.0, keys, T, first)
    states = chain(MODEL, z, NO_LABEL, keys=keys, steps=T, first=first, num_states=k)
    done = [first * (j + 1) // k for j in range(k)]
    assert states.shape == (k, 2, 3)
    np.testing.assert_allclose(states, loop[done], atol=2e-4)


plain_chain = jax.jit(
    sampling.plain_chain, static_argnums=0, static_argnames=("steps", "first", "num_states", "guidance")
)


@pytest.mark.parametrize(
    ("T", "first", "k", "rows", "guidance"),
    [(1, 1, 1, 1, 0.0), (64, 64, 1, 1, 0.0), (65, 65, 65, 3, 0.0), (100, 70, 4, 1, 1.5), (43, 42, 42, 3, -0.5),
     (130, 130, 7, 3, 2.0), (20, 3, 2, 1, 0.7)],
)  # fmt: skip
def test_the_fast_chain_is_the_plain_one(small, T, first, k, rows, guidance):
    """A real network, one label for all or one per row, from any start, with any number of states."""
    _, graph, params = small
    z, keys = jax.random.normal(jax.random.key(3), (3, 4)), keys_of(3)
    labels = jnp.asarray(LABELS[:rows])

    def run(chain, **settings):
        def of(params):
            model = vdm.merge(graph, params)
            null = model.embed(None, n=1) if guidance else None
            return chain(
                model, z, model.embed(labels), null, keys=keys, first=first, guidance=guidance, num_states=k, steps=T
            )

        return np.asarray(jax.jit(of)(params))

    fast, plain = run(sampling.chain), run(sampling.plain_chain)
    assert fast.shape == (k, 3, 4)
    np.testing.assert_allclose(fast, plain, rtol=1e-4, atol=1e-4)


def test_more_states_cost_no_more_conditions():
    """What depends on time and label only is computed once per block of steps, however many states are returned."""
    counted = []

    class Counting(oracle.Isotropic):
        def condition(self, gamma, label):
            jax.debug.callback(lambda: counted.append(1))
            return super().condition(gamma, label)

    model, counts = Counting(S, MODEL.schedule), []
    for k in (1, 7, 200):
        counted.clear()
        chain(model, jnp.zeros((1, 2)), NO_LABEL, keys=keys_of(1), steps=200, first=200, num_states=k)
        jax.effects_barrier()
        counts.append(len(counted))
    assert counts == [4, 4, 4]  # blocks of 64


def test_a_chain_in_the_images_shape_is_the_flat_one():
    shape = (2, 3, 2)
    z, keys = jax.random.normal(jax.random.key(3), (3, *shape)), keys_of(3)
    labels = jnp.asarray([[-1.0], [0.5], [2.0]])
    on_images = oracle.OnImages(S, MODEL.schedule)
    settings = {"keys": keys, "steps": 30, "first": 30, "num_states": 3}
    flat = chain(MODEL, z.reshape(3, -1), labels, **settings)
    for form in (chain, plain_chain):
        states = form(on_images, z, labels, **settings)
        assert states.shape == (3, 3, *shape)
        np.testing.assert_allclose(states.reshape(3, 3, -1), flat, atol=1e-4)


def test_guidance_extrapolates_from_the_null_to_the_label():
    # The exact denoiser is affine in the class mean and the null's is 0: guiding by w is a label (1 + w) times as far.
    z, keys, label = jax.random.normal(jax.random.key(3), (2, 3)), keys_of(2), jnp.asarray([[0.8]])
    guided = chain(MODEL, z, label, NO_LABEL, keys=keys, steps=30, first=30, guidance=1.5)
    further = chain(MODEL, z, 2.5 * label, keys=keys, steps=30, first=30)
    np.testing.assert_allclose(guided, further, atol=2e-4)


def test_guided_eps_is_1_plus_w_of_label_less_w_of_null(small):
    config, graph, params = small
    model = vdm.merge(graph, params)
    z, gamma = jax.random.normal(jax.random.key(0), (5, 4)), jnp.full((5,), -1.0)
    label, null = (model.condition(gamma, model.embed(y, n=5)) for y in (jnp.eye(3)[jnp.array([0, 1, 2, 0, 1])], None))
    with_label, with_null = model.eps_hat(z, label), model.eps_hat(z, null)
    assert np.max(np.abs(with_label - with_null)) > 0.05
    for w in (0.0, 2.0, -1.0):
        expected = (1 + w) * np.asarray(with_label) - w * np.asarray(with_null)
        np.testing.assert_allclose(sampling.guided_eps(model, z, label, null, w), expected, atol=1e-5)
    np.testing.assert_array_equal(sampling.guided_eps(model, z, label, None, 5.0), with_label)


def test_ancestral_step_is_a_draw_from_the_posterior():
    z, eps, g_s, g_t = jnp.full((1, 1), 0.4), jnp.full((1, 1), -0.7), jnp.float32(-1.0), jnp.float32(0.5)
    expected = gaussian.posterior(gaussian.x_from_eps(eps, z, g_t), z, g_s, g_t)
    for noise in (-1.0, 0.0, 2.0):
        step = sampling.ancestral_step(z, eps, g_s, g_t, jnp.full((1, 1), noise))
        np.testing.assert_allclose(step, expected.mean + noise * math.sqrt(expected.variance), rtol=1e-5)


def test_segments_are_even_and_end_exactly_even_for_large_counts():
    most = sampling.MAX_STATES
    for first, k in [(1, 1), (10, 3), (1_000_000, 7), (999_983, 1000), (5, 5), (999_983, most), (2 * most - 1, most)]:
        ends = np.asarray(sampling.segment_ends(first, k))
        assert ends[0] == 0 and ends[-1] == first and len(ends) == k + 1
        np.testing.assert_array_equal(ends, np.arange(k + 1) * first // k)
    with pytest.raises(InputError, match=f"num_states: {most + 1}; expected at most {most}"):
        sampling.segment_ends(10**6, most + 1)


# --- the whole of generate, with a real model


def generate(small, num=7, steps=12, **settings):
    _, graph, params = small
    return generate_.generate(graph, settings.pop("params", params), num=num, steps=steps, **settings)


def test_shapes_ranges_times_and_the_last_state(small):
    samples = generate(small, num_states=5)
    assert samples.images.shape == (7, 3, 4, 2)
    assert samples.latents.shape == (5, 7, 4) and samples.states.shape == (5, 7, 3, 4, 2)
    assert samples.images.min() >= 0 and samples.images.max() <= 1
    np.testing.assert_allclose(samples.times, 1 - np.array([2, 4, 7, 9, 12]) / 12, atol=1e-6)
    assert samples.times[-1] == 0.0
    np.testing.assert_array_equal(samples.states[-1], samples.images)
    _, graph, params = small
    model = vdm.merge(graph, params)
    gammas = np.asarray(model.gamma(jnp.asarray(samples.times, jnp.float32)), np.float64)
    for k in range(5):  # each state is shown at the encoding's own scale
        shown = jax.nn.sigmoid(model.decode(jnp.asarray(samples.latents[k] / alpha64(gammas[k]), jnp.float32)))
        np.testing.assert_allclose(samples.states[k], shown, atol=1e-5)


def test_sample_i_does_not_depend_on_num_or_batch_size(small):
    whole = generate(small, labels=LABELS, guidance=1.0)
    parts = generate(small, labels=LABELS, guidance=1.0, batch_size=3)
    np.testing.assert_allclose(parts.latents, whole.latents, atol=1e-4)
    np.testing.assert_allclose(parts.images, whole.images, atol=1e-4)
    fewer = generate(small, num=2, labels=LABELS[:2], guidance=1.0)
    np.testing.assert_allclose(fewer.images, whole.images[:2], atol=1e-4)


def test_seeds_differ_and_repeat_and_samples_of_a_seed_differ(small):
    first, again, other = generate(small, seed=1), generate(small, seed=1), generate(small, seed=2)
    np.testing.assert_array_equal(first.latents, again.latents)
    assert np.min(np.abs(first.latents - other.latents)) > 0
    assert len(np.unique(first.latents[-1].round(5), axis=0)) == 7


def test_one_label_for_all_equals_the_label_repeated_row_by_row(small):
    same = np.repeat(LABELS[1:2], 7, axis=0)
    shared = generate(small, labels=same).latents
    mixed = generate(small, labels=np.concatenate([same[:6], LABELS[:1]])).latents
    np.testing.assert_allclose(shared[:, :6], mixed[:, :6], atol=1e-4)
    assert np.max(np.abs(shared[:, 6] - mixed[:, 6])) > 1e-3


def test_guidance_0_is_the_conditional_model_and_no_label_is_the_trained_null(small):
    _, _, params = small
    table, null = params["labels"]["table"], params["labels"]["null"]
    conditional = generate(small, labels=LABELS).images
    np.testing.assert_array_equal(generate(small, labels=LABELS, guidance=0.0).images, conditional)
    # A model whose rows all equal its null row makes no difference between label and null; zeros would.
    as_null = {**params, "labels": {"table": jnp.tile(null[None], (3, 1)), "null": null}}
    untold = generate(small).images
    np.testing.assert_allclose(generate(small, params=as_null, labels=LABELS).images, untold, atol=1e-4)
    np.testing.assert_allclose(generate(small, params=as_null, labels=LABELS, guidance=3.0).images, untold, atol=1e-3)
    moved = {**params, "labels": {"table": table, "null": null + 1.0}}
    np.testing.assert_array_equal(generate(small, params=moved, labels=LABELS).images, conditional)
    assert np.max(np.abs(generate(small, params=moved).images - untold)) > 1e-3


def test_a_given_start_at_an_intermediate_time_is_where_the_chain_starts(small):
    z = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
    whole = generate(small, z=z, num_states=12)
    assert np.allclose(whole.times, 1 - np.arange(1, 13) / 12, atol=1e-6)
    # Steps draw their noise by their number: going on from the state after 4 of 12 steps gives the same end.
    rest = generate(small, z=whole.latents[3], first=8)
    np.testing.assert_allclose(rest.images, whole.images, atol=1e-5)
    assert rest.times.tolist() == [0.0]
    partial = generate(small, z=whole.latents[3], first=8, num_states=2)
    np.testing.assert_allclose(partial.times, [4 / 12, 0], atol=1e-6)


def test_a_second_call_and_other_numbers_of_steps_compile_nothing(small):
    generate(small, labels=LABELS, guidance=1.0)
    compiled = generate_._generate._cache_size()
    generate(small, labels=LABELS, guidance=1.0)
    generate(small, labels=LABELS, guidance=2.5, steps=300, seed=9)
    generate(small, labels=LABELS, guidance=1.0, steps=40, first=17)
    assert generate_._generate._cache_size() == compiled


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"num": 0}, "num: 0"),
        ({"steps": 0}, "steps: 0"),
        ({"steps": MAX_STEPS + 1}, "steps"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"num_states": 0}, "num_states: 0"),
        ({"num_states": 13}, "first: 12"),
        ({"first": 13}, "first: 13"),
        ({"first": 0}, "first: 0"),
        ({"guidance": 1.0}, "without labels"),
        ({"guidance": float("nan"), "labels": LABELS}, "guidance: nan"),
        ({"labels": LABELS[:, :2]}, "labels: shape"),
        ({"labels": LABELS[:3]}, "labels: shape"),
        ({"z": np.zeros((7, 5), np.float32)}, "z: shape"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(small, wrong, says):
    with pytest.raises(InputError, match=says):
        generate(small, **wrong)


@pytest.mark.parametrize("where", [("score", "leave", "bias"), ("decoder", "leave", "bias")])
def test_what_is_not_finite_is_never_returned(small, where):
    network, layer, name = where
    params = jax.tree.map(lambda p: p, small[2])
    params[network] = {**params[network], layer: {**params[network][layer]}}
    params[network][layer][name] = params[network][layer][name].at[1].set(jnp.nan)
    with pytest.raises(DivergedError, match="sampling: a latent or pixel is not finite, with 12 steps"):
        generate(small, params=params)
