"""The Medical VDM: a schedule, an encoder, a decoder, a score network and a label embedding, composed.

The networks live beside it, the mathematics in :mod:`medvdm.theory.bound`. Training code does not use the object but
the pair of :func:`split` and :func:`merge`: a static description and a plain nested dict of arrays, which ordinary
``jax.jit`` and ``jax.grad`` take.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import flax.nnx as nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray

from medvdm.errors import InputError, nearest
from medvdm.models import blocks, likelihoods
from medvdm.models.autoencoder import Decoder, Encoder
from medvdm.models.likelihoods import Likelihood
from medvdm.models.linear_start import Basis, LinearDecoder, LinearEncoder, LinearScore
from medvdm.models.scorenet import ScoreNet
from medvdm.models.unet import DETAILS, Attention, LevelDecoder, LevelEncoder, UNet, least_side
from medvdm.theory import bound, gaussian, schedules

Params = dict[str, Any]
VARIABLES = (nnx.Param, blocks.Measured)  #: what :func:`split` takes out of a model


@dataclass(frozen=True, kw_only=True)
class VDMConfig:
    """The settings of the model. Its defaults are those of the preset `paper`."""

    image_shape: tuple[int, int, int] = (256, 256, 1)
    """Height, width, channels; `fit` takes it from the data."""
    classes: int = 0
    """Number of classes the model is conditioned on; 0 is unconditional."""
    timesteps: int = 0
    """T of the discrete-time bound; 0 is continuous time."""
    gamma_min: float = -5.0
    """gamma = -log SNR at t = 0. At -5 the diffusion loss and the rate that the paper prints fit together."""
    gamma_max: float = 1.0
    """gamma at t = 1."""
    schedule: Literal["fixed-linear", "fixed-cosine", "learned-linear", "monotonic"] = "fixed-linear"
    """How gamma runs from gamma_min to gamma_max."""
    learn_ends: bool = False
    """Whether the bound trains the ends of a monotonic schedule too, from gamma_min and gamma_max on."""
    architecture: Literal["residual", "linear-start", "unet"] = "residual"
    """The paper's residual MLPs, networks that start as the linear-Gaussian VDM (medvdm.models.linear_start), or a
    diffusion on the pixels themselves with an 8-bit likelihood (medvdm.models.unet)."""
    latent: int = 64
    """Dimensions of the latent."""
    embedding_dim: int = 128
    """Width of the time and label embeddings and of the ScoreNet."""
    encoder_width: int = 256
    """Width of the encoder's residual blocks."""
    decoder_width: int = 512
    """Width of the decoder's residual blocks."""
    inner_width: int = 1024
    """Width between the two dense layers of every residual block."""
    encoder_layers: int = 6
    """Residual blocks of the encoder."""
    decoder_layers: int = 6
    """Residual blocks of the decoder."""
    score_layers: int = 10
    """Residual blocks of the ScoreNet."""
    width: int = 48
    """Features of a cell at the finest scale of a U-Net; each coarser scale has twice as many."""
    scales: int = 2
    """Scales of a U-Net; each halves the sides of the one before."""
    blocks: int = 2
    """Residual blocks of a U-Net at each scale, on the way down and again on the way up."""
    patch: int = 2
    """Side in pixels of the cells that a U-Net's convolutions see as one place."""
    details: Literal["contrast", "fourier", "none"] = "contrast"
    """What a U-Net is given beside z: amplified differences from the surroundings, Fourier features, or nothing."""
    attention: bool = False
    """Whether a U-Net attends over all places of its coarsest scale; with ``reduce``, of the smallest copy."""
    rounding: bool = True
    """Whether a U-Net's answer knows that gray values are whole numbers."""
    reduce: int = 0
    """How many times smaller the sides of a copy are that a U-Net of its own models first (medvdm.models.cascade);
    the U-Net of the whole image is then given that copy. 0 has no such stage."""
    base_scales: int = 3
    """Scales of the U-Net of the smallest copy, which is to see it as a whole."""
    stages: int = 2
    """With ``reduce``, how many U-Nets there are: 2 is one of a copy and one of the image; with 3 the copy has a copy
    of its own, reduced as many times again."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the arithmetic inside the networks; parameters and losses stay float32."""

    def __post_init__(self) -> None:
        schedules.check_range(self.gamma_min, self.gamma_max)
        positive = ("latent", "embedding_dim", "encoder_width", "decoder_width", "inner_width")
        positive += ("width", "scales", "blocks", "patch", "base_scales")
        for name in positive:
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)}; expected at least 1")
        for name in ("classes", "timesteps", "reduce", "encoder_layers", "decoder_layers", "score_layers"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}: {getattr(self, name)}; expected 0 or more")
        if self.embedding_dim % 2:
            raise InputError(f"embedding_dim: {self.embedding_dim}; expected an even number (sines and cosines)")
        if len(self.image_shape) != 3 or min(self.image_shape) < 1:
            raise InputError(f"image_shape: {self.image_shape}; expected (height, width, channels)")
        if self.dtype == "float16":
            raise InputError(
                "dtype: 'float16'; most gradients are below its least number, 6e-8, and would be 0; "
                "expected 'float32' or 'bfloat16', which has float32's range"
            )
        if self.dtype not in blocks.DTYPES:
            raise InputError(f"dtype: '{self.dtype}'; {nearest(self.dtype, blocks.DTYPES)}")
        if self.architecture not in ARCHITECTURES:
            raise InputError(f"architecture: '{self.architecture}'; {nearest(self.architecture, ARCHITECTURES)}")
        if self.details not in DETAILS:
            raise InputError(f"details: '{self.details}'; {nearest(self.details, DETAILS)}")
        if self.architecture == "unet" and min(self.image_shape[:2]) < least_side(self.scales, self.patch):
            raise InputError(
                f"image_shape: {self.image_shape}; expected sides of at least {least_side(self.scales, self.patch)} "
                f"for a U-Net of {self.scales} scales on cells of {self.patch} x {self.patch} pixels"
            )
        if self.attention and self.width * 2 ** (self.scales - 1) % Attention.HEADS:
            raise InputError(f"width: {self.width}; expected a multiple of {Attention.HEADS}, for attention")
        if self.reduce:
            if self.architecture != "unet" or self.schedule != "fixed-linear" or not self.rounding or self.reduce < 2:
                raise InputError(
                    f"reduce: {self.reduce} with architecture '{self.architecture}', schedule '{self.schedule}', "
                    f"rounding {self.rounding}; expected 2 or more with 'unet', 'fixed-linear' and True"
                )
        if self.stages < 2:
            raise InputError(f"stages: {self.stages}; expected 2 or more (without copies, reduce is 0)")
        if self.schedule not in schedules.KINDS:
            raise InputError(f"schedule: '{self.schedule}'; {nearest(self.schedule, schedules.KINDS)}")
        if self.learn_ends and self.schedule != "monotonic":
            raise InputError(f"learn_ends: True with schedule '{self.schedule}'; expected schedule 'monotonic'")

    def base(self) -> VDMConfig:
        """The settings of the model of the reduced copy.

        Raises:
            InputError: sides that are no multiples of ``reduce``, or a copy that is too small for ``base_scales``. Only
                here, since ``image_shape`` is right once the data are known.
        """
        height, width, channels = self.image_shape
        if height % self.reduce or width % self.reduce:
            raise InputError(f"image_shape: {self.image_shape}; expected sides that are multiples of {self.reduce}")
        smallest = self.stages == 2
        scales = self.base_scales if smallest else self.scales
        least = self.reduce * least_side(scales, self.patch)
        if min(height, width) < least:
            raise InputError(
                f"image_shape: {self.image_shape}; expected sides of at least {least} for a copy reduced "
                f"{self.reduce} times and its U-Net of {scales} scales"
            )
        shape = (height // self.reduce, width // self.reduce, channels)
        if smallest:
            return replace(self, image_shape=shape, scales=scales, reduce=0)
        copy = replace(self, image_shape=shape, stages=self.stages - 1)
        copy.base()  # refuses sides that cannot be reduced once more
        return copy

    @property
    def integers(self) -> bool:
        """Whether images are uint8 gray values, or float in [0, 1]."""
        return ARCHITECTURES[self.architecture].likelihood.integers

    @property
    def dimensions(self) -> int:
        """Number of pixels times channels, by which bits per image are divided to give bits per dimension."""
        return math.prod(self.image_shape)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How the parts of a model are built, and what the rest of the library has to know of them.

    All encoders, decoders and score networks are called alike: ``encoder(x)``, ``decoder(z, gamma_0)``,
    ``score.condition(gamma, label)`` and ``score(z, condition)``.
    """

    build: Callable[[VDMConfig, jnp.dtype, nnx.Rngs], dict[str, nnx.Module]]
    """Makes ``encoder``, ``decoder`` and ``score``, and what they share, by name."""
    likelihood: Likelihood = likelihoods.BERNOULLI
    """The observation model, which says what images are: gray values in [0, 1], or whole numbers from 0 to 255."""
    on_pixels: bool = False
    """Whether z has the shape of the image, or that of a vector of ``latent`` numbers."""
    measures_components: bool = False
    """Whether components of the training images are measured before the first step (:func:`with_components`)."""
    any_size: bool = False
    """Whether the networks take images of any size, such as crops of the training images."""
    dense: bool = True
    """Whether all layers are dense ones, whose work is counted in :mod:`medvdm.cost`."""


def _score_net(config: VDMConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> ScoreNet:
    return ScoreNet(
        config.latent,
        embedding_dim=config.embedding_dim,
        layers=config.score_layers,
        inner_width=config.inner_width,
        gamma_range=(config.gamma_min, config.gamma_max),
        dtype=dtype,
        rngs=rngs,
    )


def _residual(config: VDMConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
    shared = {"inner_width": config.inner_width, "dtype": dtype, "rngs": rngs}
    return {
        "encoder": Encoder(
            config.image_shape, config.latent, width=config.encoder_width, layers=config.encoder_layers, **shared
        ),
        "decoder": Decoder(
            config.image_shape, config.latent, width=config.decoder_width, layers=config.decoder_layers, **shared
        ),
        "score": _score_net(config, dtype, rngs),
    }


def _linear_start(config: VDMConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
    basis = Basis(config.dimensions, config.latent)
    return {
        "basis": basis,
        "encoder": LinearEncoder(config.image_shape, basis),
        "decoder": LinearDecoder(
            config.image_shape, basis, width=config.decoder_width, layers=config.decoder_layers, dtype=dtype, rngs=rngs
        ),
        "score": LinearScore(basis, _score_net(config, dtype, rngs)),
    }


def _unet(config: VDMConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
    return {
        "encoder": LevelEncoder(config.image_shape[2]),
        "decoder": LevelDecoder(),
        "score": UNet(
            config.image_shape[2],
            width=config.width,
            scales=config.scales,
            blocks=config.blocks,
            patch=config.patch,
            details=config.details,
            attention=config.attention and not config.reduce,  # what learns from crops sees no whole
            rounding=config.rounding,
            reduce=config.reduce,
            embedding_dim=config.embedding_dim,
            gamma_range=(config.gamma_min, config.gamma_max),
            dtype=dtype,
            rngs=rngs,
        ),
    }


ARCHITECTURES = {
    "residual": Architecture(build=_residual),
    "linear-start": Architecture(build=_linear_start, measures_components=True, dense=False),
    "unet": Architecture(build=_unet, likelihood=likelihoods.EIGHT_BIT, on_pixels=True, any_size=True, dense=False),
}


class VDM(nnx.Module):
    """The paper's model. ``VDM(config, rngs=nnx.Rngs(seed))``; every method is pure.

    Raises:
        InputError: from :class:`VDMConfig`, for settings that cannot be used.
    """

    def __init__(self, config: VDMConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype = blocks.DTYPES[config.dtype]
        self.schedule = schedules.make(
            config.schedule, config.gamma_min, config.gamma_max, learn_ends=config.learn_ends, rngs=rngs
        )
        for name, part in ARCHITECTURES[config.architecture].build(config, dtype, rngs).items():
            setattr(self, name, part)
        if config.reduce:
            self.base = VDM(config.base(), rngs=rngs)
        self.labels = blocks.LabelEmbedding(config.classes, config.embedding_dim, rngs=rngs)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one image's z."""
        return self.config.image_shape if self.architecture.on_pixels else (self.config.latent,)

    @property
    def architecture(self) -> Architecture:
        """How this model is built."""
        return ARCHITECTURES[self.config.architecture]

    @property
    def timesteps(self) -> int:
        """T of the discrete-time bound; 0 is continuous time."""
        return self.config.timesteps

    def gamma(self, t: Float[Array, "..."]) -> Float[Array, "..."]:
        """gamma(t) = -log SNR, rising; t in [0, 1]."""
        return self.schedule(t)

    def encode(self, x: Num[Array, "n h w c"]) -> Float[Array, "n *latent"]:
        """Images to their encoding f. Raises for a wrong dtype or shape, as the encoder of the architecture does."""
        return self.encoder(x)

    def decode(self, z: Float[Array, "n *latent"]) -> Float[Array, "n h w c"]:
        r"""What the observation model needs of each pixel, from :math:`z_0 / \alpha_0`.

        The logits of a Bernoulli law, or the centre of a law over 256 gray values.
        """
        return self.decoder(z, self.gamma(jnp.zeros(())))

    def picture(self, decoded: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """What to show of :meth:`decode`'s answer, in [0, 1]: the Bernoulli law's mean, or the likeliest gray value."""
        return self.architecture.likelihood.picture(decoded)

    def embed(
        self, labels: Float[Array, "n k"] | None, keep: Float[Array, " n"] | None = None, *, n: int = 1
    ) -> Float[Array, "n c"]:
        """Embed multi-hot labels; None, or a 0 in ``keep``, gives the trained null."""
        return self.labels(labels, keep, n=n)

    def condition(self, gamma: Float[Array, " m"], label: Float[Array, "m c"]) -> Any:
        """What the score network needs to know besides z; m is n, or 1 where all examples share time and label."""
        return self.score.condition(gamma, label)

    def eps_hat(self, z: Float[Array, "n *latent"], condition: Any) -> Float[Array, "n *latent"]:
        """The predicted noise in z, given :meth:`condition`."""
        return self.score(z, condition)

    def x_hat(
        self, z: Float[Array, "n *latent"], gamma: Float[Array, " m"], label: Float[Array, "m c"]
    ) -> Float[Array, "n *latent"]:
        """The same network read out as the clean encoding: (z - sigma eps_hat) / alpha."""
        return gaussian.x_from_eps(self.eps_hat(z, self.condition(gamma, label)), z, gaussian.align(gamma, z))

    def observation_loss(self, x: Num[Array, "n h w c"], decoded: Float[Array, "n h w c"]) -> Float[Array, " n"]:
        """-log p(x | z_0) in nats per image, from :meth:`decode`'s answer."""
        return self.architecture.likelihood.nll(x, decoded, self.gamma(jnp.zeros(())))

    # The paper's names for the three terms. Nats per image, one value per image.

    def reconstruction_loss(
        self, x: Num[Array, "n h w c"], f: Float[Array, "n *latent"], key: PRNGKeyArray
    ) -> Float[Array, " n"]:
        """See :func:`medvdm.theory.bound.reconstruction_loss`."""
        return bound.reconstruction_loss(self, x, f, key)

    def latent_loss(self, f: Float[Array, "n *latent"]) -> Float[Array, " n"]:
        """The prior loss under the paper's name; see :func:`medvdm.theory.bound.prior_loss`."""
        return bound.prior_loss(self, f)

    def diffusion_loss(
        self, f: Float[Array, "n *latent"], label: Float[Array, "n c"], u: Float[Array, " n"], key: PRNGKeyArray
    ) -> Float[Array, " n"]:
        """See :func:`medvdm.theory.bound.diffusion_loss`."""
        return bound.diffusion_loss(self, f, label, u, key)


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """A model as its static graph and a plain nested dict of arrays, trained and measured ones."""
    graph, state = nnx.split(model, VARIABLES)
    return graph, nnx.to_pure_dict(state)


def merge(graph: nnx.GraphDef, params: Params) -> Any:
    """The inverse of :func:`split`; works inside jit and grad.

    Give a compiled function the parameters as an argument and merge inside, as the library does. A model that is
    closed over becomes a constant of the program, and XLA on a CPU (jaxlib 0.10.2) can compute garbage from a constant
    matrix of equal entries, such as a last layer that still is zero, where a batch has hundreds of rows.
    """
    return nnx.merge(graph, nnx.State(params))


@functools.cache
def graph_of(config: VDMConfig) -> nnx.GraphDef:
    """The static graph of a config, without computing any weight."""
    return nnx.split(nnx.eval_shape(lambda: VDM(config, rngs=nnx.Rngs(0))), VARIABLES)[0]


def new_params(config: VDMConfig, seed: Int[Array, ""] | int) -> Params:
    """Initial parameters; pure, to be traced by a caller's jit or eval_shape."""
    return split(VDM(config, rngs=nnx.Rngs(jax.random.key(seed))))[1]


def init(config: VDMConfig, seed: int) -> Params:
    """:func:`new_params`, compiled (once per config) and computed. Not to be traced by another jit."""
    return _init_program(config)(seed)


#: For programs that run once, such as those that draw initial weights: compiling them with all optimisations takes XLA
#: several times as long as with few (12 s against 3 s for a U-Net), and the weights are the same to the bit.
QUICK_TO_COMPILE = {"xla_backend_optimization_level": 1}


@functools.cache
def _init_program(config: VDMConfig) -> Any:
    return jax.jit(functools.partial(new_params, config), compiler_options=QUICK_TO_COMPILE)


def partition(graph: nnx.GraphDef, params: Params) -> tuple[Params, Params]:
    """The parameters that are trained (``nnx.Param``), and those that are measured (:class:`~blocks.Measured`)."""
    _, trained, measured = nnx.split(merge(graph, params), nnx.Param, blocks.Measured)
    return nnx.to_pure_dict(trained), nnx.to_pure_dict(measured)


def join(trained: Params, measured: Params) -> Params:
    """The inverse of :func:`partition`."""
    return nnx.to_pure_dict(nnx.merge_state(nnx.State(trained), nnx.State(measured)))


def with_components(params: Params, components: Params) -> Params:
    """The parameters with measured ``mean``, ``components`` and ``variances``, for a model that starts from them.

    Raises:
        InputError: arrays of other names or shapes than the model's.
    """
    old = {name: leaf.shape for name, leaf in params.get("basis", {}).items()}
    new = {name: leaf.shape for name, leaf in components.items()}
    if old != new:
        raise InputError(f"components: {new}; expected {old}")
    return params | {"basis": components}


def count(params: Params) -> int:
    """Number of parameters."""
    return sum(p.size for p in jax.tree.leaves(params))
