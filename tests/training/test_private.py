"""Training with differential privacy: whose images a step sees, what of their gradients it uses, what that tells."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import medvdm
from medvdm import data as data_
from medvdm.errors import InputError, MissingPackageError
from medvdm.models.vdm import VDMConfig
from medvdm.runs import config as config_
from medvdm.runs.run import load
from medvdm.runs.store import CARD, CONFIG, METRICS, SECRET, read_json, read_lines
from medvdm.training import loop, private
from medvdm.training import privacy_accounting as accounting
from medvdm.training import step as step_
from medvdm.training.batches import draw, private_batches, training_patients
from medvdm.training.step import TrainConfig, jit_step, new_state, private_gradient

TRAIN = TrainConfig(batch_size=6, warmup_steps=0, dp_noise=1.0, dp_clip=0.1)


# --- whose images


def people(images_of: tuple[int, ...]) -> data_.ImageData:
    """Patients with so many images each, in mixed order; an image's gray value tells its position."""
    who = np.repeat([f"p{i}" for i in range(len(images_of))], images_of)
    np.random.default_rng(0).shuffle(who)
    images = np.broadcast_to((np.arange(len(who)) / 100).astype(np.float32)[:, None, None], (len(who), 2, 2))
    return data_.from_arrays(images, np.arange(len(who)) % 2, patients=who, splits=["train"] * len(who))


def positions(images: np.ndarray) -> list[int]:
    return np.rint(100 * images[:, 0, 0, 0]).astype(int).tolist()


def test_each_draw_has_distinct_patients_and_one_image_of_each_all_as_likely() -> None:
    """4,000 draws of 2 of 4 patients: every pair of patients 1 in 6, every image of a patient 1 in their number."""
    data = people((1, 2, 3, 4))
    patients = training_patients(data, 2)
    assert sorted(map(len, patients)) == [1, 2, 3, 4]
    assert sorted(np.concatenate(patients)) == list(range(10))
    draws = np.array([draw(patients, 2, secret=2**63 + 1, step=k) for k in range(4000)])
    owners = np.array([next(i for i, own in enumerate(patients) if p in own) for p in draws.flat]).reshape(-1, 2)
    assert (owners[:, 0] != owners[:, 1]).all()
    pairs = np.bincount(owners.min(axis=1) * 4 + owners.max(axis=1), minlength=16)
    likely = np.array([len(draws) / 6 if a < b else 0 for a in range(4) for b in range(4)])
    assert (np.abs(pairs - likely) <= 4 * np.sqrt(likely * 5 / 6)).all()
    for own in patients:
        counts = np.array([(draws == p).sum() for p in own])
        expected = len(draws) / 2 / len(own)
        assert (np.abs(counts - expected) <= 4 * np.sqrt(expected)).all()
    # Independent of the step before: the same patient twice in a row with chance 1/2.
    again = np.mean([(owners[k] == owners[k + 1][:, None]).any(axis=0).mean() for k in range(len(owners) - 1)])
    assert abs(again - 0.5) < 4 * 0.5 / math.sqrt(2 * len(owners))


def test_batches_are_those_of_their_secret_and_number_from_any_start_and_for_any_rows() -> None:
    data = people((3,) * 9)
    whole = [positions(x) for x, _ in islice(private_batches(data, batch_size=4, secret=7), 8)]
    patients = training_patients(data, 4)
    assert whole == [draw(patients, 4, secret=7, step=k).tolist() for k in range(8)]
    late = [positions(x) for x, _ in islice(private_batches(data, batch_size=4, secret=7, start=5), 3)]
    assert late == whole[5:]
    halves = [islice(private_batches(data, batch_size=4, secret=7, rows=slice(a, a + 2)), 8) for a in (0, 2)]
    assert [positions(a) + positions(b) for (a, _), (b, _) in zip(*halves, strict=True)] == whole
    other = [positions(x) for x, _ in islice(private_batches(data, batch_size=4, secret=8), 8)]
    assert other != whole
    images, labels = next(private_batches(data, batch_size=4, secret=7, integers=True))
    assert images.dtype == np.uint8 and labels.argmax(axis=1).tolist() == [p % 2 for p in whole[0]]


