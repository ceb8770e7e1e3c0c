"""Remove noise from images with a diffusion on pixels: arrays, and files as they come from an archive."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medvdm.data import convert
from medvdm.errors import DataError, DivergedError, InputError, MedvdmError, MissingFileError, RunError
from medvdm.evaluation.noise_level import estimated
from medvdm.images import as_unit_float, channels_last
from medvdm.models import denoise as models_denoise
from medvdm.models.generate import MAX_STEPS
from medvdm.paths import local_path
from medvdm.runs.config import DenoiseConfig, settings
from medvdm.runs.provenance import text_of, write_processed
from medvdm.runs.run import Run
from medvdm.runs.sample import check_seed
from medvdm.runs.store import atomic
from medvdm.theory.anscombe import stabilised, unstabilised
from medvdm.theory.clipping import unclipped

DEFAULTS = DenoiseConfig()
_BEYOND = 8.0  #: deviations of the noise; no pixel of ten million is as far from the truth


@dataclass(frozen=True, kw_only=True)
class Denoised:
    """Images without their noise, and what is not known of them.

    Attributes:
        mean: (n, h, w, c) float32 in [0, 1], the posterior means.
        draws: (n, k, h, w, c) float32 in [0, 1], draws from the posterior of each image.
        noise: (n,) deviation of the noise that was removed, on the scale of the network: gray values on [0, 1], after
            the stabilising transform where there is a gain. 0 where it was estimated and is less than the model knows:
            these images are returned as they were.
        provenance: run, version, settings, ...
    """

    mean: np.ndarray
    draws: np.ndarray
    noise: np.ndarray
    provenance: dict[str, Any]

    @property
    def spread(self) -> np.ndarray:
        """(n, h, w, c), the standard deviation of the draws of each pixel: where it is large, y does not tell.

        Raises:
            InputError: fewer than 2 draws.
        """
        if self.draws.shape[1] < 2:
            raise InputError(f"samples: {self.draws.shape[1]}; expected at least 2, for their spread")
        return self.draws.std(axis=1, ddof=1)


def denoise(run: Run, images: np.ndarray, config: DenoiseConfig = DEFAULTS, **changes: Any) -> Denoised:
    """Remove noise from images of any one size, whose pixels are as large as those of the run's images.

    Args:
        run: from :func:`medvdm.load`, of a diffusion on pixels.
        images: (n, h, w) or (n, h, w, c); uint8, or float with the gray scale from 0 to 1, out of which noise may have
            led. Of uint8 images the truth is taken to have whole gray values, of others not. Noise that was cut off at
            black or white has another mean there, which is made good (:mod:`medvdm.theory.clipping`).
        config: the settings.
        changes: settings of :class:`medvdm.runs.config.DenoiseConfig` by name: ``noise``, ``gain``, ``samples``,
            ``steps``, ``seed``.

    Raises:
        RunError: a run in latent space, or a conditional one whose null was not trained.
        InputError: an unknown setting; noise that is not within the model's range; images of another shape, or with
            values that no noise explains.
        InputTypeError: images of another type.
        DivergedError: the answer is not finite.
    """
    config = settings(config, changes)
    _check(run, config)
    images = channels_last(np.asarray(images))
    eight_bit = images.dtype == np.uint8
    if images.shape[3] != run.config.model.image_shape[2]:
        raise InputError(
            f"images: shape {images.shape}; expected {run.config.model.image_shape[2]} channels, as the run"
        )
    ones = [_one(run, image, config, eight_bit) for image in _floats(images)]
    return Denoised(
        mean=np.stack([one.mean for one in ones]),
        draws=np.stack([one.draws for one in ones]),
        noise=np.array([one.noise for one in ones]),
        provenance=_provenance(run, config),
    )


# --- One image ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _One:
    mean: np.ndarray  # (h, w, c)
    draws: np.ndarray  # (k, h, w, c)
    noise: float


def _one(run: Run, y: np.ndarray, config: DenoiseConfig, eight_bit: bool) -> _One:
    """One image (h, w, c), on the scale of the network and back."""
    least, most = models_denoise.noise_range(run.model)
    if config.gain:
        noise = _stable_noise(config)
    elif config.noise == "auto":
        noise = float(np.mean([estimated(y[..., c]) for c in range(y.shape[2])]))
        if noise < least:
            return _One(np.clip(y, 0.0, 1.0), np.repeat(np.clip(y, 0.0, 1.0)[None], config.samples, axis=0), 0.0)
        if noise > most:
            raise InputError(f"noise: {noise:.3g}, as estimated; expected at most {most:.3g}, the most the run knows")
    else:
        noise = float(config.noise)
    deviation = (config.gain + float(config.noise) ** 2) ** 0.5 if config.gain else noise
    low, high = float(y.min()), float(y.max())
    if not (low >= -_BEYOND * deviation and high <= 1 + _BEYOND * deviation):  # written so that NaN fails too
        raise InputError(
            f"images: values from {low:g} to {high:g}; expected 0 to 1 and what noise of {deviation:.3g} adds "
            "(divide by the largest value that your source can hold)"
        )
    into, back = _scales(config, noise, clipped=low == 0.0 and high <= 1.0 or high == 1.0 and low >= 0.0)
    u = jnp.asarray(into(y), jnp.float32)
    shared = {"graph": run.graph}
    rounding = eight_bit and not config.gain
    mean = models_denoise.mean(run.params, u[None], jnp.full((1,), noise), rounding=rounding, **shared)[0]
    size = max(1, min(config.samples, models_denoise.WHOLE // (y.shape[0] * y.shape[1])))
    draws = [
        models_denoise.draws(
            run.params, u, jnp.float32(noise), config.seed, first + np.arange(size), config.steps, **shared
        )
        for first in range(0, config.samples, size)  # the last is filled up: one compilation
    ]
    found = jax.device_get([mean, *draws])
    if not all(np.isfinite(a).all() for a in found):
        raise DivergedError("denoising: a pixel is not finite; expected finite numbers (is a weight not finite?)")
    drawn = np.concatenate([np.empty((0, *y.shape), np.float32), *found[1:]])[: config.samples]
    return _One(back(found[0]).astype(np.float32), back(drawn).astype(np.float32), noise)


_Change = Callable[[np.ndarray], np.ndarray]


def _scales(config: DenoiseConfig, noise: float, *, clipped: bool) -> tuple[_Change, _Change]:
    """From gray values to the scale of the network, on which noise is the same everywhere, and back.

    An image that reaches an end of the gray scale and nowhere exceeds it has been clipped there, which the way back
    undoes.
    """
    if not config.gain:
        return lambda y: y, lambda x: unclipped(x, noise) if clipped else x
    low, high = _stable_ends(config)
    return (
        lambda y: (stabilised(y, config.gain, float(config.noise)) - low) / (high - low),
        lambda u: np.clip(unstabilised(low + (high - low) * u, config.gain, float(config.noise)), 0.0, 1.0),
    )


def _stable_ends(config: DenoiseConfig) -> tuple[float, float]:
    low, high = stabilised(np.array([0.0, 1.0]), config.gain, float(config.noise))
    return float(low), float(high)


def _stable_noise(config: DenoiseConfig) -> float:
    """The deviation of stabilised noise, 1, where black is 0 and white is 1."""
    low, high = _stable_ends(config)
    return 1.0 / (high - low)


def _floats(images: np.ndarray) -> np.ndarray:
    """Images on [0, 1], out of which floats may lead."""
    return images.astype(np.float32) if np.issubdtype(images.dtype, np.floating) else as_unit_float(images)


def _check(run: Run, config: DenoiseConfig) -> None:
    """Refuse what no image can change."""
    check_seed(config.seed)
    architecture = run.model.architecture
    if not (architecture.on_pixels and architecture.any_size):
        raise RunError(
            f"{run.path}: a diffusion in latent space (architecture '{run.config.model.architecture}'); expected one "
            "on pixels, such as preset pixel or pixel-large"
        )
    run.require_trained(null=True)
    for name, value, least in (("samples", config.samples, 0), ("steps", config.steps, 1)):
        if not least <= value <= MAX_STEPS:
            raise InputError(f"{name}: {value}; expected {least} to {MAX_STEPS}")
    least, most = models_denoise.noise_range(run.model)
    if not 0.0 <= config.gain < np.inf:
        raise InputError(f"gain: {config.gain}; expected gray values per photon, or 0 for none")
    if config.noise == "auto":
        if config.gain:
            raise InputError(
                f"noise: 'auto' with gain {config.gain:g}; expected the deviation of the electronic noise, 0 for none"
            )
        return
    if isinstance(config.noise, str):
        raise InputError(f"noise: '{config.noise}'; expected a number, or 'auto'")
    if config.gain:
        if not 0.0 <= config.noise < np.inf:
            raise InputError(f"noise: {config.noise:g}; expected 0 or more, the deviation of the electronic noise")
        if not least <= _stable_noise(config) <= most:
            raise InputError(
                f"gain: {config.gain:g} with noise {config.noise:g} is noise of {_stable_noise(config):.3g} on the "
                f"stabilised gray scale; expected from {least:.2g} to {most:.2g}, which the run was trained on"
            )
    elif not least <= config.noise <= most:
        raise InputError(
            f"noise: {config.noise:g}; expected a deviation from {least:.2g} to {most:.2g} in gray values on [0, 1], "
            "which the run was trained on, or 'auto'"
        )


def _provenance(run: Run, config: DenoiseConfig, **more: Any) -> dict[str, Any]:
    return run.provenance(
        processing="denoise",
        noise=config.noise,
        gain=config.gain,
        samples=config.samples,
        steps=config.steps,
        seed=config.seed,
        **more,
    )


# --- Files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one file.

    Attributes:
        file: as it was given.
        written: the files that were written; none where there is an error.
        noise: as :class:`Denoised` has it.
        notes: what is to be known about the result.
        error: why the file could not be read or denoised, in one line; None if it was.
    """

    file: Path
    written: tuple[Path, ...] = ()
    noise: float = 0.0
    notes: tuple[str, ...] = ()
    error: MedvdmError | None = None


