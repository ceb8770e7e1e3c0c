"""Fill in what is missing of an image, or draw a large image given a small one, by a run of a diffusion on pixels."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from medvdm.data import convert
from medvdm.data.files import parsed_window
from medvdm.errors import DataError, InputError
from medvdm.images import as_unit_float, channels_last, to_levels
from medvdm.models.inpaint import Seen, check, draws, with_cell_means
from medvdm.models.likelihoods import level_values
from medvdm.paths import local_path
from medvdm.runs import provenance as provenance_
from medvdm.runs.config import InpaintConfig, settings
from medvdm.runs.run import Run
from medvdm.runs.sample import findings_of
from medvdm.runs.store import check_place
from medvdm.theory.conditional import CellMean, Mask, Operator

DEFAULTS = InpaintConfig()


def inpaint(
    run: Run, images: np.ndarray, mask: np.ndarray, config: InpaintConfig = DEFAULTS, **changes: Any
) -> np.ndarray:
    """Draw the pixels under a mask, given all others.

    The known pixels are returned as they were, on 256 levels (:func:`medvdm.images.to_levels`). What is drawn is a
    guess that fits to them: it is no finding, and several draws show how far guesses differ.

    Args:
        run: of a diffusion on pixels, from :func:`medvdm.runs.run.load`.
        images: (n, h, w) or (n, h, w, c), of the run's size; uint8, or float in [0, 1].
        mask: (h, w) for all or (n, h, w), bool: True where a pixel is to be drawn, in all channels.
        config: the settings.
        changes: settings of :class:`medvdm.runs.config.InpaintConfig` by name: ``samples``, ``steps``, ``sampler``,
            ``turns``, ``label``, ``guidance``, ``seed``, ``batch_size``.

    Returns:
        (n, samples, h, w, c) uint8.

    Raises:
        InputError, InputTypeError: images or a mask that do not fit, or an empty or a full mask; a run in a latent
            space; an unknown setting or label, a bad count or seed.
        RunError: a label, or the null, that was not trained.
        DivergedError: the chain left the finite numbers.
    """
    config = settings(config, changes)
    shape = run.config.model.image_shape
    levels = to_levels(channels_last(np.asarray(images)))
    if levels.shape[1:] != shape:
        raise InputError(
            f"images: shape {levels.shape}; expected (n, {shape[0]}, {shape[1]}, {shape[2]}), as of the run"
        )
    missing = _missing(mask, len(levels), shape)[..., None]
    known = jnp.asarray(np.broadcast_to(~missing, (len(missing), *shape)), jnp.float32)
    y = known * level_values(jnp.asarray(levels))
    drawn = _draws(run, Seen(Mask(known), y, jnp.zeros_like(y)), config)
    return np.where(missing[:, None], drawn, levels[:, None])


def restore(
    run: Run,
    y: np.ndarray,
    operator: Operator,
    noise: float = 0.0,
    config: InpaintConfig = DEFAULTS,
    **changes: Any,
) -> np.ndarray:
    """Draw images x given y = A x + noise, for a linear operator A.

    ``CellMean(2)`` and ``CellMean(4)`` of :mod:`medvdm.theory.conditional` are super-resolution: y is an image with
    sides 2 or 4 times smaller. If it is uint8 and without noise, the means of the drawn pixels, rounded half up, are y.

    Args:
        run: of a diffusion on pixels.
        y: n of what A gives of gray values in [0, 1]; float, or uint8 for gray values from 0 to 255.
        operator: A. Of a run with ``reduce`` a :class:`medvdm.theory.conditional.Mask` or
            :class:`medvdm.theory.conditional.CellMean`; otherwise any.
        noise: s, the standard deviation of normal noise in y, in units of the gray values in [0, 1].
        config, changes: as :func:`inpaint`.

    Returns:
        (n, samples, h, w, c) uint8.

    Raises:
        as :func:`inpaint`; InputError for y of another shape than A gives, or noise below 0.
    """
    config = settings(config, changes)
    shape = run.config.model.image_shape
    check(run.config.model, operator)
    y = np.asarray(y)
    white = operator(jnp.ones((1, *shape)))
    if y.ndim != white.ndim or y.shape[1:] != white.shape[1:] or not len(y):
        raise InputError(
            f"y: shape {y.shape}; expected (n, {', '.join(map(str, white.shape[1:]))}), what the operator gives"
        )
    if not noise >= 0.0 or not np.isfinite(noise):
        raise InputError(f"noise: {noise}; expected 0 or more")
    if y.dtype == np.uint8:
        values = as_unit_float(y, "y")
    elif np.issubdtype(y.dtype, np.floating) and np.isfinite(y).all():
        values = y.astype(np.float32)
    else:
        raise InputError(f"y: {y.dtype} values that are no finite numbers; expected uint8, or finite floats")
    seen = 2.0 * values - white  # x on [-1, 1] is twice the gray value less 1, and A is linear
    variance = jnp.full(seen.shape, 4.0 * noise**2, jnp.float32)
    drawn = _draws(run, Seen(operator, seen, variance), config)
    if isinstance(operator, CellMean) and y.dtype == np.uint8 and noise == 0.0:
        flat = drawn.reshape(-1, *shape)
        drawn = with_cell_means(flat, np.repeat(y, config.samples, axis=0), operator.k).reshape(drawn.shape)
    return drawn


def inpaint_file(
    run: Run,
    path: str | Path,
    mask: str | Path,
    out: str | Path,
    config: InpaintConfig = DEFAULTS,
    **changes: Any,
) -> list[Path]:
    """Draw the pixels of an image file that another file marks; the result is a PNG, marked as partly synthetic.

    The PNG has the bit depth of the image, 8 or 16; the pixels that are kept have their values exactly. Those that are
    drawn have one of 256 gray values, which is all that the model knows.

    Args:
        run: of a diffusion on pixels.
        path: the image, of any kind that :mod:`medvdm.data.convert` reads, and of the run's size.
        mask: an image of the same size with two gray values, black where a pixel is kept.
        out: a PNG file; of several draws ``NAME-sample-1.png`` and so on, for ``NAME.png``.
        config, changes: as :func:`inpaint`.

    Returns:
        the files that were written.

    Raises:
        as :func:`inpaint`; DataError for a file that is no image of that size; MissingFileError for one that is not
            there, or where the folder of ``out`` is not; InputError where ``out`` is one of the other files.
    """
    config = settings(config, changes)
    check(run.config.model, Mask(jnp.ones((1, 1, 1, 1))))
    path, mask, out = local_path(path, "file"), local_path(mask, "mask"), local_path(out, "out")
    outs = _outs(out, config.samples, {"image": path, "mask": mask})
    height, width, channels = run.config.model.image_shape
    if channels != 1:
        raise InputError(f"run: of images with {channels} channels; expected 1, as files are read as gray")
    stored = convert.read_stored(path)
    gray = stored.gray(str(path), _window(run))
    if gray.shape != (height, width):
        raise DataError(f"{path}: found {_text(gray.shape)} pixels; expected {_text((height, width))}, the run's size")
    missing = _read_mask(mask, path, gray.shape)
    unit = as_unit_float(gray, str(path))
    drawn = inpaint(run, to_levels(unit)[None], missing, config)[0]
    count = int(missing.sum())
    share = f"{count:,} of {missing.size:,} pixels ({count / missing.size:.1%})"
    for number, (place, levels) in enumerate(zip(outs, drawn, strict=True), 1):
        which = f", draw {number} of {config.samples}" if config.samples > 1 else ""
        provenance_.write_processed(
            place,
            np.where(missing, as_unit_float(levels[..., 0]), unit),
            stored.bits,
            title=f"Partly synthetic image{which}",
            description=f"{share} were drawn by a variational diffusion model; the others are those of the image.",
            provenance=run.provenance(
                command="inpaint",
                image_sha256=_digest(path),
                mask_sha256=_digest(mask),
                pixels_drawn=count,
                draw=number,
                **{
                    name: getattr(config, name) for name in ("samples", "steps", "sampler", "turns", "guidance", "seed")
                },
                label=list(config.label),
            ),
        )
    return outs


def _draws(run: Run, seen: Seen, config: InpaintConfig) -> np.ndarray:
    """(n, samples, h, w, c) uint8."""
    findings = findings_of(run, config, 1)
    return draws(
        run.graph,
        run.params,
        seen,
        samples=config.samples,
        steps=config.steps,
        solver=config.sampler,
        turns=config.turns,
        labels=findings.astype(np.float32) if config.label else None,
        guidance=config.guidance,
        seed=config.seed,
        batch_size=config.batch_size,
    )


def _missing(mask: np.ndarray, n: int, shape: tuple[int, int, int]) -> np.ndarray:
    """(1, h, w) or (n, h, w) bool."""
    mask = np.asarray(mask)
    if mask.dtype != bool:
        raise InputError(f"mask: dtype {mask.dtype}; expected bool, True where a pixel is to be drawn")
    if mask.ndim == 2:
        mask = mask[None]
    if mask.shape not in {(1, *shape[:2]), (n, *shape[:2])}:
        raise InputError(f"mask: shape {mask.shape}; expected {shape[:2]}, or {(n, *shape[:2])}")
    for number, one in enumerate(mask):
        which = f" of image {number}" if len(mask) > 1 else ""
        if not one.any():
            raise InputError(f"mask{which}: marks no pixel; expected some to be drawn")
        if one.all():
            raise InputError(f"mask{which}: marks all pixels; expected some to be kept ('sample' draws whole images)")
    return mask


def _read_mask(mask: Path, path: Path, size: tuple[int, int]) -> np.ndarray:
    values = convert.read_gray(mask)
    if values.shape != size:
        raise DataError(f"{mask}: found {_text(values.shape)} pixels; expected {_text(size)}, those of {path}")
    grays = np.unique(values)
    if len(grays) > 2 or (len(grays) == 2 and grays[0] != 0):
        raise DataError(
            f"{mask}: found {len(grays)} gray values from {grays[0]:g} to {grays[-1]:g}; expected two, black where a "
            "pixel is kept and white where it is to be drawn"
        )
    if len(grays) == 1:
        what = "no pixel" if grays[0] == 0 else "all pixels"
        hint = "some to be drawn" if grays[0] == 0 else "some to be kept ('medvdm sample' draws whole images)"
        raise DataError(f"{mask}: marks {what}; expected {hint}")
    return values != 0


def _window(run: Run) -> tuple[float, float] | None:
    """The stored values that are black and white to the run."""
    window = parsed_window(run.config.data.window)
    if isinstance(window, tuple):
        return window
    if window == "full":
        return None
    raise InputError(
        f"run: trained with --window {window}, which its training images set; expected one trained with the whole "
        "range or --window=LOW,HIGH, or a call of medvdm.inpaint with arrays"
    )


def _outs(out: Path, samples: int, others: dict[str, Path]) -> list[Path]:
    if out.suffix.lower() != ".png":
        raise InputError(f"{out}: suffix '{out.suffix}'; expected .png")
    outs = [out] if samples <= 1 else [out.with_name(f"{out.stem}-sample-{i + 1}{out.suffix}") for i in range(samples)]
    for place in outs:
        check_place(place)
        for name, other in others.items():
            if place.exists() and other.exists() and place.samefile(other):
                raise InputError(f"out: {place} is the {name} itself; expected another file")
    return outs


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _text(size: tuple[int, ...]) -> str:
    return f"{size[1]} x {size[0]}"