def test_a_batch_of_more_images_than_patients_is_refused() -> None:
    with pytest.raises(InputError, match="batch_size: 5 with dp_noise; expected at most 4, the number of training pat"):
        private_batches(people((3,) * 4), batch_size=5, secret=0)


# --- the step


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.fixture(scope="module")
def problem(small: Any) -> tuple[Any, ...]:
    """The model, six images with labels, and the gradient of the private step as a function of images and key."""
    config, graph, params = small
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(size=(6, *config.image_shape)), jnp.float32)
    labels = jnp.asarray(np.eye(3, dtype=np.float32)[np.arange(6) % 3])

    @jax.jit
    def mean(images: jax.Array, key: jax.Array, clip: jax.Array, noise: jax.Array) -> Any:
        train = dataclasses.replace(TRAIN, dp_clip=1.0)
        # Numbers in the place of settings, so that all tests share one program.
        object.__setattr__(train, "dp_clip", clip)
        object.__setattr__(train, "dp_noise", noise)
        return private_gradient(graph, train, params, images, labels, key)

    return config, graph, params, images, labels, mean


def test_without_noise_and_clipping_it_is_the_mean_of_the_gradients_of_single_images(problem: Any) -> None:
    """The second route: a loop over images, each a batch of one, and the ordinary gradient."""
    _, graph, params, images, labels, mean = problem
    key = jax.random.key(3)
    found, metrics = mean(images, key, 1e9, 0.0)
    plain = jax.jit(lambda x, label, key: step_.gradient(graph, TRAIN, params, x, label, key))
    keys = jax.random.split(jax.random.fold_in(key, 4), 6)
    singles = [plain(images[i : i + 1], labels[i : i + 1], keys[i]) for i in range(6)]
    expected = np.mean([flat(gradient) for gradient, _ in singles], axis=0)
    np.testing.assert_allclose(flat(found), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert metrics.vlb_bpd == pytest.approx(np.mean([m.vlb_bpd for _, m in singles]), rel=1e-5)


def test_one_image_moves_the_clipped_sum_by_twice_the_norm_at_most(problem: Any) -> None:
    _, _, _, images, _, mean = problem
    key, clip, moves = jax.random.key(0), 0.05, []
    before = 6 * flat(mean(images, key, clip, 0.0)[0])
    assert np.linalg.norm(before) <= 6 * clip
    for other in (0.0, 1.0, 1e3, -1e6, images[1] ** 3):
        after = 6 * flat(mean(images.at[2].set(other), key, clip, 0.0)[0])
        moves.append(np.linalg.norm(after - before))
    assert max(moves) <= 2 * clip * (1 + 1e-4) and max(moves) > 0.5 * clip  # it is used, and far from unbounded
    free = [6 * flat(mean(images.at[2].set(x), key, 1e9, 0.0)[0]) for x in (0.0, 1e3)]
    assert np.linalg.norm(free[1] - free[0]) > 100 * clip  # what clipping holds back


def test_the_noise_has_the_deviation_asked_for_and_no_mean(problem: Any) -> None:
    _, _, _, images, _, mean = problem
    key, clip, noise = jax.random.key(1), 0.2, 3.0
    error = flat(mean(images, key, clip, noise)[0]) - flat(mean(images, key, clip, 0.0)[0])
    deviation, n = clip * noise / 6, error.size
    assert n > 1000
    assert abs(error.std() - deviation) < 4 * deviation / math.sqrt(2 * n)  # standard error of a deviation
    assert abs(error.mean()) < 4 * deviation / math.sqrt(n)
    other = flat(mean(images, jax.random.key(2), clip, noise)[0]) - flat(mean(images, jax.random.key(2), clip, 0.0)[0])
    assert abs(np.corrcoef(error, other)[0, 1]) < 4 / math.sqrt(n)  # each step has noise of its own


@pytest.mark.slow
def test_noise_and_draws_of_a_step_are_those_of_the_secret_and_the_seed_is_no_help() -> None:
    """With a secret, the setting seed changes nothing but the initial weights; all 64 bits of the secret count."""
    config = VDMConfig(
        image_shape=(2, 2, 1), latent=2, embedding_dim=2, encoder_width=2, decoder_width=2, inner_width=2,
        encoder_layers=0, decoder_layers=0, score_layers=1,
    )  # fmt: skip
    x = jnp.full((2, 2, 2, 1), 0.5)

    def after(secret: int, seed: int = 0) -> np.ndarray:
        train = dataclasses.replace(TRAIN, seed=seed)
        state = new_state(config, TRAIN)  # the weights of one seed
        return flat(jit_step(config, train, secret)(state, x, None)[0].params)

    secret = 2**63 + 12345
    np.testing.assert_array_equal(after(secret, seed=0), after(secret, seed=9))
    changed = [after(secret), after(secret + 1), after(secret ^ 2**62)]
    assert len({tuple(weights) for weights in changed}) == 3
    assert jit_step(config, TRAIN, secret).program is jit_step(config, TRAIN, 1).program
    assert private.new_secret() != private.new_secret()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dp_noise": -1.0}, "dp_noise: -1.0; expected 0 or more"),
        ({"dp_noise": math.inf}, "dp_noise: inf; expected a finite number"),
        ({"dp_clip": 0.0}, "dp_clip: 0.0; expected more than 0"),
        ({"dp_clip": -0.1}, "dp_clip: -0.1; expected 0 or more"),
    ],
)
def test_numbers_out_of_range_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TRAIN, **change)


