r"""Was this image in the training set, or this person? Attacks that answer from what the model says of the image.

A model fits its training images more closely than others of the same law. Each attack gives every image a score,
higher for a likelier member, and is judged by how well the score tells members from others, of *other patients*:

* ``bound``: minus the bound of the image, in nats (Yeom et al., 2018: the loss);
* ``level``: minus the squared error of the predicted noise at one noise level (Matsumoto et al., 2023; Duan et al.,
  2023). Which level is chosen on one half of the patients, and the attack is judged on the other half;
* ``over_yardstick``: minus what the bound is above a yardstick that has not seen the training images, such as the
  entropy of the pixels or the file of a codec. It takes the difficulty of the image itself away (Watson et al., 2022);
* ``all_levels``: a logistic regression on the logarithms of the errors at all levels and the bound, above the
  yardstick where there is one. A sum of logarithms can say "a small error *for an image that is so hard at the other
  levels*". Each patient is scored by a regression that was fitted on other patients;
* ``likelihood_ratio``: against shadow models trained with and without the image (:func:`likelihood_ratio`).

The area under the ROC curve averages over everyone. The share of members found at a false positive rate of 1 % or
0.1 % says whether *somebody* is known with confidence (Carlini et al., 2022). The false positive rate is that of a
patient like the others: with n others, a score above all but k - 1 of them is as rare as k in n + 1. So
0.1 % needs 999 others.

Three questions differ by who is held against whom. Members against held-out images of other patients: was it trained
on? Images of *training patients that were not trained on* against held-out ones: does the model know the person?
Members against these: does it know the image beyond the person?
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from medvdm.errors import InputError
from medvdm.evaluation.held_out import by_batches, check_counts
from medvdm.evaluation.statistics import FOLDS, auc, logistic
from medvdm.models import cascade, vdm
from medvdm.theory import gaussian

# --- What the model says of an image ------------------------------------------------------------------------------


def level_losses(
    graph: nnx.GraphDef,
    params: vdm.Params,
    images: np.ndarray,
    *,
    gammas: Sequence[float] | np.ndarray,
    draws: int,
    seed: int,
    batch_size: int,
    labels: np.ndarray | None = None,
) -> np.ndarray:
    r"""The error of the predicted noise at each of L noise levels, (L, n) float64, dimensionless.

    .. math:: \frac{1}{D} \sum_{d=1}^{D} \frac{1}{\dim z} \|\epsilon_d - \hat\epsilon(z_d, \gamma)\|^2, \qquad
        z_d = \alpha f(x) + \sigma \epsilon_d

    All images have the same noise, so they differ by less noise than with draws of their own, and the value of an image
    does not depend on those beside it. Of a cascade it is the error of the stage of the whole image, which is
    given the image's own copy.

    Args:
        graph, params: the model.
        images: (n, h, w, c) as the model takes them: uint8, or float in [0, 1].
        gammas: L values of gamma = -log SNR, in the range of the model's schedule.
        draws: D, of noise at each level.
        seed: of the noise.
        batch_size: images at a time.
        labels: (n, k) multi-hot; None for the model without labels.

    Raises:
        InputError: draws or batch_size below 1, or a gamma outside of the schedule.
    """
    check_counts(draws, batch_size, seed)
    gammas = np.asarray(gammas, np.float32)
    low, high = np.asarray(vdm.merge(graph, params).gamma(jnp.array([0.0, 1.0])))
    for gamma in gammas:
        if not low - 1e-4 <= gamma <= high + 1e-4:
            raise InputError(f"gammas: {gamma:g}; expected {low:g} to {high:g}, the model's schedule")
    keys = jax.random.split(jax.random.key(seed), (len(gammas), draws))

    def each(params: vdm.Params, _: np.ndarray, x: Array, labels: Array | None, key: Array) -> np.ndarray:
        return jax.device_get(_level_errors(params, x, labels, gammas, keys, graph=graph)).astype(np.float64)

    read = partial(_rows, images, labels)
    return by_batches(read, len(images), each, params, batch_size=batch_size, seed=seed)


@partial(jax.jit, static_argnames=("graph",))
def _level_errors(
    params: vdm.Params, x: Array, labels: Array | None, gammas: Array, keys: Array, *, graph: nnx.GraphDef
) -> Array:
    """(L, n): mean squared error of the predicted noise over draws (L, D), the same for all images.

    The image is encoded once, so that all draws on a latent cost little more than one.
    """
    model, x = cascade.stages(vdm.merge(graph, params), x)[-1][:2]
    f, embedded = model.encode(x), model.embed(labels, n=len(x))

    def one(gamma: Array, key: Array) -> Array:
        eps = jnp.broadcast_to(jax.random.normal(key, f.shape[1:])[None], f.shape)
        times = jnp.full(len(f), gamma)
        z = gaussian.diffuse(f, eps, gaussian.align(times, f))
        error = eps - model.eps_hat(z, model.condition(times, embedded))
        return jnp.mean(jnp.square(error), axis=tuple(range(1, f.ndim)))

    def level(gamma_and_keys: tuple[Array, Array]) -> Array:
        gamma, of_draws = gamma_and_keys
        return jnp.mean(jax.lax.map(lambda key: one(gamma, key), of_draws), axis=0)

    return jax.lax.map(level, (gammas, keys))


def bounds(
    graph: nnx.GraphDef,
    params: vdm.Params,
    images: np.ndarray,
    *,
    draws: int,
    seed: int,
    batch_size: int,
    labels: np.ndarray | None = None,
) -> np.ndarray:
    """The negative bound of each image in nats, (n,) float64: the mean over draws, the same times and noise for all.

    The times are spread evenly. Arguments and errors as of :func:`level_losses`; of a cascade it is the whole bound.
    """
    check_counts(draws, batch_size, seed)
    key_time, key_noise = jax.random.split(jax.random.key(seed))
    times = (jnp.arange(draws) + jax.random.uniform(key_time, ())) / draws
    keys = jax.random.split(key_noise, draws)

    def each(params: vdm.Params, _: np.ndarray, x: Array, labels: Array | None, key: Array) -> np.ndarray:
        totals = [_total(params, x, labels, time, noise, graph=graph) for time, noise in zip(times, keys, strict=True)]
        return np.mean(np.stack(jax.device_get(totals)).astype(np.float64), axis=0)

    read = partial(_rows, images, labels)
    return by_batches(read, len(images), each, params, batch_size=batch_size, seed=seed)


@partial(jax.jit, static_argnames=("graph",))
def _total(
    params: vdm.Params, x: Array, labels: Array | None, time: Array, key: Array, *, graph: nnx.GraphDef
) -> Array:
    """(n,): the negative bound by one draw, each image as a batch of its own with the same key."""
    model = vdm.merge(graph, params)

    def one(x: Array, labels: Array | None) -> Array:
        labels = None if labels is None else labels[None]
        return cascade.terms(model, x[None], labels, key=key, times=time[None]).total[0]

    return jax.vmap(one)(x, labels)


def _rows(images: np.ndarray, labels: np.ndarray | None, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    return images[rows], None if labels is None else np.asarray(labels[rows], np.float32)


# --- Shadow models ------------------------------------------------------------------------------------------------

FEW = 16  #: shadow models with (or without) an image, below which all images share one variance


def likelihood_ratio(target: np.ndarray, shadows: np.ndarray, inside: np.ndarray) -> np.ndarray:
    r"""The likelihood-ratio attack, LiRA: (n,) scores, higher for a likelier member.

    .. math:: \log N(s;\ \mu_{in}, \sigma_{in}^2) - \log N(s;\ \mu_{out}, \sigma_{out}^2)

    for an image's score s under the audited model, with mean and variance of its scores under shadow models that were
    trained with it and without it. So an image is compared with itself, and an easy one is no member for being easy.
    Where fewer than :data:`FEW` models of a kind have an image, its variance of that kind is the mean over all images.

    Without any model that was trained with the image it is the one-sided form, :math:`-\log \Pr[S_{out} \ge s]`; with
    no model trained without it, :math:`\log \Pr[S_{in} \le s]`. These are on another scale than the ratio: a set where
    some images have both kinds and others have not is ranked less well than it could be.

    Shadow models that are trained on parts of the same pool of images as the audited model tell the attacker about the
    rest of the pool, too: of halves of a pool, the fitted means vary half as much as with fresh images. So this is
    the attack of somebody who holds all candidates, which is much to ask for.

    Args:
        target: (n,) scores under the audited model, such as minus the bound.
        shadows: (S, n) scores under the shadow models.
        inside: (S, n) whether the model was trained on the image.

    Raises:
        InputError: shapes that do not fit together, scores that are not finite, or too few shadow models for any
            variance.

    Source: Carlini et al., "Membership inference attacks from first principles" (2022).
    """
    from scipy.special import log_ndtr

    target, shadows, inside = np.asarray(target, np.float64), np.asarray(shadows, np.float64), np.asarray(inside, bool)
    if shadows.shape != inside.shape or shadows.ndim != 2 or target.shape != shadows.shape[1:]:
        raise InputError(f"shadows: shape {shadows.shape}; expected (S, {target.size}), as inside has {inside.shape}")
    if not (np.isfinite(target).all() and np.isfinite(shadows).all()):
        raise InputError("shadows: scores that are not finite; expected finite ones, of target too")
    z_in, deviation_in, has_in = _standardised(target, shadows, inside)
    z_out, deviation_out, has_out = _standardised(target, shadows, ~inside)
    if not (has_in | has_out).all():
        raise InputError(f"shadows: {len(shadows)} models; expected at least 2 with, or 2 without, some of the images")
    both = (z_out**2 - z_in**2) / 2 + np.log(deviation_out / deviation_in)
    return np.where(has_in & has_out, both, np.where(has_out, -log_ndtr(-z_out), log_ndtr(z_in)))


def _standardised(
    target: np.ndarray, shadows: np.ndarray, which: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The scores in deviations from their mean under the models of a kind; the deviations; where there are any."""
    count = which.sum(axis=0)
    mean = np.where(which, shadows, 0).sum(axis=0) / np.maximum(count, 1)
    squares = np.where(which, shadows - mean, 0) ** 2
    freedom = np.maximum(count - 1, 0)
    pooled = squares.sum() / max(freedom.sum(), 1)
    variance = np.where(count >= FEW, squares.sum(axis=0) / np.maximum(freedom, 1), pooled)
    deviation = np.sqrt(np.maximum(variance, 1e-24))
    return (target - mean) / deviation, deviation, (count > 0) & (freedom.sum() > 0)


