r"""The optimiser, the training state and one training step. The loop around it is in :mod:`medvdm.training.loop`.

The learning rate is the product of a linear warm-up and a cosine decay,

.. math::
    \eta(k) = \eta_{peak} \cdot \min(k / W, 1) \cdot
        \left[ a + (1 - a) \tfrac12 \left(1 + \cos \frac{\pi k}{K}\right) \right]

with W = 250 warm-up steps, K the number of steps of the run and a = 1e-5 (paper, section 2). It multiplies the
*update*, after Adam. Scaling the gradient before Adam, as the text can be read, is undone by Adam's normalisation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Num

from medvdm.errors import InputError, nearest
from medvdm.models import cascade, vdm
from medvdm.models.unet import least_side
from medvdm.theory import bound, schedules
from medvdm.training import augmentation, private, schedule_variance

OBJECTIVES = ("bound", "variance")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the model is trained."""

    steps: int = 20_000
    """Optimiser steps; also the length of the cosine."""
    batch_size: int = 1
    """Images per step, over all devices and processes."""
    seed: int = 0
    """Seed of the initial weights, the order of the images, the times and the noise."""
    learning_rate: float = 8e-4
    """Peak learning rate."""
    warmup_steps: int = 250
    """Steps of linear warm-up from 0."""
    final_fraction: float = 1e-5
    """The cosine ends at this fraction of the peak."""
    b1: float = 0.9
    """AdamW's decay of the first moment."""
    b2: float = 0.99
    """AdamW's decay of the second moment."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 1e-4
    """AdamW's decoupled weight decay."""
    clip_norm: float = 0.0
    """Clip the global norm of the gradient (of bits per dimension) to this; 0 is off."""
    dp_noise: float = 0.0
    """Differential privacy of patients: noise on the summed gradients, as a multiple of dp_clip; 0 is off."""
    dp_clip: float = 0.1
    """Norm that the gradient of each patient (of bits per dimension) is clipped to with dp_noise."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average of the weights, short for the first steps; 0 is off."""
    label_dropout: float = 0.1
    """Fraction of labels replaced by the null during training (conditional models only)."""
    gradient_difference_weight: float = 0.0
    """Weight of the paper's image-gradient-difference term, in nats per unit of squared gray difference."""
    noise_weight: float = 0.0
    r"""w of the weight :math:`1 + w \sigma_t^2` on the diffusion loss in training: more for the noisy times, which
    decide about the whole of an image and cost few bits. Rising with the noise as it does, it makes the loss a mean of
    bounds of the images with noise added (Kingma & Gao, 2023); the bound that is reported is that of the images."""
    augment_shift: float = 0.0
    """Standard deviation of random shifts of the training images, as a fraction of their side; 0 is off."""
    augment_size: float = 0.0
    """Standard deviation of the log of a random change of size; 0 is off."""
    crop: int = 0
    """Side in pixels of the square that is cut out of each training image at random (U-Nets only); 0 is the whole."""
    augment_exposure: float = 0.0
    """Standard deviation of the log of a random exponent on gray values; 0 is off."""
    basis_copies: int = 0
    """Augmented copies of each training image that the components of a 'linear-start' model are measured on."""
    stratified_times: bool = True
    """Spread the times of a batch evenly (the paper's antithetic sampling) instead of drawing each on its own."""
    schedule_objective: Literal["bound", "variance"] = "bound"
    """What trains the interior of a monotonic schedule. The ends, if learned, are always trained by the bound."""
    schedule_rate: float = 1.0
    """Learning rate of a learned schedule, as a multiple of the networks'."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{field.name}: {value}; expected a finite number")
            if not isinstance(value, str) and value < 0:
                raise InputError(f"{field.name}: {value}; expected 0 or more")
        if self.seed >= 2**31:
            raise InputError(f"seed: {self.seed}; expected less than {2**31}")
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)}; expected at least 1")
        if self.dp_clip == 0:
            raise InputError("dp_clip: 0.0; expected more than 0")
        for name in ("b1", "b2", "ema_decay"):
            if getattr(self, name) >= 1:
                raise InputError(f"{name}: {getattr(self, name)}; expected less than 1")
        for name in ("label_dropout", "final_fraction"):
            if getattr(self, name) > 1:
                raise InputError(f"{name}: {getattr(self, name)}; expected a fraction from 0 to 1")
        if self.schedule_objective not in OBJECTIVES:
            raise InputError(
                f"schedule_objective: '{self.schedule_objective}'; {nearest(self.schedule_objective, OBJECTIVES)}"
            )


def check(model: vdm.VDMConfig, config: TrainConfig) -> None:
    """Raise InputError where the schedule's objective, crops, augmentation, loss or privacy do not fit the model."""
    if config.crop:
        if not vdm.ARCHITECTURES[model.architecture].any_size:
            raise InputError(f"crop: {config.crop} with architecture '{model.architecture}'; expected 'unet'")
        if config.crop < (least := least_side(model.scales, model.patch)):
            raise InputError(f"crop: {config.crop}; expected at least {least}, the smallest side that the U-Net takes")
        if model.reduce and config.crop % model.reduce:
            raise InputError(f"crop: {config.crop}; expected a multiple of reduce, {model.reduce}")
    if model.integers:
        for name in ("augment_size", "augment_exposure", "gradient_difference_weight"):
            if getattr(config, name):
                raise InputError(
                    f"{name}: {getattr(config, name)} with architecture '{model.architecture}'; expected 0, since its "
                    "8-bit likelihood is of whole gray values"
                )
    if config.noise_weight and schedules.KINDS[model.schedule].learned:
        raise InputError(
            f"noise_weight: {config.noise_weight} with schedule '{model.schedule}'; expected 0, since a learned "
            "schedule follows the bound"
        )
    if config.schedule_objective == "variance" and (model.schedule != "monotonic" or model.timesteps):
        raise InputError(
            f"schedule_objective: 'variance' with schedule '{model.schedule}' and timesteps {model.timesteps}; "
            "expected schedule 'monotonic' in continuous time (timesteps 0)"
        )
    if config.dp_noise and vdm.ARCHITECTURES[model.architecture].measures_components:
        raise InputError(
            f"dp_noise: {config.dp_noise} with architecture '{model.architecture}'; expected 0, since its components "
            "are measured on the training images without noise"
        )
    if config.dp_noise and config.schedule_objective == "variance":
        raise InputError(
            f"dp_noise: {config.dp_noise} with schedule_objective 'variance'; expected 'bound', since that gradient is "
            "no sum over images"
        )


