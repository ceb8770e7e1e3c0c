"""What the loss of the paper pays for: floors, closed forms and small trained models on the rate-distortion plane.

    python book/experiments/rate_distortion.py --data-dir DIR

DIR holds ``nih-chestxray8-256/`` and ``medmnist/pneumoniamnist.npz``. Writes book/results/rate-distortion.json, the
tables of chapter 15. About 12 minutes on one core. Every choice is made on validation patients; each number of test
patients is computed once, at the end.

Tables (bits per pixel end in ``_bpd``, bits per image in ``_bits``; standard errors are clustered by patient):

* floors: the binary entropy of the pixels, by data set, size and split.
* predictors: excess over the floor on test images of one gray level, the mean image and PCA-k, no rate charged.
* linear: the linear-Gaussian VDM for each k with its best noise; water: reverse water-filling at falling levels.
* models: networks of one size, for latents of 2 to 512 dimensions and three end points gamma_0.
* blur: excess of blurred images, against its second-order formula.
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
from scipy import ndimage, special

import medvdm
from medvdm import baselines, data, evaluation, training, vdm, vlb

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_tools"))
import record

CONFIG = dataclasses.replace(
    medvdm.preset(
        "demo",
        data="nih",
        image_size=64,
        latent=64,
        gamma_min=-5.0,
        embedding_dim=128,
        encoder_layers=1,
        decoder_layers=1,
        score_layers=2,
        steps=1000,
        batch_size=16,
        warmup_steps=100,
        ema_decay=0.0,
    ),
    conditional=False,
)
LATENTS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
GAMMA_0 = (-8.0, -5.0, -2.0)
GAMMA_1 = 5.0  # q(z_1) is close to N(0, I), so the prior loss is small for every model
COMPONENTS = (1, 2, 3, 4, 5, 6, 8, 16, 32, 64, 128, 256)
LN2 = np.log(2.0)


def log(text: str) -> None:
    print(f"{time.process_time():6.0f} s  {text}", file=sys.stderr, flush=True)


def rounded(value: float) -> float:
    return float(f"{value:.6g}")


class Images:
    """The three splits of a data set at one size, as rows of pixels, with the patients of each."""

    def __init__(self, name: str, size: int, data_dir: Path | None):
        folder = {"nih": "nih-chestxray8-256", "pneumoniamnist": "medmnist/pneumoniamnist.npz"}.get(name)
        where = str(data_dir / folder) if folder and data_dir else None
        # Phantoms: as many as there are NIH images.
        config = data.DataConfig(data=name, data_dir=where, image_size=size, num_images=800)
        source = data.load(config)
        self.name, self.size = name, size
        self.x, self.patients = {}, {}
        for split in data.SPLITS:
            indices = source.indices(split)
            self.x[split] = source.read(indices).reshape(len(indices), -1)
            self.patients[split] = source.patients[indices]
        self.components = baselines.principal_components(self.x["train"], len(self.x["train"]) - 1)
        log(f"{name} {size}: {[len(x) for x in self.x.values()]} images")

    def bpd(self, nats: np.ndarray) -> np.ndarray:
        """Nats per image to bits per pixel."""
        return nats / (LN2 * self.size**2)

    def mean_and_error(self, bits: np.ndarray, split: str = "test") -> tuple[float, float]:
        return rounded(bits.mean()), rounded(evaluation.clustered_stderr(bits, self.patients[split]))


def floor(x: np.ndarray) -> np.ndarray:
    """Binary entropy of the pixels in nats per image."""
    x = x.astype(np.float64)
    return (special.entr(x) + special.entr(1.0 - x)).sum(axis=1)


def floors(images: Images) -> list[dict]:
    rows = []
    for split, x in images.x.items():
        mean, error = images.mean_and_error(images.bpd(floor(x)), split)
        counts = {"images": len(x), "patients": len(set(images.patients[split]))}
        rows.append({"data": images.name, "size": images.size, "split": split, **counts})
        rows[-1] |= {"floor_bpd": mean, "stderr_bpd": error}
    return rows


def predictors(images: Images) -> list[dict]:
    """One gray level, the mean image and PCA-k on test images; fitted on the training images."""
    x, (mean, components, _) = images.x["test"], images.components
    scores = (x - mean) @ components.T
    pictures = {0: mean}
    pictures |= {k: mean + scores[:, :k] @ components[:k] for k in COMPONENTS if k <= len(components)}
    pictures |= {-1: images.x["train"].mean(dtype=np.float64)}  # one gray level
    rows = []
    for k, picture in sorted(pictures.items()):
        p = np.broadcast_to(picture, x.shape).astype(np.float32)
        excess, error = images.mean_and_error(images.bpd(baselines.cross_entropy(x, p) - floor(x)))
        total, total_error = images.mean_and_error(images.bpd(baselines.cross_entropy(x, p)))
        name = {-1: "one gray level", 0: "mean image"}.get(k, f"PCA-{k}")
        rmse = rounded(np.sqrt(np.mean((x - np.clip(p, 0, 1)) ** 2, dtype=np.float64)))
        rows.append({"data": images.name, "size": images.size, "predictor": name, "k": k, "rmse": rmse})
        rows[-1] |= {"cross_entropy_bpd": total, "cross_entropy_stderr_bpd": total_error}
        rows[-1] |= {"excess_bpd": excess, "stderr_bpd": error}
    return rows


def point(images: Images, reconstruction: np.ndarray, rate: np.ndarray, split: str = "test") -> dict:
    """Where a model lies on the plane: bits per image, from nats per image of one split."""
    excess = reconstruction - floor(images.x[split])
    parts = {"excess": excess, "rate": rate, "total": excess + rate}
    row = {}
    for name, nats in parts.items():
        row[f"{name}_bits"], row[f"{name}_stderr_bits"] = images.mean_and_error(nats / LN2, split)
    return row


def linear(images: Images) -> tuple[list[dict], list[dict]]:
    """The linear-Gaussian VDM for each k, and by reverse water-filling; on test images."""
    x, (mean, components, variances) = images.x["test"], images.components
    head = {"data": images.name, "size": images.size}
    trades = baselines.rate_distortion(
        images.x["val"], x, mean, components, variances, latents=(1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 512)
    )
    by_k = [
        {**head, "latent": t.latent, "noise": rounded(t.noise), **point(images, t.reconstruction, t.rate)}
        for t in trades
    ]
    water = []
    for level in np.geomspace(variances[0] / 2, 0.06, 22):
        noise = baselines.water_filling(variances, level)
        terms = baselines.linear_gaussian_vdm(x, mean, components[: len(noise)], variances[: len(noise)], noise)
        water.append({**head, "level": rounded(level), "latent": len(noise), **point(images, *terms)})
    log(f"{images.name} {images.size}: linear models")
    return by_k, water


class WithEnds:
    """A model whose end points are arguments: one compilation serves all of them."""

    timesteps = 0

    def __init__(self, model: vdm.VDM, gamma_0: jax.Array):
        self.model, self.gamma_0 = model, gamma_0
        self.encode, self.decode, self.embed, self.eps_hat = model.encode, model.decode, model.embed, model.eps_hat
        self.observation_loss = model.observation_loss

    def gamma(self, t: jax.Array) -> jax.Array:
        return (1.0 - t) * self.gamma_0 + t * GAMMA_1

    def condition(self, gamma: jax.Array, label: jax.Array) -> tuple[jax.Array, ...]:
        return self.model.score.condition((gamma - self.gamma_0) / (GAMMA_1 - self.gamma_0), label)


class Trainer:
    """Trains networks of one size for any gamma_0, and evaluates them."""

    def __init__(self, images: Images, **changes):
        shape = (images.size, images.size, 1)
        self.config = medvdm.config.change(CONFIG, image_shape=shape, **changes)
        self.images, self.latent, settings = images, self.config.model.latent, self.config.training
        self.x = {split: jnp.asarray(x.reshape(-1, *shape)) for split, x in images.x.items()}
        graph, optimiser = vdm.graph_of(self.config.model), training.optimiser(settings)

        def loss(params, gamma_0, x, key):
            terms = vlb.bound(WithEnds(vdm.merge(graph, params), gamma_0), x, key=key)
            return jnp.mean(terms.total) / (LN2 * images.size**2)

        def step(carry, key):
            params, state, gamma_0 = carry
            key_rows, key_bound = jax.random.split(key)
            x = self.x["train"][jax.random.randint(key_rows, (settings.batch_size,), 0, len(self.x["train"]))]
            gradient = jax.grad(loss)(params, gamma_0, x, key_bound)
            updates, state = optimiser.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state, gamma_0), None

        def terms(params, gamma_0, x, key):
            model = WithEnds(vdm.merge(graph, params), gamma_0)
            draws = jax.lax.map(lambda k: vlb.bound(model, x, key=k), jax.random.split(key, 8))
            noise = jnp.exp(gamma_0)  # r^2
            bits = 0.5 * jnp.log2(1.0 + jnp.var(model.encode(x), axis=0) / noise)
            return draws.reconstruction.mean(0), (draws.prior + draws.diffusion).mean(0), bits

        self._init = lambda: (vdm.new_params(self.config.model, 0), optimiser)
        self._steps = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0])
        self._terms = jax.jit(terms)

    def __call__(self, gamma_0: float) -> dict:
        """Train from the same start; returns the row of the table."""
        start = time.process_time()
        settings = self.config.training
        params, optimiser = self._init()
        carry = (params, optimiser.init(params), jnp.asarray(gamma_0, jnp.float32))
        for keys in jnp.split(jax.random.split(jax.random.key(settings.seed), settings.steps), settings.steps // 100):
            carry = self._steps(carry, keys)
        row = {"latent": self.latent, "gamma_0": gamma_0, "width": self.config.model.embedding_dim}
        row |= {"steps": settings.steps}
        for split in data.SPLITS:
            x = self.x[split][: len(self.x["test"])]  # of the training images as many as of the test images
            reconstruction, rate, bits = self._terms(carry[0], carry[2], x, jax.random.key(1))
            reconstruction, rate = np.asarray(reconstruction, np.float64), np.asarray(rate, np.float64)
            if split == "train":
                excess = reconstruction - floor(self.images.x["train"][: len(x)])
                row |= {"train_excess_bits": rounded(excess.mean() / LN2), "train_rate_bits": rounded(rate.mean() / LN2)}
                row |= {"active": int(np.sum(np.asarray(bits) > 0.5))}  # latents whose signal is above the noise
            else:
                row |= {f"{split}_{k}": v for k, v in point(self.images, reconstruction, rate, split).items()}
        row["seconds"] = round(time.process_time() - start, 1)
        log(f"latent {self.latent}, gamma_0 {gamma_0:g}: val {row['val_total_bits']:.0f} bits over the floor")
        return row


def models(images: Images) -> list[dict]:
    rows = []
    for latent in LATENTS:
        trainer = Trainer(images, latent=latent)
        rows += [trainer(gamma_0) for gamma_0 in GAMMA_0]
    rows.append(Trainer(images, latent=256, embedding_dim=256)(-5.0))  # a score network as wide as the latent
    rows.append(Trainer(images, latent=64, steps=3000)(-5.0))  # three times as long
    return rows


def blur(images: Images) -> list[dict]:
    """Blurred test images as pictures: their excess, and what the second-order formula says."""
    x = images.x["test"][:32].reshape(-1, images.size, images.size)
    rows = []
    for width in (0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48):
        p = ndimage.gaussian_filter(x, (0, width, width), mode="nearest")
        flat, flat_p = x.reshape(len(x), -1), np.clip(p, baselines.CLIP, 1 - baselines.CLIP).reshape(len(x), -1)
        excess = images.bpd(baselines.cross_entropy(flat, flat_p) - floor(flat)).mean()
        second = np.mean((flat - flat_p) ** 2 / (2 * flat_p * (1 - flat_p)), dtype=np.float64) / LN2
        rmse = np.sqrt(np.mean((flat - flat_p) ** 2, dtype=np.float64))
        row = {"data": images.name, "size": images.size, "width_pixels": width, "rmse": rmse, "excess_bpd": excess}
        rows.append({k: rounded(v) if isinstance(v, float) else v for k, v in {**row, "second_bpd": second}.items()})
    return rows


def eight_bit(images: Images) -> dict:
    """The perfect picture under the *normalised* law, as a code for 8-bit values: bits per pixel."""
    x = images.x["test"].astype(np.float64)
    p = np.clip(x, baselines.CLIP, 1 - baselines.CLIP)
    logit = special.logit(p)
    near = np.abs(logit) < 1e-6
    integral = np.where(near, 0.5, (2 * p - 1) / np.where(near, 1.0, logit))
    cost = images.bpd(baselines.cross_entropy(x, p)).mean()
    constant = -np.log2(integral).mean()
    row = {"data": images.name, "size": images.size, "cross_entropy_bpd": rounded(cost)}
    return row | {"log2_constant_bpd": rounded(constant), "code_8bit_bpd": rounded(8 + cost - constant)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    data_dir = parser.parse_args().data_dir
    start = time.perf_counter()
    results: dict[str, list[dict]] = {
        name: [] for name in ("floors", "predictors", "linear", "water", "models", "blur", "eight_bit")
    }
    sets = [("phantom", s) for s in (32, 64, 128, 256)] + [("nih", s) for s in (32, 64, 128, 256)]
    for name, size in [*sets, ("pneumoniamnist", 28)]:
        images = Images(name, size, data_dir)
        results["floors"] += floors(images)
        results["predictors"] += predictors(images)
        if name == "nih" and size in (64, 256):
            by_k, water = linear(images)
            results["linear"] += by_k
            results["water"] += water
        if name == "nih" and size == 256:
            results["blur"] += blur(images)
            results["eight_bit"].append(eight_bit(images))
        if name == "nih" and size == 64:
            results["models"] += models(images)
    record.experiment(
        "rate-distortion", config=CONFIG, seconds=time.perf_counter() - start, results=results
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