# --- How well a score tells ---------------------------------------------------------------------------------------

LEAST = 4  #: patients of a group, at least
RESAMPLES = 500  #: of the patients, for the intervals of true positive rates
RATES = {"tpr_at_1pct_fpr": 0.01, "tpr_at_01pct_fpr": 0.001}  #: keys of :func:`attack` and their false positive rates
_ROC = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, *np.linspace(0.1, 0.9, 9).round(1).tolist())


def attack(
    scores: np.ndarray,
    member: np.ndarray,
    patients: Sequence[str] | np.ndarray,
    *,
    seed: int = 0,
    stretch: float = 1.0,
) -> dict[str, Any]:
    """How well a score tells members from others, as JSON takes it.

    Args:
        scores: (n,) higher for a likelier member.
        member: (n,) bool.
        patients: n names. A patient may have images of both kinds.
        seed: of the resamples.
        stretch: what the error of the AUC is multiplied by.

    Returns:
        ``members`` and ``others``, their numbers; ``auc`` with ``auc_interval``, 95 %, clustered by patient;
        ``tpr_at_1pct_fpr`` and ``tpr_at_01pct_fpr`` (0.1 %) with their ``_interval``, percentiles over resamples of the
        patients, and ``_needs``: None, or the least number of others where there are too few and the rate is None;
        ``roc``, pairs of false and true positive rate. Then ``patients``, the same of the mean score of each
        patient's images of a kind. Where every image is told apart, or none is found, an interval ends where m unlike
        outcomes of m patients would have a chance of 2.5 %, m patients being the smaller group. The interval of a rate
        starts at 0 where the chance is above 2.5 % that none of so many others has a score that is as rare (fewer than
        368 at 1 %, 3688 at 0.1 %).

    Raises:
        InputError: arrays that do not fit together, scores that are not finite, or fewer than :data:`LEAST` patients of
            a kind.
    """
    scores, member = np.asarray(scores, np.float64), np.asarray(member, bool)
    _, patient = np.unique(np.asarray(patients), return_inverse=True)
    if not scores.shape == member.shape == patient.shape:
        raise InputError(f"scores: shape {scores.shape}; expected {member.shape}, with {patient.size} patients")
    of_each = [len(set(patient[member == kind].tolist())) for kind in (True, False)]
    if min(of_each) < LEAST:
        raise InputError(f"patients: {of_each[0]} of members, {of_each[1]} of others; expected at least {LEAST} each")
    _, first, pair = np.unique(2 * patient + member, return_index=True, return_inverse=True)
    means = np.bincount(pair, scores) / np.bincount(pair)
    return {
        **_told(scores, member, patient, seed, stretch),
        "patients": _told(means, member[first], patient[first], seed, stretch),
    }