class TrainState(NamedTuple):
    """Everything that changes during training. ``ema`` is None when the average is off.

    ``params`` and ``ema`` hold the measured parts of a model too; ``opt_state`` is of the trained ones only.
    """

    step: Int[Array, ""]
    params: vdm.Params
    opt_state: optax.OptState
    ema: vdm.Params | None


class Metrics(NamedTuple):
    """What a step reports: means over the batch, in bits per dimension, before the update."""

    reconstruction_bpd: Float[Array, ""]
    diffusion_bpd: Float[Array, ""]
    latent_bpd: Float[Array, ""]
    vlb_bpd: Float[Array, ""]
    loss: Float[Array, ""]


class Plan(NamedTuple):
    """The numbers that a compiled step takes as an argument: runs that differ in these only share one program.

    ``secret`` is the key that takes the seed's place for all that a step draws, see :mod:`medvdm.training.private`.
    """

    seed: int
    steps: int
    learning_rate: float
    warmup_steps: int
    final_fraction: float
    secret: np.ndarray | None = None


_NUMBERS = Plan._fields[:-1]  # those that are settings


def plan_of(config: TrainConfig, secret: int | None = None) -> Plan:
    """The plan of a config."""
    key_data = None if secret is None else private.key_data(secret)
    return Plan(*(getattr(config, name) for name in _NUMBERS), secret=key_data)