def denoise_files(
    run: Run,
    files: Sequence[str | Path],
    out: str | Path,
    config: DenoiseConfig = DEFAULTS,
    *,
    done: Callable[[Result], None] = lambda result: None,
    **changes: Any,
) -> list[Result]:
    """Remove the noise of image files, one after the other: PNG, JPEG, TIFF, BMP or DICOM, of 1 to 16 bits, or float.

    Of a file NAME.*, ``out`` gets

    - ``NAME.png``, the posterior mean. Upright, and bright is large, also where the file says that large is dark;
      16 bits where the file has more than 8.
    - ``NAME-sample-1.png``, ..., draws from the posterior.
    - ``NAME-std.png`` from two draws on, the standard deviation of the draws of each pixel. White is the largest; how
      much that is stands in the file.
    - ``NAME.dcm`` of a DICOM file: the mean as a derived image of the same bits, photometric interpretation and window,
      with UIDs of its own (:func:`medvdm.data.dicom.derived`).

    All are marked as processed. A file that cannot be read is passed over, and its result has an ``error``. Each file
    is written as a whole or not at all, and replaces an older one.

    Args:
        run, config, changes: as of :func:`denoise`.
        files: the files.
        out: the folder; made if it is not there.
        done: called with each result.

    Raises:
        RunError: as :func:`denoise`; also a run of colour images, or of images under a window of stored values.
        InputError: as :func:`denoise`; also no files, two files whose results would have one name, or a result in place
            of a file that is read.
        MissingFileError: the folder of ``out`` is not there.
        OSError: a result cannot be written.
    """
    config = settings(config, changes)
    _check(run, config)
    if run.config.model.image_shape[2] != 1:
        raise RunError(
            f"{run.path}: a model of {run.config.model.image_shape[2]} channels; expected one of gray images"
        )
    if run.config.data.window != "full":
        raise RunError(
            f"{run.path}: trained on images under the window '{run.config.data.window}', where files are read over "
            "their whole range; expected window 'full', or a call from Python with the images under that window"
        )
    folder = local_path(out, "out")
    paths = [local_path(file, "FILE") for file in files]
    _check_names(paths, folder, config.samples)
    series: dict[str, str] = {}
    results = []
    for path in paths:
        try:
            result = _file(run, path, folder, config, series)
        except MedvdmError as problem:
            result = Result(file=path, error=problem)
        results.append(result)
        done(result)
    return results


