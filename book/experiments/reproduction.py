"""The paper reproduced: how trained runs do on patients, what law their z_1 has, and what that does to samples.

    python book/experiments/reproduction.py RUN... --data-dir DIR

RUN... are folders of `medvdm train`, all on the images of DIR. Written are book/results/reproduction.json and pictures
of synthetic images beside it. The first RUN is the one whose samples are drawn with the paper's T = 20,000.

Four questions, a table each:

* `bounds`: the bound on training, validation and test patients: does a run overfit? And `paired`: differences of two
  runs on the same test images, with their standard error over patients.
* `first_latent`: the law of z_1 over all images. Its covariance is S = alpha_1^2 Cov(f) + sigma_1^2 I, its mean is
  m = alpha_1 E[f]. The prior loss is exactly the sum of two numbers, `told` and `mismatch`:
      E KL(q(z_1|x) || N(0, I)) = (log det S - d log sigma_1^2) / 2  +  KL(N(m, S) || N(0, I)).
* `spectra`: mean and variance of each dimension of z_1, and the eigenvalues of S.
* `samples`: chains that start from N(0, I) against chains that start from N(m, S), and from z_1 of training images
  themselves, compared with encodings of test images. For the first run also with several T.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from medvdm import plotting
from medvdm.evaluation import held_out
from medvdm.evaluation.statistics import clustered_stderr
from medvdm.models import likelihoods, vdm
from medvdm.models.generate import Generated, generate
from medvdm.runs.presets import preset
from medvdm.runs.run import Run, load, load_data
from medvdm.runs.sample import sample
from medvdm.theory import gaussian
from scipy.spatial.distance import cdist

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_tools"))
import record

NAME = "reproduction"
CONFIG = preset("paper", batch_size=16, steps=3000)
SEED = 0
DRAWS = 2  # of time and noise per image, for the bound
CHAINS, STEPS = 192, 250  # for each start
MANY_CHAINS, MANY_STEPS = 64, (50, 250, 1_000, 20_000)  # of the first run


def label(run: Run) -> str:
    """A name that says which run it is and not where it lies."""
    training = run.config.training
    return f"{run.config.preset}-b{training.batch_size}-s{training.seed}"


def by_parts(function: Callable[[np.ndarray, int], Any], x: np.ndarray, size: int = 32) -> np.ndarray:
    """``function(part, number)`` of parts of x, joined. All parts have one shape, so it is compiled once."""
    out = []
    for number, start in enumerate(range(0, len(x), size)):
        part = x[np.minimum(np.arange(start, start + size), len(x) - 1)]
        out.append(np.asarray(function(part, number))[: len(x) - start])
    return np.concatenate(out)


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """NumPy's numbers and arrays as Python's, for JSON."""
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()}


# --- The bound ------------------------------------------------------------------------------------------------------


def bound(run: Run, x: np.ndarray) -> np.ndarray:
    """(3, n): reconstruction, diffusion and prior of each image in bits per dimension, means over draws."""

    def terms(part: np.ndarray, number: int) -> np.ndarray:
        key = jax.random.fold_in(jax.random.key(SEED), number)
        drawn = held_out.bound_terms(run.graph, run.params, part, None, draws=DRAWS, key=key)
        return np.stack([term.mean(axis=0) for term in drawn], axis=1)

    return by_parts(terms, x).T / (np.log(2) * run.config.model.dimensions)


def linear_gaussian(run: Run, x: np.ndarray) -> np.ndarray:
    """(n,): the bound of the linear-Gaussian VDM of each image, bits per dimension."""
    nats = by_parts(lambda part, _: np.add(*run.baselines.linear_gaussian(part)), x)
    return nats / (np.log(2) * run.config.model.dimensions)


def bound_row(name: str, split: str, terms: np.ndarray, x: np.ndarray, patients: np.ndarray) -> dict[str, Any]:
    """One row of `bounds`."""
    total = terms.sum(0)
    dimensions = x[0].size
    floor = np.asarray(likelihoods.bernoulli_floor(jnp.asarray(x))) / (np.log(2) * dimensions)
    return {
        "run": name,
        "split": split,
        "images": len(x),
        "patients": len(set(patients)),
        **dict(zip(held_out.TERMS, terms.mean(1), strict=True)),
        "vlb_bpd": total.mean(),
        "vlb_bpd_stderr": clustered_stderr(total, patients),
        "floor_bpd": floor.mean(),
        "excess_bpd": (total - floor).mean(),
        "excess_bpd_stderr": clustered_stderr(total - floor, patients),
        "rate_bits_per_image": terms[1:].sum(0).mean() * dimensions,
    }


# --- The law of z_1 -------------------------------------------------------------------------------------------------


def ends(run: Run) -> tuple[float, float]:
    """gamma_0 and gamma_1."""
    first, last = np.asarray(run.model.gamma(jnp.array([0.0, 1.0])))
    return float(first), float(last)


def encode(run: Run, x: np.ndarray) -> np.ndarray:
    """Encodings (n, d) of images, float64."""
    of = jax.jit(lambda params, x: vdm.merge(run.graph, params).encode(x))
    return by_parts(lambda part, _: of(run.params, part), x).astype(np.float64)


def moments(f: np.ndarray, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of z = alpha f + sigma eps over encodings f and noise."""
    alpha, sigma2 = float(gaussian.alpha(gamma)), float(gaussian.sigma2(gamma))
    return alpha * f.mean(0), alpha**2 * np.cov(f.T, bias=True) + sigma2 * np.eye(f.shape[1])


