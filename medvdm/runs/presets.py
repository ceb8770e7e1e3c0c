"""The presets: settings to start from, each with its reason."""

from __future__ import annotations

import dataclasses
from typing import Any

from medvdm.data import DataConfig
from medvdm.errors import InputError, nearest
from medvdm.models.vdm import VDMConfig
from medvdm.runs.config import RunConfig, change
from medvdm.training.step import TrainConfig


def _presets() -> dict[str, RunConfig]:
    paper = RunConfig(preset="paper", data=DataConfig(image_size=256))
    # A diffusion on the pixels of small images with an 8-bit likelihood. Small batches: the steps count, not their
    # images, since the times of a batch are spread evenly and the network has seen each image a few times only.
    pixel = RunConfig(
        preset="pixel",
        model=VDMConfig(
            architecture="unet",
            gamma_min=-13.0,  # noise of 0.19 gray levels, with which 0.04 bits per pixel are left to the decoder
            gamma_max=5.0,
            embedding_dim=64,
            width=48,
        ),
        training=TrainConfig(
            steps=12_000, batch_size=8, learning_rate=3e-3, warmup_steps=100, clip_norm=1.0, ema_decay=0.999
        ),
    )
    return {
        # Small enough for two cores and five minutes, with everything switched on.
        "demo": RunConfig(
            preset="demo",
            conditional=True,
            model=VDMConfig(
                gamma_min=-6.0,
                gamma_max=5.0,  # z_1 is N(0, I) to within 1 %, so samples start from the right law
                latent=32,
                embedding_dim=64,
                encoder_width=128,
                decoder_width=128,
                inner_width=256,
                encoder_layers=2,
                decoder_layers=2,
                score_layers=4,
            ),
            training=TrainConfig(steps=2000, batch_size=64, learning_rate=1e-3, clip_norm=1.0, ema_decay=0.995),
        ),
        "paper": paper,
        # The text taken at its word: z_0 is already half noise, and five steps (see the book on what happens).
        "paper-literal": dataclasses.replace(
            paper, preset="paper-literal", model=VDMConfig(gamma_min=0.1, gamma_max=1.0, timesteps=5)
        ),
        "pixel": pixel,
        # The same for large images: a copy of a copy first, then the copy, then the detail, which is learnt from crops.
        # The weight is for samples: it gives them their anatomy and costs no bits.
        "pixel-large": dataclasses.replace(
            pixel,
            preset="pixel-large",
            data=DataConfig(image_size=256),
            model=dataclasses.replace(
                pixel.model,
                gamma_min=-14.0,  # a reduced X-ray is smooth: its finest detail is about one gray level
                reduce=4,
                stages=3,
            ),
            training=dataclasses.replace(pixel.training, batch_size=4, crop=64, noise_weight=10.0),
        ),
        # Starts as the linear-Gaussian VDM of the training images and learns what that cannot express: the best bound
        # here for its time. The components are measured on shifted and resized copies, which generalise better.
        "linear-start": RunConfig(
            preset="linear-start",
            data=DataConfig(image_size=256),
            model=VDMConfig(
                architecture="linear-start",
                gamma_min=-1.67,  # the noise that reverse water-filling asks for: r = 0.43, in gray levels
                gamma_max=11.0,  # the largest component has a variance of hundreds, and z_1 should still be noise
                latent=192,
                decoder_width=64,
                decoder_layers=2,
                score_layers=2,
                inner_width=256,
            ),
            training=TrainConfig(
                steps=400,
                batch_size=8,
                learning_rate=1e-3,
                warmup_steps=50,
                augment_shift=0.03,
                augment_size=0.05,
                basis_copies=7,
            ),
        ),
    }


PRESETS = tuple(_presets())


def preset(name: str, **changes: Any) -> RunConfig:
    """A preset with some settings changed, each by its own name wherever it lives.

    >>> preset("demo", data="phantom", steps=100).training.steps
    100

    Raises:
        InputError: unknown preset or setting (with the nearest name), or a value that cannot be used.
    """
    presets = _presets()
    if name not in presets:
        raise InputError(f"preset: '{name}'; {nearest(name, presets)}")
    return change(presets[name], **changes)