def learning_rate(config: TrainConfig | Plan) -> optax.Schedule:
    r"""The learning rate as a function of the step k.

    .. math:: \eta_{peak} \min(k / W, 1) \left[ a + (1 - a) \tfrac12 (1 + \cos(\pi k / K)) \right]
    """

    def rate(k: Int[Array, ""] | int) -> Float[Array, ""]:
        warmup = jnp.where(config.warmup_steps > 0, jnp.minimum(k / jnp.maximum(config.warmup_steps, 1), 1.0), 1.0)
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.minimum(k, config.steps) / config.steps))
        return config.learning_rate * warmup * (config.final_fraction + (1.0 - config.final_fraction) * cosine)

    return rate


def optimiser(
    config: TrainConfig, *, learned_schedule: bool = False, rate: optax.Schedule | None = None
) -> optax.GradientTransformation:
    """AdamW with the learning rate after it (``rate``, or the config's own), and clipping before it when asked for.

    The parameters of a learned noise schedule are a group of their own. They have their own rate and no weight decay,
    for 0 is no better a place for them than another; nor do they count in the clipped norm, which has another unit.
    """

    def networks(params: vdm.Params) -> dict[str, bool]:
        return {name: name != "schedule" for name in params}

    def schedule(params: vdm.Params) -> dict[str, bool]:
        return {name: name == "schedule" for name in params}

    clip = optax.clip_by_global_norm(config.clip_norm)
    adamw = optax.adamw(
        rate or learning_rate(config),
        b1=config.b1,
        b2=config.b2,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        mask=networks if learned_schedule else None,
    )
    if not learned_schedule:
        return optax.chain(clip, adamw) if config.clip_norm else adamw
    parts = [optax.masked(clip, networks)] if config.clip_norm else []
    return optax.chain(*parts, adamw, optax.masked(optax.scale(config.schedule_rate), schedule))


def _optimiser(model: vdm.VDMConfig, config: TrainConfig, plan: Plan) -> optax.GradientTransformation:
    learned = schedules.KINDS[model.schedule].learned
    return optimiser(config, learned_schedule=learned, rate=learning_rate(plan))


def init_state(model: vdm.VDMConfig, config: TrainConfig, seed: Int[Array, ""] | int | None = None) -> TrainState:
    """The state at step 0; a pure function of the two configs and a seed (the config's own if None)."""
    params = vdm.new_params(model, config.seed if seed is None else seed)
    ema = jax.tree.map(jnp.copy, params) if config.ema_decay else None
    trained, _ = vdm.partition(vdm.graph_of(model), params)
    return TrainState(jnp.zeros((), jnp.int32), params, _optimiser(model, config, plan_of(config)).init(trained), ema)


def augmentations(config: TrainConfig) -> dict[str, float]:
    """The settings of :func:`medvdm.training.augmentation.augment`."""
    return {"shift": config.augment_shift, "size": config.augment_size, "exposure": config.augment_exposure}


def loss_fn(
    model: vdm.VDM,
    config: TrainConfig,
    images: Num[Array, "n h w c"],
    labels: Float[Array, "n k"] | None,
    key: jax.Array,
    probe: bound.Probe | None = None,
) -> tuple[Float[Array, ""], tuple[Metrics, bound.Bound]]:
    """The training loss: the mean over the batch in bits per dimension, of a crop of each image where asked for.

    Returns:
        The loss; what a step reports; and the terms behind it (those of the last stage), one value per image, in nats.
    """
    key_bound, key_dropout = jax.random.split(key)
    keep = None
    if model.config.classes:
        keep = 1.0 - jax.random.bernoulli(key_dropout, config.label_dropout, (images.shape[0],)).astype(jnp.float32)
    parts = cascade.stages(model, images, crop=config.crop, key=jax.random.fold_in(key, 3))
    every = cascade.stage_terms(
        parts,
        labels,
        key=key_bound,
        keep=keep,
        stratified=config.stratified_times,
        with_gradient_difference=config.gradient_difference_weight > 0,
        probe=probe,
    )
    terms = every[-1]

    def bpd(name: str) -> Float[Array, ""]:
        nats = [jnp.mean(getattr(one, name)) for one in every]
        return sum(bound.bits_per_dim(n, (part.pixels,)) for n, part in zip(nats, parts, strict=True))

    reconstruction, prior, diffusion = bpd("reconstruction"), bpd("prior"), bpd("diffusion")
    vlb = reconstruction + prior + diffusion
    loss = vlb + config.gradient_difference_weight * bpd("gradient_difference")
    if config.noise_weight:
        loss += config.noise_weight * sum(
            bound.bits_per_dim(jnp.mean(jax.nn.sigmoid(part.model.gamma(one.times)) * one.diffusion), (part.pixels,))
            for one, part in zip(every, parts, strict=True)
        )
    return loss, (Metrics(reconstruction, diffusion, prior, vlb, loss), terms)