def _told(
    scores: np.ndarray, member: np.ndarray, patient: np.ndarray, seed: int, stretch: float = 1.0
) -> dict[str, Any]:
    area = auc(scores, member, patient)
    fewest = min(len(set(patient[member == kind].tolist())) for kind in (True, False))
    others = int((~member).sum())
    half = 1.96 * area.stderr * stretch
    found: dict[str, Any] = {
        "members": int(member.sum()),
        "others": others,
        "auc": area.value,
        "auc_interval": _widened(area.value, area.value - half, area.value + half, fewest),
    }
    weights = _resamples(member, patient, seed)
    for name, fpr in RATES.items():
        needs = math.ceil(1 / fpr - 1)
        enough = others >= needs
        value = float(_rates(scores, member, np.ones((1, len(scores))), fpr)[0]) if enough else None
        interval = None
        if enough:
            low, high = np.quantile(_rates(scores, member, weights, fpr), (0.025, 0.975))
            # A threshold of this rate may be above all others that were seen, and no resample goes beyond these.
            low = 0.0 if (1 - fpr) ** others > 0.025 else low
            interval = _widened(value, low, high, fewest)
        found |= {name: value, f"{name}_interval": interval, f"{name}_needs": None if enough else needs}
    above = [scores > threshold for threshold in np.quantile(scores[~member], 1 - np.array(_ROC), method="higher")]
    found["roc"] = [[float(one[~member].mean()), float(one[member].mean())] for one in above]
    return found