def test_what_meets_images_without_noise_is_refused() -> None:
    with pytest.raises(InputError, match="dp_noise: 1.0 with architecture 'linear-start'; expected 0"):
        step_.check(VDMConfig(architecture="linear-start"), TRAIN)
    variance = dataclasses.replace(TRAIN, schedule_objective="variance")
    with pytest.raises(InputError, match="dp_noise: 1.0 with schedule_objective 'variance'; expected 'bound'"):
        step_.check(VDMConfig(schedule="monotonic"), variance)


# --- what it tells

RUN: dict[str, Any] = {"noise": 2.0, "batch": 64, "patients": 2000, "steps": 500, "delta": 2e-4}


def of_gaussians(mu: float, delta: float) -> float:
    """The exact epsilon of two Gaussians mu deviations apart, by bisection of Balle and Wang's delta (2018)."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    def excess(epsilon: float) -> float:
        below = math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu))
        return norm.cdf(mu / 2 - epsilon / mu) - below - delta

    return brentq(excess, 0.0, mu * mu / 2 + 20 * mu)


def by_library(kind: str, event: Any, delta: float) -> float:
    """What Google's accountants say of an event, for one record in the place of another."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    neighbours = dp_accounting.NeighboringRelation.REPLACE_ONE
    accountant = RdpAccountant if kind == "renyi" else PLDAccountant
    return accountant(neighboring_relation=neighbours).compose(event).get_epsilon(delta)


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (4.0, 10), (20.0, 100)])
def test_with_all_patients_in_each_batch_it_is_the_gaussian_mechanism(noise: float, steps: int) -> None:
    """k steps are one with means 2 sqrt(k) / z apart: exact, and what both of the library's accountants mean by it."""
    import dp_accounting as google

    delta = 1e-3
    exact = of_gaussians(2 * math.sqrt(steps) / noise, delta)
    found = accounting.epsilon(noise=noise, batch=50, patients=50, steps=steps, delta=delta)
    assert exact <= found <= exact + 2e-3  # an upper bound, to the grid of losses
    by_clip = by_library("pld", google.SelfComposedDpEvent(google.GaussianDpEvent(noise), steps), delta)
    by_distance = by_library("renyi", google.SelfComposedDpEvent(google.GaussianDpEvent(noise / 2), steps), delta)
    assert by_clip == pytest.approx(exact, abs=2e-3)
    assert exact < by_distance < 1.25 * exact
    wrong = by_library("renyi", google.SelfComposedDpEvent(google.GaussianDpEvent(noise), steps), delta)
    assert wrong < exact  # the units of one accountant in the other promise too much