def gradient(
    graph: nnx.GraphDef,
    config: TrainConfig,
    params: vdm.Params,
    images: Num[Array, "n h w c"],
    labels: Float[Array, "n k"] | None,
    key: jax.Array,
) -> tuple[vdm.Params, Metrics]:
    """What the optimiser gets, from one backward pass, and what a step reports; for the trained ``params`` only.

    It is the gradient of :func:`loss_fn`, but with the objective 'variance' the interior of the schedule gets that of
    the spread of the diffusion loss (:mod:`medvdm.training.schedule_variance`) instead.
    """
    n = images.shape[0]
    trained, measured = vdm.partition(graph, params)

    def loss(trained: vdm.Params, probe: bound.Probe | None) -> tuple[Float[Array, ""], tuple[Metrics, bound.Bound]]:
        return loss_fn(vdm.merge(graph, vdm.join(trained, measured)), config, images, labels, key, probe)

    if config.schedule_objective == "bound":
        grads, (metrics, _) = jax.grad(loss, has_aux=True)(trained, None)
        return grads, metrics
    (grads, of_mean), (metrics, terms) = jax.grad(loss, argnums=(0, 1), has_aux=True)(
        trained, bound.Probe(jnp.zeros(n), jnp.zeros(n))
    )
    # The loss is a mean in bits per dimension; its gradient by one image's gamma is undone to that image's nats,
    # or its crop's.
    shape = (config.crop, config.crop, images.shape[3]) if config.crop else images.shape[1:]
    by = jax.tree.map(lambda g: n * bound.nats_per_image(g, shape), of_mean)
    interior = schedule_variance.gradient(
        lambda schedule: vdm.merge(graph, {**params, "schedule": schedule}).gamma,
        params["schedule"],
        terms.times,
        terms.diffusion,
        by,
        stratified=config.stratified_times,
    )
    ends = {name: grads["schedule"][name] for name in grads["schedule"] if name == "ends"}
    return {**grads, "schedule": {**interior, **ends}}, metrics


def private_gradient(
    graph: nnx.GraphDef,
    config: TrainConfig,
    params: vdm.Params,
    images: Num[Array, "n h w c"],
    labels: Float[Array, "n k"] | None,
    key: jax.Array,
) -> tuple[vdm.Params, Metrics]:
    """:func:`gradient`, of each image on its own, clipped, with noise on the mean. What is reported has no noise.

    Each image is a batch of one with a key of its own, so nothing in the loss can couple two of them.
    """

    def of_one(image: Array, label: Array | None, key: jax.Array) -> tuple[vdm.Params, Metrics]:
        return gradient(graph, config, params, image[None], None if label is None else label[None], key)

    keys = jax.random.split(jax.random.fold_in(key, 4), images.shape[0])
    grads, metrics = jax.vmap(of_one)(images, labels, keys)
    mean = private.noisy_mean(grads, clip=config.dp_clip, noise=config.dp_noise, key=jax.random.fold_in(key, 5))
    return mean, jax.tree.map(jnp.mean, metrics)


StepFn = Callable[..., tuple[TrainState, Metrics]]


def ema_decay(config: TrainConfig, k: Int[Array, ""] | int) -> Float[Array, ""]:
    r"""The decay of the average of the weights at step k, counted from 0: :math:`\min(d, (1 + k) / (10 + k))`.

    With the setting d from the start, a short run's average would be its initial weights: after 120 steps of
    d = 0.999 these count 89 %. So the average begins short, over about the last tenth of the steps, and grows with
    them; what is left of the initial weights after K steps, :math:`\prod_k d_k`, falls as :math:`K^{-9}`.
    """
    return jnp.minimum(config.ema_decay, (1.0 + k) / (10.0 + k))