def _widened(value: float, low: float, high: float, patients: int) -> list[float]:
    """An interval inside [0, 1]; at a value of 0 or 1, where no error can be estimated, by the exact binomial."""
    beyond = 1 - 0.025 ** (1 / patients)
    low = min(low, 1 - beyond) if value == 1 else low
    high = max(high, beyond) if value == 0 else high
    return [max(0.0, float(low)), min(1.0, float(high))]


def _resamples(member: np.ndarray, patient: np.ndarray, seed: int) -> np.ndarray:
    """(RESAMPLES, n): how often each image is drawn when patients are, those with members and with others apart."""
    rng, people = np.random.default_rng(seed), patient.max() + 1
    kind = np.zeros(people, int)
    np.bitwise_or.at(kind, patient, np.where(member, 2, 1))
    drawn = np.zeros((RESAMPLES, people))
    for value in np.unique(kind):
        of_kind = np.flatnonzero(kind == value)
        drawn[:, of_kind] = rng.multinomial(len(of_kind), np.full(len(of_kind), 1 / len(of_kind)), size=RESAMPLES)
    return drawn[:, patient]


def _rates(scores: np.ndarray, member: np.ndarray, weights: np.ndarray, fpr: float) -> np.ndarray:
    """(R,): weighted share of members above the k-th of the others, k = fpr (others + 1); a tie is not above."""
    (ones, w_ones), (others, w_others) = (
        (scores[kind][order := np.argsort(-scores[kind])], np.cumsum(weights[:, kind][:, order], axis=1))
        for kind in (member, ~member)
    )
    allowed = np.maximum(np.floor(fpr * (w_others[:, -1:] + 1) + 1e-9), 1)
    threshold = others[np.sum(w_others < allowed, axis=1)]
    above = np.searchsorted(-ones, -threshold)
    found = np.where(above > 0, w_ones[np.arange(len(weights)), above - 1], 0)
    return found / w_ones[:, -1]


