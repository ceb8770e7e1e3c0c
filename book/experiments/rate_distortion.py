"""What the loss of the paper pays for: floors, closed forms and small trained models on the rate-distortion plane.

    python book/experiments/rate_distortion.py floors --data-dir DIR
    python book/experiments/rate_distortion.py models --data-dir DIR

DIR holds ``nih-chestxray8-256/`` and ``medmnist/pneumoniamnist.npz``. The first writes book/results/floors.json, what
needs no training, in about two minutes of one core; the second book/results/rate-distortion.json, in about four.
Every choice is made on validation patients; test patients are looked at once.

Tables (bits per pixel end in ``_bpd``, bits per image in ``_bits``; standard errors are clustered by patient):

* floors: the binary entropy of the pixels, by data set, size and split.
* predictors: distortion, which is reconstruction minus floor, of one gray level, the mean image and PCA-k, on test
  images; no rate is charged.
* linear: the linear-Gaussian VDM for each k with its best noise; water: reverse water-filling at falling levels.
* models: networks of one size, for latents of 2 to 512 dimensions and three end points gamma_0.
* blur: distortion of blurred images, against its second-order formula.
* eight_bit: what the cross-entropy becomes with its normalising constant, as a code for 8-bit values.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from medvdm import data
from medvdm.evaluation.components import exact_components
from medvdm.evaluation.statistics import clustered_stderr
from medvdm.models import vdm
from medvdm.runs import config
from medvdm.runs.presets import preset
from medvdm.theory import bound as bound_
from medvdm.theory import linear_gaussian
from medvdm.training import step as step_
from scipy import ndimage, special

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_tools"))
import record

SIZES = {  # of the small networks, the same for every latent
    "embedding_dim": 64,  # also the width of the score network
    "encoder_width": 128,
    "decoder_width": 128,
    "inner_width": 256,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "score_layers": 2,
}
RECIPE = {"steps": 600, "batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 100, "ema_decay": 0.0}
GAMMA_1 = 5.0  # q(z_1) is close to N(0, I), so the prior loss is small for every model
CONFIG = dataclasses.replace(
    preset("demo", data="nih", image_size=64, latent=32, gamma_min=-5.0, gamma_max=GAMMA_1, **SIZES, **RECIPE),
    conditional=False,
)
LATENTS = (2, 8, 32, 128, 512)
GAMMA_0 = (-5.0, -8.0, -2.0)
COMPONENTS = (1, 2, 3, 4, 5, 6, 8, 16, 32, 64, 128, 256)
LN2 = np.log(2.0)


class Images:
    """The three splits of a data set at one size, as rows of pixels, with the patients of each."""

    def __init__(self, name: str, size: int, data_dir: Path):
        folder = {"nih": "nih-chestxray8-256", "pneumoniamnist": "medmnist/pneumoniamnist.npz"}.get(name)
        where = str(data_dir / folder) if folder else None
        # Phantoms: as many as there are NIH images.
        source = data.load(data.DataConfig(data=name, data_dir=where, image_size=size, num_images=800))
        self.name, self.size = name, size
        self.x, self.patients = {}, {}
        for split in data.SPLITS:
            indices = source.indices(split)
            self.x[split] = source.read(indices).reshape(len(indices), -1)
            self.patients[split] = source.patients[indices]
        record.say(f"{name} {size}: {[len(x) for x in self.x.values()]} images")

    @property
    def head(self) -> dict:
        return {"data": self.name, "size": self.size}

    def bpd(self, nats: np.ndarray) -> np.ndarray:
        """Nats per image to bits per pixel."""
        return nats / (LN2 * self.size**2)

    def stderr(self, values: np.ndarray, split: str = "test") -> float:
        return clustered_stderr(values, self.patients[split])


def floor(x: np.ndarray) -> np.ndarray:
    """Binary entropy of the pixels in nats per image."""
    x = x.astype(np.float64)
    return (special.entr(x) + special.entr(1.0 - x)).sum(axis=1)


def floors(images: Images) -> list[dict]:
    rows = []
    for split, x in images.x.items():
        bits = images.bpd(floor(x))
        counts = {"images": len(x), "patients": len(set(images.patients[split]))}
        rows.append({**images.head, "split": split, **counts, "floor_bpd": bits.mean()})
        rows[-1]["stderr_bpd"] = images.stderr(bits, split)
    return rows


def predictors(images: Images, mean: np.ndarray, components: np.ndarray) -> list[dict]:
    """One gray level, the mean image and PCA-k, fitted on the training images; distortion on test images."""
    x = images.x["test"]
    scores, lowest = (x - mean) @ components[: max(COMPONENTS)].T, floor(x)
    pictures = {"one gray level": images.x["train"].mean(dtype=np.float64), "mean image": mean}
    for k in COMPONENTS:
        pictures[f"PCA-{k}"] = mean + scores[:, :k] @ components[:k]
    rows = []
    for name, picture in pictures.items():
        p = np.broadcast_to(picture, x.shape).astype(np.float32)
        distortion = images.bpd(linear_gaussian.cross_entropy(x, p) - lowest)
        rmse = np.sqrt(np.mean((x - np.clip(p, 0, 1)) ** 2, dtype=np.float64))
        rows.append({**images.head, "predictor": name, "rmse": float(rmse), "distortion_bpd": distortion.mean()})
        rows[-1]["stderr_bpd"] = images.stderr(distortion)
    return rows


def point(images: Images, reconstruction: np.ndarray, rate: np.ndarray, split: str = "test") -> dict:
    """Where a model lies on the plane: bits per image, from nats per image of one split."""
    distortion = (reconstruction - floor(images.x[split])) / LN2
    row = {"distortion_bits": distortion.mean(), "rate_bits": rate.mean() / LN2}
    return row | {"total_stderr_bits": images.stderr(distortion + rate / LN2, split)}


def linear(images: Images, mean: np.ndarray, components: np.ndarray, variances: np.ndarray) -> list[list[dict]]:
    """The linear-Gaussian VDM for each k, and by reverse water-filling; on test images."""
    x, val = images.x["test"], images.x["val"]
    latents, noises = (2, 4, 8, 16, 32, 64, 128, 256), (0.28, 0.4, 0.55, 0.75)
    by_k, water = [], []
    for t in linear_gaussian.rate_distortion(val, x, mean, components, variances, latents=latents, noises=noises):
        by_k.append({**images.head, "latent": t.latent, "noise": t.noise, **point(images, t.reconstruction, t.rate)})
    for level in np.geomspace(variances[0] / 4, 0.07, 12):
        noise = linear_gaussian.water_filling(variances, level)
        terms = linear_gaussian.linear_gaussian_vdm(x, mean, components[: len(noise)], variances[: len(noise)], noise)
        water.append({**images.head, "level": float(level), "latent": len(noise), **point(images, *terms)})
    record.say(f"{images.name} {images.size}: linear models")
    return [by_k, water]


class WithEnds:
    """A model whose gamma_0 is an argument: one compilation serves all of them."""

    timesteps = 0

    def __init__(self, model: vdm.VDM, gamma_0: jax.Array):
        self.model, self.gamma_0 = model, gamma_0
        self.encode, self.decode, self.embed, self.eps_hat = model.encode, model.decode, model.embed, model.eps_hat
        self.observation_loss = model.observation_loss

    def gamma(self, t: jax.Array) -> jax.Array:
        return (1.0 - t) * self.gamma_0 + t * GAMMA_1

    def condition(self, gamma: jax.Array, label: jax.Array) -> tuple[jax.Array, ...]:
        low, high = self.model.score.gamma_range  # the network is told where gamma lies between the ends of this model
        return self.model.score.condition(low + (high - low) * (gamma - self.gamma_0) / (GAMMA_1 - self.gamma_0), label)


class Trainer:
    """Trains networks of one size for any gamma_0, from one start, and evaluates them."""

    def __init__(self, images: Images, **changes):
        shape = (images.size, images.size, 1)
        self.images, self.config = images, config.change(CONFIG, image_shape=shape, **changes)
        self.x = {split: jnp.asarray(x.reshape(-1, *shape)) for split, x in images.x.items()}
        settings, graph = self.config.training, vdm.graph_of(self.config.model)
        optimiser = optax.flatten(step_.optimiser(settings))  # one vector: the same numbers, compiled sooner

        def loss(params, gamma_0, x, key):
            bound = bound_.terms(WithEnds(vdm.merge(graph, params), gamma_0), x, key=key)
            return bound_.bits_per_dim(jnp.mean(bound.total), shape)

        def train(params, gamma_0, images, keys):
            def step(carry, key):
                params, state = carry
                key_rows, key_bound = jax.random.split(key)
                x = images[jax.random.randint(key_rows, (settings.batch_size,), 0, len(images))]
                gradient = jax.grad(loss)(params, gamma_0, x, key_bound)
                updates, state = optimiser.update(gradient, state, params)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, optimiser.init(params)), keys)[0][0]

        def terms(params, gamma_0, x, keys):
            model = WithEnds(vdm.merge(graph, params), gamma_0)
            bound = jax.lax.map(lambda key: bound_.terms(model, x, key=key), keys)
            signal = jnp.var(model.encode(x), axis=0) / jnp.exp(gamma_0)  # against the noise of z_0
            return bound.reconstruction.mean(0), (bound.prior + bound.diffusion).mean(0), signal

        self.start = vdm.init(self.config.model, settings.seed)
        self.train, self.terms = jax.jit(train), jax.jit(terms)

    def __call__(self, gamma_0: float) -> dict:
        """The table's row: distortion and rate on the first training images, validation and test."""
        settings, model = self.config.training, self.config.model
        keys = jax.random.split(jax.random.key(settings.seed), settings.steps)
        params = self.train(self.start, jnp.float32(gamma_0), self.x["train"], keys)
        row = {"latent": model.latent, "gamma_0": gamma_0, "width": model.embedding_dim, "steps": settings.steps}
        parts = [self.x[split][:192] for split in data.SPLITS]  # of the training images as many as of the test images
        x, ends = jnp.concatenate(parts), np.cumsum([0] + [len(part) for part in parts])
        # Stratified times run through the rows in order: mixed, so that each split sees all of them in every draw.
        mixed = np.random.default_rng(0).permutation(len(x))
        keys = jax.random.split(jax.random.key(1), 16)
        *terms, signal = self.terms(params, jnp.float32(gamma_0), x[mixed], keys)
        back = np.argsort(mixed)
        reconstruction, rate = (np.asarray(t, np.float64)[back] / LN2 for t in terms)
        distortion = reconstruction - floor(np.asarray(x).reshape(len(x), -1)) / LN2
        for split, start, end in zip(data.SPLITS, ends[:-1], ends[1:], strict=True):
            row[f"{split}_distortion_bits"] = distortion[start:end].mean()
            row[f"{split}_rate_bits"] = rate[start:end].mean()
            if split != "train":
                row[f"{split}_stderr_bits"] = self.images.stderr((distortion + rate)[start:end], split)
        row["active"] = int(np.sum(np.asarray(signal) > 1.0))  # latents with more signal than noise
        record.say(
            str({name: value if isinstance(value, int) else round(float(value), 1) for name, value in row.items()})
        )
        return row