def make_step(model: vdm.VDMConfig, config: TrainConfig) -> StepFn:
    """Build the training step: pure, to be jitted once with the state donated.

    The key of a step is a function of the seed (or the secret) and the step's number, so a resumed run draws the same
    noise as one that was never interrupted. The numbers of ``plan`` are the config's own unless others are given.
    """
    check(model, config)
    graph, own = vdm.graph_of(model), plan_of(config)

    def step(
        state: TrainState,
        images: Num[Array, "n h w c"],
        labels: Float[Array, "n k"] | None,
        plan: Plan = own,
    ) -> tuple[TrainState, Metrics]:
        of_run = jax.random.key(plan.seed)
        if plan.secret is not None:
            of_run = jax.random.wrap_key_data(plan.secret, impl="threefry2x32")
        key = jax.random.fold_in(of_run, state.step)
        # The loss gets the step's key and splits it in two; fold_in of 0 or 1 would be these two again. 3 is the
        # crop's, 4 and 5 are those of gradients with noise.
        images = augmentation.augment(jax.random.fold_in(key, 2), images, **augmentations(config))
        trained, measured = vdm.partition(graph, state.params)
        of_batch = private_gradient if config.dp_noise else gradient
        grads, metrics = of_batch(graph, config, state.params, images, labels, key)
        updates, opt_state = _optimiser(model, config, plan).update(grads, state.opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        ema = state.ema
        if ema is not None:
            average, _ = vdm.partition(graph, ema)
            average = optax.incremental_update(trained, average, 1.0 - ema_decay(config, state.step))
            ema = vdm.join(average, measured)
        return TrainState(state.step + 1, vdm.join(trained, measured), opt_state, ema), metrics

    return step


@dataclass(frozen=True)
class CompiledStep:
    """A training step that is compiled once per distinct program, and the numbers of one run for it."""

    program: Any
    """The jitted step, shared by all runs whose settings differ in their numbers only."""
    plan: Plan

    def __call__(
        self,
        state: TrainState,
        images: Num[Array | np.ndarray, "n h w c"],
        labels: Float[Array | np.ndarray, "n k"] | None,
    ) -> tuple[TrainState, Metrics]:
        """The next state, in the memory of the old one, and what the step reports."""
        return self.program(state, images, labels, self.plan)

    def lower(self, state: Any, images: Any, labels: Any) -> Any:
        """As ``jax.jit``'s ``lower``, for a look at the program."""
        return self.program.lower(state, images, labels, self.plan)


def jit_step(model: vdm.VDMConfig, config: TrainConfig, secret: int | None = None) -> CompiledStep:
    """:func:`make_step`, compiled, the old state's memory reused for the new.

    The program is kept: another call in the same process with the same settings, or with others of the plan, of the
    batch or of the components that are measured before the first step, compiles nothing.
    """
    return CompiledStep(_program(model, _same_program(config)), plan_of(config, secret))


def new_state(model: vdm.VDMConfig, config: TrainConfig, sharding: jax.sharding.Sharding | None = None) -> TrainState:
    """:func:`init_state`, compiled once per distinct program and computed, on the devices of ``sharding``."""
    return _start_program(model, _same_program(config), sharding)(config.seed)


def _same_program(config: TrainConfig) -> TrainConfig:
    """The config with all that does not change the program of a step at its default."""
    default = TrainConfig()
    free = (*_NUMBERS, "batch_size", "basis_copies")
    return replace(config, **{name: getattr(default, name) for name in free})


@functools.cache
def _program(model: vdm.VDMConfig, config: TrainConfig) -> Any:
    return jax.jit(make_step(model, config), donate_argnums=0)


@functools.cache
def _start_program(model: vdm.VDMConfig, config: TrainConfig, sharding: jax.sharding.Sharding | None) -> Any:
    return jax.jit(
        functools.partial(init_state, model, config), out_shardings=sharding, compiler_options=vdm.QUICK_TO_COMPILE
    )