# --- All attacks --------------------------------------------------------------------------------------------------

QUESTIONS = {  #: groups that are told apart, by the key of :func:`membership`
    "member_vs_held_out": ("member", "held_out"),
    "other_day_vs_held_out": ("other_day", "held_out"),
    "member_vs_other_day": ("member", "other_day"),
}
HEADLINE = "member_vs_held_out", "all_levels"  #: fixed before any result was seen
#: On the error of an AUC whose classifiers were fitted on one another's images. Where there is nothing to find, two
#: folds that differ by chance in the same way both look better than chance, and in opposite ways both look worse. So
#: they do not err independently, and the error is 1.3 to 1.5 times that of given classifiers, in simulations.
STRETCH = 1.5
_TOP = ("auc", "auc_interval", "tpr_at_1pct_fpr", "tpr_at_1pct_fpr_interval")


def membership(
    losses: np.ndarray,
    bound: np.ndarray,
    group: Sequence[str] | np.ndarray,
    patients: Sequence[str] | np.ndarray,
    *,
    gammas: Sequence[float] | np.ndarray,
    yardstick: np.ndarray | None = None,
    ratio: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """All attacks of this module on all three questions, as JSON takes it.

    Args:
        losses: (L, n) from :func:`level_losses`.
        bound: (n,) from :func:`bounds`, nats.
        group: n of 'member' (trained on), 'held_out' (another patient) and 'other_day' (of a training patient, but not
            trained on).
        patients: n names.
        gammas: the L levels.
        yardstick: (n,) what each image costs something that has not seen the training images, nats:
            :func:`medvdm.evaluation.held_out.entropy` for a Bernoulli likelihood, a codec's file for gray values.
        ratio: (n,) from :func:`likelihood_ratio`, where there are shadow models.
        seed: of folds and resamples.

    Returns:
        ``auc``, ``auc_interval``, ``tpr_at_1pct_fpr`` and ``tpr_at_1pct_fpr_interval`` of the :data:`HEADLINE`;
        ``headline``, which that is; ``gammas``; ``notes``; and for each of :data:`QUESTIONS` the attacks ``bound``,
        ``over_yardstick``, ``level`` (with its ``gamma``), ``all_levels`` and ``likelihood_ratio``, each as
        :func:`attack` returns it. None where a group lacks patients, or no yardstick or ratios are given. The error of
        the AUC of ``all_levels`` is stretched by :data:`STRETCH`; the intervals of its rates take the regressions as
        given.

    Raises:
        InputError: arrays that do not fit together, an unknown group, or numbers that are not finite.
    """
    losses, bound = np.asarray(losses, np.float64), np.asarray(bound, np.float64)
    group, patients, gammas = np.asarray(group), np.asarray(patients), np.asarray(gammas, np.float64)
    given = {"yardstick": yardstick, "ratio": ratio}
    given = {name: np.asarray(values, np.float64) for name, values in given.items() if values is not None}
    _check(losses, bound, group, patients, gammas, given)
    result: dict[str, Any] = {**dict.fromkeys(_TOP), "headline": list(HEADLINE), "gammas": gammas.tolist()}
    notes = []
    for question, (one, other) in QUESTIONS.items():
        people = {name: len(set(patients[group == name].tolist())) for name in (one, other)}
        if min(people.values()) < LEAST:
            found = ", ".join(f"{count} patients of '{name}'" for name, count in people.items())
            notes.append(f"{question}: {found}; needs at least {LEAST} of each")
            result[question] = None
            continue
        rows = (group == one) | (group == other)
        scores = {name: values[rows] for name, values in given.items()}
        result[question] = _attacks(
            losses[:, rows], bound[rows], group[rows] == one, patients[rows], gammas, scores, seed
        )
    question, name = HEADLINE
    if result[question]:
        result |= {key: result[question][name][key] for key in _TOP}
    return {**result, "notes": notes}


def _check(
    losses: np.ndarray,
    bound: np.ndarray,
    group: np.ndarray,
    patients: np.ndarray,
    gammas: np.ndarray,
    given: dict[str, np.ndarray],
) -> None:
    n = len(bound)
    if losses.shape != (len(gammas), n) or not len(gammas):
        raise InputError(f"losses: shape {losses.shape}; expected {(len(gammas), n)}, levels and images")
    for name, values in {"group": group, "patients": patients, **given}.items():
        if len(values) != n:
            raise InputError(f"{name}: {len(values)} entries; expected {n}, one per image")
    unknown = set(group.tolist()) - {"member", "held_out", "other_day"}
    if unknown:
        raise InputError(f"group: '{min(unknown)}'; expected 'member', 'held_out' or 'other_day'")
    for name, values in {"losses": losses, "bound": bound, **given}.items():
        if not np.isfinite(values).all():
            raise InputError(f"{name}: numbers that are not finite; expected finite ones")


def _attacks(
    losses: np.ndarray,
    bound: np.ndarray,
    member: np.ndarray,
    patients: np.ndarray,
    gammas: np.ndarray,
    given: dict[str, np.ndarray],
    seed: int,
) -> dict[str, Any]:
    judged = partial(attack, member=member, patients=patients, seed=seed)
    above = bound - given.get("yardstick", 0.0)
    features = np.column_stack([np.log(np.maximum(losses, 1e-30)).T, above])
    return {
        "bound": judged(-bound),
        "over_yardstick": judged(-above) if "yardstick" in given else None,
        "level": _best_level(losses, member, patients, gammas, seed),
        "all_levels": judged(_cross_fitted(features, member, patients, seed), stretch=STRETCH),
        "likelihood_ratio": judged(given["ratio"]) if "ratio" in given else None,
    }


def _best_level(
    losses: np.ndarray, member: np.ndarray, patients: np.ndarray, gammas: np.ndarray, seed: int
) -> dict[str, Any] | None:
    """The attack by the level that is best on one half of the patients, on the other half; None with too few."""
    chosen_on = _folds(member, patients, 2, seed) == 0
    judged_on = ~chosen_on
    if min(len(set(patients[judged_on & (member == kind)].tolist())) for kind in (True, False)) < LEAST:
        return None
    best = int(np.argmax([auc(-one[chosen_on], member[chosen_on]).value for one in losses]))
    found = attack(-losses[best][judged_on], member[judged_on], patients[judged_on], seed=seed)
    return {"gamma": float(gammas[best]), **found}


def _cross_fitted(features: np.ndarray, member: np.ndarray, patients: np.ndarray, seed: int) -> np.ndarray:
    """(n,): log odds of each image by a regression on other patients.

    Each regression's odds are counted from the middle between its two kinds. Its own zero moves with their shares among
    its training images, and so against those of the fold that it scores: pooled, that would look like less than chance.
    """
    fold = _folds(member, patients, FOLDS, seed)
    scores = np.empty(len(features))
    for number in np.unique(fold):
        out = fold == number
        log_odds = logistic(features[~out], member[~out].astype(float))
        fitted = log_odds(features[~out])
        middle = (fitted[member[~out]].mean() + fitted[~member[~out]].mean()) / 2
        scores[out] = log_odds(features[out]) - middle
    return scores


def _folds(member: np.ndarray, patients: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """(n,): a fold for each image, by patient; each kind of patient (members, others, both) is dealt out evenly."""
    rng = np.random.default_rng(seed)
    ones, others = set(patients[member].tolist()), set(patients[~member].tolist())
    dealt: list[Any] = []
    for kind in (ones & others, ones - others, others - ones):
        dealt += rng.permutation(sorted(kind)).tolist()
    place = {name: number % folds for number, name in enumerate(dealt)}
    return np.array([place[name] for name in patients.tolist()])