@pytest.mark.parametrize("change", [{"noise": 5.0}, {"batch": 1000, "noise": 8.0, "steps": 100}])
def test_with_drawn_batches_it_lies_between_what_is_known_on_both_sides(change: dict[str, Any]) -> None:
    """Above what the worst data set of one kind gives away, below the library's Renyi bound and its own upper bound.

    All other patients at -C and one at +C instead of -C is a possible pair of sets: a step of it is N(0, 1) against
    (1 - q) N(0, 1) + q N(2/z, 1), which the library knows as the Poisson-sampled Gaussian of noise z/2 with a record
    removed or added.
    """
    import dp_accounting as google
    from dp_accounting.pld import PLDAccountant

    run = {**RUN, **change}
    z, m, n, k, delta = run.values()
    found = accounting.epsilon(**run)
    halved = google.GaussianDpEvent(z / 2)
    pair = google.SelfComposedDpEvent(google.PoissonSampledDpEvent(m / n, halved), k)
    below = PLDAccountant(google.NeighboringRelation.ADD_OR_REMOVE_ONE).compose(pair).get_epsilon(delta)
    event = google.SelfComposedDpEvent(google.SampledWithoutReplacementDpEvent(n, m, halved), k)
    truncated = google.SelfComposedDpEvent(google.TruncatedSubsampledGaussianDpEvent(n, 1.0, m, z), k)
    above = min(by_library("renyi", event, delta), by_library("pld", truncated, delta))
    assert 0.999 * below <= found <= above
    assert found < 1.35 * below  # and it is not far from what can happen


def test_one_step_is_the_profile_by_numerical_integration() -> None:
    """H(P | Q) of the two mixtures, the integral of max(0, p - e^eps q), from both sides."""
    z, q = 1.5, 0.3
    mu = 2 / z
    x = np.linspace(-12, 12 + mu, 400_001)

    def normal(mean: float) -> np.ndarray:
        return np.exp(-((x - mean) ** 2) / 2) / math.sqrt(2 * math.pi)

    mixture = (1 - q) * normal(0) + q * normal(mu)
    for epsilon in (0.0, 0.1, 0.5, 1.0, 2.0):
        integral = np.trapezoid(np.maximum(mixture - math.exp(epsilon) * normal(0), 0), x)
        assert accounting.profile(np.array(epsilon), mu=mu, q=q) == pytest.approx(integral, rel=1e-5, abs=1e-9)
        of_less = np.trapezoid(np.maximum(normal(0) - math.exp(-epsilon) * mixture, 0), x)
        assert accounting.profile(np.array(-epsilon), mu=mu, q=q) == pytest.approx(of_less, rel=1e-5)


def test_more_noise_and_delta_tell_less_and_more_steps_and_larger_batches_tell_more() -> None:
    base = accounting.epsilon(**RUN)
    for change in ({"noise": 2.5}, {"delta": 1e-3}, {"patients": 3000}):
        assert accounting.epsilon(**{**RUN, **change}) < base
    for change in ({"steps": 3000}, {"batch": 100}):
        assert accounting.epsilon(**{**RUN, **change}) > base
    assert accounting.epsilon(**{**RUN, "noise": 0.0}) == math.inf
    assert 1e3 < accounting.epsilon(**{**RUN, "noise": 0.05, "steps": 100}) < math.inf
    assert 0 < accounting.epsilon(**{**RUN, "noise": 1e4}) < 0.01


def test_the_noise_for_an_epsilon_gives_it() -> None:
    run = {**RUN, "steps": 100}
    del run["noise"]
    noise = accounting.noise_for(3.0, **run)
    assert 2.99 < accounting.epsilon(noise=noise, **run) <= 3.0
    with pytest.raises(InputError, match="target: 0.0; expected an epsilon between"):
        accounting.noise_for(0.0, **run)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"noise": -1.0}, "noise: -1.0"),
        ({"noise": math.nan}, "noise: nan"),
        ({"batch": 0}, "batch: 0; expected from 1 to 2000"),
        ({"batch": 2001}, "batch: 2001"),
        ({"steps": 0}, "steps: 0"),
        ({"delta": 0.0}, "delta: 0.0"),
        ({"delta": 1.0}, "delta: 1.0"),
    ],
)
def test_accounting_of_what_cannot_be_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        accounting.epsilon(**{**RUN, **change})