def models(images: Images) -> list[dict]:
    rows = []
    for latent in LATENTS:
        trainer = Trainer(images, latent=latent)
        rows += [trainer(gamma_0) for gamma_0 in (GAMMA_0 if latent in (8, 32, 512) else GAMMA_0[:1])]
    rows.append(Trainer(images, latent=128, embedding_dim=128)(-5.0))  # a score network as wide as the latent
    rows.append(Trainer(images, latent=32, steps=2400)(-5.0))  # four times as long
    return rows


def blur(images: Images) -> list[dict]:
    """Blurred test images as pictures: their distortion, and what the second-order formula says."""
    n = 32
    x = images.x["test"][:n].reshape(n, images.size, images.size)
    rows = []
    for width in (0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48):
        p = ndimage.gaussian_filter(x, (0, width, width), mode="nearest")
        p = np.clip(p, linear_gaussian.CLIP, 1 - linear_gaussian.CLIP)
        distortion = linear_gaussian.cross_entropy(x.reshape(n, -1), p.reshape(n, -1)) - floor(x.reshape(n, -1))
        second = np.mean((x - p) ** 2 / (2 * p * (1 - p)), dtype=np.float64) / LN2
        rmse = np.sqrt(np.mean((x - p) ** 2, dtype=np.float64))
        row = {**images.head, "width_pixels": width, "rmse": float(rmse)}
        rows.append({**row, "distortion_bpd": images.bpd(distortion).mean(), "second_bpd": float(second)})
    return rows