def _names(path: Path, samples: int) -> dict[str, str]:
    """What may be written of a file: what it is, and its name."""
    stem = path.stem
    names = {"mean": f"{stem}.png", "dicom": f"{stem}.dcm"}
    names |= {f"sample {i}": f"{stem}-sample-{i}.png" for i in range(1, samples + 1)}
    return names | ({"std": f"{stem}-std.png"} if samples > 1 else {})


def _check_names(paths: Sequence[Path], folder: Path, samples: int) -> None:
    if not paths:
        raise InputError("FILE: none given; expected at least one image file")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"out: {folder} is a file; expected a folder, or nothing")
    if not folder.absolute().parent.is_dir():
        raise MissingFileError(f"out: {folder}: the folder {folder.parent} is not there; expected an existing one")
    read = {path.resolve(): path for path in paths}
    taken: dict[str, Path] = {}
    for path in paths:
        for name in _names(path, samples).values():
            other = taken.setdefault(name.casefold(), path)  # some disks do not tell A from a
            if other is not path:
                raise InputError(f"FILE: {other} and {path} would both be written as {name}; expected different names")
            if (folder / name).resolve() in read:
                raise InputError(f"out: {folder / name} is one of the files to be read; expected another folder")


def _file(run: Run, path: Path, folder: Path, config: DenoiseConfig, series: dict[str, str]) -> Result:
    header = convert.header(path)
    stored = convert.read_stored(path)
    gray = stored.gray(str(path))
    try:
        one = _one(run, as_unit_float(gray, str(path))[..., None], config, eight_bit=stored.bits == 8)
    except InputError as problem:
        raise DataError(f"{path}: {problem}") from None
    notes = _notes(run, header, one, config)
    names = {what: folder / name for what, name in _names(path, config.samples).items()}
    from_where = {"source": text_of(path.name), "source_sha256": _sha256(path), "notes": notes}
    provenance = _provenance(run, config, **from_where, removed_noise=one.noise)
    write = partial(write_processed, bits=stored.bits)
    folder.mkdir(exist_ok=True)
    written = []
    for i, draw in enumerate(one.draws, start=1):
        written.append(names[f"sample {i}"])
        write(
            written[-1],
            draw[..., 0],
            title=f"Sample {i} of {config.samples}, denoised",
            description="One of several images that agree with a noisy one: a draw from the posterior.",
            provenance=provenance | {"what": "posterior draw", "sample": i},
        )
    if config.samples > 1:
        spread = one.draws[..., 0].std(axis=0, ddof=1)
        white = float(spread.max()) or 1.0
        written.append(names["std"])
        write(
            written[-1],
            spread / white,
            title="Map of doubt",
            description=f"Standard deviation of {config.samples} posterior draws of each pixel; white is {white:.6g} "
            "on the gray scale from 0 to 1.",
            provenance=provenance | {"what": "posterior standard deviation", "white": white},
        )
    if convert.kind_of(path) == "DICOM":
        lacking = convert.not_derivable(path)
        if lacking:
            notes = (*notes, f"no DICOM file is written: {lacking}")
        else:
            written.append(names["dicom"])
            content = convert.derived_dicom(path, one.mean[..., 0], _dicom_text(run, one, config), series)
            with atomic(written[-1]) as file:
                file.write(content)
    written.append(names["mean"])
    write(
        written[-1],
        one.mean[..., 0],
        title="Denoised image",
        description="The mean of all images that agree with a noisy one: the posterior mean.",
        provenance=provenance | {"what": "posterior mean", "notes": notes},
    )
    return Result(file=path, written=tuple(written), noise=one.noise, notes=notes)


def _notes(run: Run, header: convert.Header, one: _One, config: DenoiseConfig) -> tuple[str, ...]:
    """What is to be known about a result."""
    notes = list(header.remarks)
    height, width, _ = run.config.model.image_shape
    if (header.height, header.width) != (height, width):
        notes.append(
            f"{header.width} x {header.height} pixels, the run's images have {width} x {height}: taken pixel by pixel, "
            "as if pixels were of the same size"
        )
    if not one.noise:
        least = models_denoise.noise_range(run.model)[0]
        notes.append(f"the estimated noise is below {least:.2g}, the least that the run knows: left as it was")
    elif config.noise == "auto":
        notes.append(f"noise of {one.noise:.4f} was estimated")
    return tuple(notes)


def _dicom_text(run: Run, one: _One, config: DenoiseConfig) -> str:
    return (
        f"Denoised by medvdm {run.record['version']}, posterior mean of a diffusion model for noise of deviation "
        f"{one.noise:.4g} of the gray scale{f', stabilised for a gain of {config.gain:g}' if config.gain else ''}. "
        "It can remove or invent detail. Not for clinical use."
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