# --- a run

PRIVATE: dict[str, Any] = {"dp_noise": 1.0, "dp_clip": 0.2, "num_images": 100, "steps": 8}


@pytest.fixture
def same_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "new_secret", lambda: 2**63 + 5)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_lines(run / METRICS)]


def stopping_after(step: int) -> Callable[..., Any]:
    real = loop.train

    def train(*arguments: Any, hooks: loop.Hooks, **rest: Any) -> Any:
        return real(*arguments, hooks=dataclasses.replace(hooks, stop=lambda number: number == step), **rest)

    return train


@pytest.mark.slow
def test_a_run_goes_on_exactly_and_leaves_its_promise_and_no_secret(
    tmp_path: Path, same_secret: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, whole, parts = tiny.config(**PRIVATE), tmp_path / "whole", tmp_path / "parts"
    medvdm.fit(config, whole)
    said = capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", stopping_after(3))
        medvdm.fit(config, parts, progress=False)
    assert load(parts).step == 3
    assert int((parts / SECRET).read_text()) == 2**63 + 5
    assert os.stat(parts / SECRET).st_mode & 0o777 == 0o600
    assert str(2**63 + 5) not in (parts / CONFIG).read_text() + (parts / CARD).read_text()
    monkeypatch.setattr(private, "new_secret", lambda: 1)  # the secret is in the folder
    run = medvdm.fit(config, parts, resume=True, progress=False)
    assert losses(parts) == losses(whole)
    jax.tree.map(np.testing.assert_array_equal, run.params, load(whole).params)
    assert not (whole / SECRET).exists() and not (parts / SECRET).exists()

    record = read_json(whole / CONFIG)
    patients = record["data"]["counts"]["train"]["patients"]
    numbers = {"noise": 1.0, "batch": 8, "patients": patients, "steps": 8, "delta": patients**-1.1}
    assert record["privacy"] == {
        **numbers, "epsilon": accounting.epsilon(**numbers), "unit": "patient", "clip": 0.2,
    }  # fmt: skip
    short = f"differential privacy of each patient: epsilon {record['privacy']['epsilon']:.3g} at delta"
    card = (whole / CARD).read_text()
    assert short in said and short in card and "## Differential privacy" in card

    longer = config_.change(config, steps=10)
    medvdm.fit(longer, whole, resume=True, progress=False)
    extended = read_json(whole / CONFIG)["privacy"]
    assert extended["steps"] == 10 and extended["epsilon"] > record["privacy"]["epsilon"]
    assert not (whole / SECRET).exists()


def test_a_fresh_run_never_takes_an_old_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs with the same noise would give it away: their difference has none."""
    out = tmp_path / "run"
    out.mkdir()
    (out / SECRET).write_text("1\n")
    monkeypatch.setattr(loop, "train", stopping_after(2))
    medvdm.fit(tiny.config(**PRIVATE), out, progress=False)
    assert int((out / SECRET).read_text()) > 2**32


def test_a_run_without_noise_says_nothing_of_privacy(trained: Any) -> None:
    assert "privacy" not in json.loads((trained.path / CONFIG).read_text())
    assert "ifferential privacy" not in (trained.path / CARD).read_text()
    assert not (trained.path / SECRET).exists()


def test_a_run_is_refused_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    data = medvdm.from_arrays(np.random.default_rng(0).uniform(size=(60, 16, 16)), patients=["a", "b", "c"] * 20)
    with pytest.raises(InputError, match="batch_size: 8 with dp_noise; expected at most"):
        medvdm.fit(tiny.config(**PRIVATE), out, data=data, progress=False)
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(MissingPackageError, match=r"dp-accounting is not installed; pip install 'medvdm\[privacy\]'"):
        medvdm.fit(tiny.config(**PRIVATE), out, progress=False)
    assert not out.exists()