def eight_bit(images: Images) -> list[dict]:
    """The perfect picture under the *normalised* law, as a code for 8-bit values: bits per pixel."""
    x = images.x["test"].astype(np.float64)
    p = np.clip(x, linear_gaussian.CLIP, 1 - linear_gaussian.CLIP)
    logit = special.logit(p)
    middle = np.abs(logit) < 1e-6
    integral = np.where(middle, 0.5, (2 * p - 1) / np.where(middle, 1.0, logit))
    cost, constant = images.bpd(linear_gaussian.cross_entropy(x, p)).mean(), -np.log2(integral).mean()
    return [{**images.head, "cross_entropy_bpd": cost, "log2_constant_bpd": constant, "code_bpd": 8 + cost - constant}]


def closed_forms(data_dir: Path) -> dict[str, list[dict]]:
    """All tables that need no training."""
    tables: dict[str, list[dict]] = {
        name: [] for name in ("floors", "predictors", "linear", "water", "blur", "eight_bit")
    }
    sets = [(name, size) for size in (32, 64, 128, 256) for name in ("phantom", "nih")]
    for name, size in [("pneumoniamnist", 28), *sets]:
        images = Images(name, size, data_dir)
        tables["floors"] += floors(images)
        if size in (28, 64) or (name == "nih" and size == 256):
            mean, components, variances = exact_components(images.x["train"], 537)
            tables["predictors"] += predictors(images, mean, components)
        if name == "nih" and size in (64, 256):
            by_k, water = linear(images, mean, components, variances)
            tables["linear"] += by_k
            tables["water"] += water
        if name == "nih" and size == 256:
            tables["blur"] += blur(images)
            tables["eight_bit"] += eight_bit(images)
    return tables


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["floors", "models"])
    parser.add_argument("--data-dir", type=Path, required=True)
    return parser


def main() -> int:
    options, start = parser().parse_args(), time.perf_counter()
    if options.part == "floors":
        name, tables = "floors", closed_forms(options.data_dir)
    else:
        name, tables = "rate-distortion", {"models": models(Images("nih", 64, options.data_dir))}
    as_floats = {
        table: [{k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()} for row in rows]
        for table, rows in tables.items()
    }
    record.experiment(name, config=CONFIG, seconds=time.perf_counter() - start, results=as_floats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