def first_latent(f: np.ndarray, gamma: float) -> dict[str, float]:
    """The prior loss and its two parts, in bits per image, and the moments of z_1."""
    mean, cov = moments(f, gamma)
    d, log_det = len(mean), np.linalg.slogdet(cov)[1]
    told = 0.5 * (log_det - d * np.log(float(gaussian.sigma2(gamma)))) / np.log(2)
    mismatch = 0.5 * (np.trace(cov) + mean @ mean - d - log_det) / np.log(2)
    values = np.linalg.eigvalsh(cov)[::-1]
    return {
        "gamma_1": gamma,
        "mean_square_of_f": (f**2).mean(),
        "second_moment_of_z1": (np.trace(cov) + mean @ mean) / d,  # 1 for N(0, I)
        "squared_mean_of_z1": mean @ mean / d,  # 0 for N(0, I)
        "prior_bits": told + mismatch,
        "told_bits": told,
        "mismatch_bits": mismatch,
        "largest_eigenvalue": values[0],
        "eigenvalues_above_1": int((values > 1).sum()),
        "variance_in_largest_8": values[:8].sum() / values.sum(),
    }


# --- Samples --------------------------------------------------------------------------------------------------------


def decode(run: Run, z0: np.ndarray) -> np.ndarray:
    """Images (n, h, w, c) of latents z_0, as the sampler shows them."""
    scale = gaussian.alpha(run.model.gamma(jnp.zeros(())))
    show = jax.jit(lambda params, z: likelihoods.bernoulli_mean(vdm.merge(run.graph, params).decode(z / scale)))
    return by_parts(lambda part, _: show(run.params, part), z0)


def energy(a: np.ndarray, b: np.ndarray) -> float:
    """Energy distance of two samples of points over twice their mean distance: 0 if of one law, at most 1."""

    def within(x: np.ndarray) -> float:
        return cdist(x, x).sum() / (len(x) * (len(x) - 1))

    between = cdist(a, b).mean()
    return (2 * between - within(a) - within(b)) / (2 * between)


def sample_row(images: np.ndarray, z0: np.ndarray, others: np.ndarray, **what: Any) -> dict[str, Any]:
    """What a set of images and their latents z_0 look like, and how far the latents are from those of test images."""
    size, gray, contrast = (z0**2).sum(1), images.mean((1, 2, 3)), images.std((1, 2, 3))
    low, middle, high = np.quantile(size, (0.05, 0.5, 0.95))
    return {
        **what,
        "number": len(images),
        "size_mean": size.mean(),  # of |z_0|^2
        "size_5": low,
        "size_50": middle,
        "size_95": high,
        "gray_mean": gray.mean(),
        "gray_sd": gray.std(ddof=1),
        "contrast_mean": contrast.mean(),  # deviation of the pixels of an image
        "contrast_sd": contrast.std(ddof=1),
        "variety": images.std(0, ddof=1).mean(),  # deviation of a pixel over the images
        "energy": 0.0 if z0 is others else energy(z0, others),
    }


def starts(f: np.ndarray, gamma: float, num: int) -> dict[str, np.ndarray]:
    """Latents at t = 1: from N(0, I), from the Gaussian of the same moments as z_1, and z_1 of the images themselves.

    The first two share their random numbers, so that samples can be compared pair by pair.
    """
    rng = np.random.default_rng(SEED)
    eps = rng.standard_normal((num, f.shape[1]))
    mean, cov = moments(f, gamma)
    values, vectors = np.linalg.eigh(cov)
    chosen = f[rng.choice(len(f), num, replace=num > len(f))]
    return {
        "N(0, I)": eps,
        "N(m, S)": mean + eps @ (vectors * np.sqrt(values)) @ vectors.T,
        "images": float(gaussian.alpha(gamma)) * chosen + float(gaussian.sigma(gamma)) * eps,
    }


def draw(run: Run, steps: int, z: np.ndarray) -> Generated:
    """Chains from given latents at t = 1."""
    return generate(run.graph, run.params, num=len(z), steps=steps, z=z, seed=SEED)


# --- Pictures -------------------------------------------------------------------------------------------------------


def save(name: str, figure: Any) -> None:
    """A PNG of every second gray: smaller, with no difference to the eye."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    image = Image.open(buffer).convert("L").point(lambda gray: gray & ~1)
    path = record.RESULTS / f"{NAME}-{name}.png"
    image.save(path, optimize=True)
    record.say(path.name, f"{path.stat().st_size:,} bytes")


def half(images: np.ndarray) -> np.ndarray:
    """Half the size, by means over 2 x 2 pixels; images below 256 pixels stay as they are."""
    *front, h, w, c = images.shape
    return images if h < 256 else images.reshape(*front, h // 2, 2, w // 2, 2, c).mean((-4, -2))


def rows(named: dict[str, np.ndarray]) -> Any:
    """A sheet with one set of images per row and its name above."""
    columns = len(next(iter(named.values())))
    titles = [name if i == 0 else "" for name in named for i in range(columns)]
    return plotting.image_grid(
        half(np.concatenate(list(named.values()))),
        synthetic=True,
        columns=columns,
        titles=titles,
    )


# --- All together ---------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("run", nargs="+", type=Path, help="folder of a finished run")
    options.add_argument("--data-dir", help="folder of the images")
    return options


def main(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)
    begin = time.perf_counter()
    tables: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("bounds", "paired", "first_latent", "spectra", "samples")
    }
    totals: dict[str, np.ndarray] = {}  # of the test images
    data = load_data(load(options.run[0]), data_dir=options.data_dir)
    x = {split: data.read(data.indices(split)) for split in ("train", "val", "test")}
    patients = {split: data.patients[data.indices(split)] for split in x}

    for position, folder in enumerate(options.run):
        run = load(folder)
        name = label(run)
        gamma_0, gamma_1 = ends(run)
        record.say(name, "bound")
        for split in x:
            terms = bound(run, x[split])
            tables["bounds"].append(bound_row(name, split, terms, x[split], patients[split]))
            if split == "test":
                totals[name] = terms.sum(0)
        if "linear" not in totals:
            totals["linear"] = linear_gaussian(run, x["test"])

        record.say(name, "z_1")
        f = {split: encode(run, images) for split, images in x.items()}
        for split in ("train", "test"):
            tables["first_latent"].append({"run": name, "split": split} | first_latent(f[split], gamma_1))
        law = {split: moments(f[split], gamma_1) for split in ("train", "test")}
        spectrum = {
            "run": name,
            "eigenvalues": np.linalg.eigvalsh(law["train"][1])[::-1],
        }
        for split, (mean, cov) in law.items():
            spectrum |= {f"mean_{split}": mean, f"variance_{split}": np.diag(cov)}
        tables["spectra"].append(spectrum)

        record.say(name, "samples")
        rng = np.random.default_rng(SEED)
        scale = np.sqrt(float(gaussian.sigma2(gamma_0)))
        z0 = {s: float(gaussian.alpha(gamma_0)) * v + scale * rng.standard_normal(v.shape) for s, v in f.items()}
        for split in ("test", "train"):
            what = {"run": name, "start": f"encodings, {split}", "steps": 0}
            tables["samples"].append(sample_row(decode(run, z0[split]), z0[split], z0["test"], **what))
        counts = (run.config.model.timesteps, STEPS) if run.config.model.timesteps else (STEPS,)
        shown: dict[str, np.ndarray] = {}
        for start, z in starts(f["train"], gamma_1, CHAINS).items():
            for steps in counts:
                drawn = draw(run, steps, z)
                what = {"run": name, "start": start, "steps": steps}
                tables["samples"].append(sample_row(drawn.images, drawn.latents[-1], z0["test"], **what))
                if start != "images":  # those would show a reconstruction of a patient's image
                    shown[f"{start}, T = {steps:,}"] = drawn.images[:5]
        if position == 0 or run.config.model.timesteps:
            save(
                "literal-starts" if run.config.model.timesteps else "starts",
                rows(shown),
            )

        if position == 0:
            many = {}
            for steps in MANY_STEPS:
                record.say(name, "T =", steps)
                drawn = generate(run.graph, run.params, num=MANY_CHAINS, steps=steps, seed=SEED)
                what = {"run": name, "start": "N(0, I), fewer chains", "steps": steps}
                tables["samples"].append(sample_row(drawn.images, drawn.latents[-1], z0["test"], **what))
                many[f"T = {steps:,}"] = drawn.images[:5]
            save(
                "samples",
                plotting.image_grid(half(drawn.images[:16]), synthetic=True, columns=4),
            )
            save("steps", rows(many))
            chain = sample(run, num=3, steps=1_000, num_states=8, seed=SEED)
            gammas = np.asarray(run.model.gamma(jnp.asarray(chain.times, jnp.float32)))
            save(
                "reverse",
                plotting.strip(half(chain.states), chain.times, gammas=gammas, synthetic=True),
            )

    names = list(totals)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            difference = totals[one] - totals[other]
            tables["paired"].append(
                {
                    "run": one,
                    "minus": other,
                    "difference_bpd": difference.mean(),
                    "stderr": clustered_stderr(difference, patients["test"]),
                }
            )
    results = {name: [plain(row) for row in table] for name, table in tables.items()}
    record.experiment(NAME, config=CONFIG, seconds=time.perf_counter() - begin, results=results)


if __name__ == "__main__":
    main(sys.argv[1:])
