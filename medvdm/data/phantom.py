"""A procedural frontal chest radiograph: the data set that is always there, with every true factor known.

An image is a map of how much the beam is attenuated (tissue adds, air subtracts, bone adds), passed through a
film curve, softened, and covered with noise. Everything is drawn from (seed, patient) or (seed, image), in
coordinates that do not depend on the number of pixels, so the same index is the same picture at every size.

Orientation is that of a radiograph on a viewing box: the image's left is the patient's right. So the heart's
apex points to the image's right, and the diaphragm is higher on the image's left. Bone is bright, air is dark.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

import numpy as np

from medvdm.data.base import ImageData, Reading, split_of_patient
from medvdm.errors import InputError, InputTypeError, nearest

CLASS_NAMES = ("No Finding", "Pneumonia")

MIN_SIZE, MAX_SIZE = 8, 1024
MAX_OPACITIES = 3
VISITS = 2  # images per patient, unless a call asks for others
DRAWING = 1  # enters the fingerprint; to be raised by whoever changes what is drawn
CACHE_BYTES = 256 * 2**20

_DRAWN_AT_LEAST = 48  # smaller images are drawn larger and averaged: ribs 3 pixels apart would alias
_CHUNK_PIXELS = (
    32 * 64 * 64
)  # what a thread draws at a time: fewer calls of numpy when larger, fewer cache misses when smaller
_PATIENT_STREAM, _IMAGE_STREAM = 0, 1  # and 2, 3, ... of the third and later visits
_WARP_CELLS, _MOTTLE_CELLS, _GRAIN_CELLS = 6, 11, 40  # grid points a side of the three smooth random fields


@dataclass(frozen=True, kw_only=True)
class PhantomFactors:
    """What an image was drawn from: one row per image; lengths are fractions of the image's side.

    The first block belongs to the patient and is the same at all visits; the second to the image. Anatomical
    lengths are given before ``zoom``. Positions of opacities are in the image: x to the right, y down, from 0 to 1.

    Attributes:
        patient: (n,) int, index // visits.
        thorax_width: (n,) widest distance between the inner edges of the rib cage.
        lung_height: (n,) from the apex of the lung to the top of the right dome, at full inspiration.
        lung_top: (n,) y of the apex of the lungs.
        cardiothoracic_ratio: (n,) width of the heart / ``thorax_width``.
        heart_slant: (n,) sideways shift of the heart a unit of height: how far its apex points to the image's right.
        aortic_knob: (n,) radius of the aortic knob.
        dome_difference: (n,) how much the left dome of the diaphragm is lower than the right one.
        rib_spacing: (n,) vertical distance between two posterior ribs.
        rib_slope: (n,) how strongly ribs bend down to the side (1 / image side).
        bone_density: (n,) contrast of bone, 1 on average.
        obesity: (n,) 0 (thin) to 1: wider outline, more soft tissue over the lungs, fainter bones.
        breast: (n,) attenuation of breast shadows, 0 for half of the patients.
        shoulder_height: (n,) how far the shoulders' outline, followed to the midline, is above the apex of the lungs.

        index: (n,) int, the index of the image.
        label: (n,) int, position in ``CLASS_NAMES``.
        inspiration: (n,) lung height at this visit / ``lung_height``.
        tilt: (n,) radians, clockwise.
        zoom: (n,) magnification; below 1 shows more of the body.
        shift_x: (n,) displacement of the body to the right.
        shift_y: (n,) displacement of the body down.
        exposure: (n,) gain of the film curve, about 1; higher is brighter.
        black: (n,) grey level of no attenuation.
        white: (n,) grey level of endless attenuation.
        tone: (n,) bend of the grey scale, -0.35 (darker mid-tones) to 0.5 (brighter).
        softness: (n,) 0 (sharp) to 1 (blurred with a standard deviation of 0.008).
        noise: (n,) standard deviation of the noise per pixel at mid-grey, in grey levels of [0, 1], at every size.
        collimation: (n, 4) width of the dark border on the left, right, top and bottom; 0 where there is none.
        stomach_gas: (n,) radius of the stomach bubble, 0 where there is none.
        num_opacities: (n,) int, 0 for 'No Finding', else 1 to 3; so many columns of the following are used.
        opacity_x: (n, 3) centre in the image, across, 0 where unused.
        opacity_y: (n, 3) centre in the image, down, 0 where unused.
        opacity_radius: (n, 3) radius in the image, 0 where unused.
        opacity_strength: (n, 3) share of the lung's air that is filled at the centre, 0 where unused.
    """

    patient: np.ndarray
    thorax_width: np.ndarray
    lung_height: np.ndarray
    lung_top: np.ndarray
    cardiothoracic_ratio: np.ndarray
    heart_slant: np.ndarray
    aortic_knob: np.ndarray
    dome_difference: np.ndarray
    rib_spacing: np.ndarray
    rib_slope: np.ndarray
    bone_density: np.ndarray
    obesity: np.ndarray
    breast: np.ndarray
    shoulder_height: np.ndarray

    index: np.ndarray
    label: np.ndarray
    inspiration: np.ndarray
    tilt: np.ndarray
    zoom: np.ndarray
    shift_x: np.ndarray
    shift_y: np.ndarray
    exposure: np.ndarray
    black: np.ndarray
    white: np.ndarray
    tone: np.ndarray
    softness: np.ndarray
    noise: np.ndarray
    collimation: np.ndarray
    stomach_gas: np.ndarray
    num_opacities: np.ndarray
    opacity_x: np.ndarray
    opacity_y: np.ndarray
    opacity_radius: np.ndarray
    opacity_strength: np.ndarray

    def __getitem__(self, rows: slice) -> PhantomFactors:
        """The factors of some of the images."""
        return PhantomFactors(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


def render(
    indices: np.ndarray,
    *,
    size: int = 64,
    seed: int = 0,
    visits: int = VISITS,
    changes: Mapping[str, np.ndarray] | None = None,
) -> tuple[np.ndarray, PhantomFactors]:
    """Draw the images with these indices.

    Args:
        indices: (n,) integers of 0 or more; i is visit i % visits of patient i // visits.
        size: pixels a side, 8 to 1024.
        seed: 0 or more; another seed is another set of patients.
        visits: images of each patient, 1 or more: one anatomy on other days, so another pose, inspiration, exposure
            and opacities.
        changes: factors to replace, by name, one value per image; all others and the noise stay as they are.

    Returns:
        float32 of shape (n, size, size, 1) in [0, 1], and the factors. An image depends on (seed, patient, visit,
        size) alone: it is the same to the last bit in every batch, and whatever ``visits`` is. Its factors do not
        depend on the size either.

    Raises:
        InputTypeError: indices that are not integers.
        InputError: a negative index or seed; a size outside 8 to 1024; visits below 1; an unknown factor, or not a
            value per image.
    """
    _check_size(size, "size")
    _check_seed(seed)
    _check_visits(visits)
    indices = np.asarray(indices)
    if indices.ndim != 1:
        raise InputError(f"indices: shape {indices.shape}; expected one dimension")
    if indices.size and not np.issubdtype(indices.dtype, np.integer):
        raise InputTypeError(f"indices: dtype {indices.dtype}; expected integers")
    if indices.size and indices.min() < 0:
        raise InputError(f"indices: {int(indices.min())}; expected 0 or more")
    indices = indices.astype(np.int64)
    images = np.empty((len(indices), size, size, 1), np.float32)
    factors, generators = _draw_factors(indices, seed, visits)
    factors = _changed(factors, changes or {})
    step = max(1, _CHUNK_PIXELS // size**2)

    def draw(start: int) -> None:
        rows = slice(start, start + step)
        images[rows, ..., 0] = _render_chunk(factors[rows], generators[rows], size)

    starts = range(0, len(indices), step)
    if len(starts) < 2:
        for start in starts:
            draw(start)
    else:  # numpy lets go of the interpreter lock, so threads use all processors
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(draw, starts))  # list(): an exception in a thread is raised here
    return images, factors


def _changed(factors: PhantomFactors, changes: Mapping[str, np.ndarray]) -> PhantomFactors:
    """With some columns replaced; raises InputError for an unknown name or another shape."""
    known = [f.name for f in fields(PhantomFactors) if f.name not in ("patient", "index")]
    columns = {}
    for name, values in changes.items():
        if name not in known:
            raise InputError(f"changes: '{name}'; {nearest(name, known)}")
        old = getattr(factors, name)
        columns[name] = np.asarray(values).astype(old.dtype)
        if columns[name].shape != old.shape:
            raise InputError(f"changes: {name} of shape {columns[name].shape}; expected {old.shape}")
    return replace(factors, **columns)


def costophrenic_angles(factors: PhantomFactors) -> np.ndarray:
    """Where the lungs end below at the sides, between ribs and diaphragm, as fractions of the image.

    Returns (n, 2, 2): the lung on the image's left and that on its right, x and y.

    The drawing bends there by up to about 1 % of the side at random, and may be covered by the collimator.
    """
    pose = {name: getattr(factors, name) for name in ("tilt", "zoom", "shift_x", "shift_y")}
    angles = []
    for side in (-1, 1):
        x = side * 0.5 * factors.thorax_width  # the cage's sides are straight that far down
        y = np.float32(0.5) + 0 * x
        above = _above_diaphragm(x, np.abs(x), y, factors)
        angles.append(np.stack(_to_image(x, y + above, pose), axis=-1))
    return np.stack(angles, axis=1)


def load(*, num_images: int = 2800, image_size: int | None = None, seed: int = 0, visits: int = VISITS) -> ImageData:
    """The phantom as a data set: some visits of each patient, about half of the images with pneumonia.

    Nothing is drawn until the first read. If all images together take at most 256 MiB, the first read draws all
    of them and keeps them; otherwise each read draws what it is asked for. The values are the same.

    Args:
        num_images: 1 or more.
        image_size: pixels a side, 8 to 1024; None is 64.
        seed: 0 or more.
        visits: images of each patient, 1 or more, see :func:`render`.

    Raises:
        InputError: an argument outside these ranges.
    """
    size = 64 if image_size is None else image_size
    _check_size(size, "image_size")
    _check_seed(seed)
    _check_visits(visits)
    if num_images < 1:
        raise InputError(f"num_images: {num_images}; expected 1 or more")
    factors, _ = _draw_factors(np.arange(num_images), seed, visits)
    patients = np.array([str(p) for p in factors.patient])
    return ImageData(
        name="phantom",
        origin=f"procedural chest radiographs drawn by medvdm (seed {seed}); no real patient",
        ids=tuple(_name(seed, visits, i) for i in range(num_images)),
        labels=np.eye(len(CLASS_NAMES), dtype=np.uint8)[factors.label],
        class_names=CLASS_NAMES,
        patients=patients,
        splits=np.array([split_of_patient(p) for p in patients]),
        split_rule="sha256 of the patient, mod 10: 0 and 1 test, 2 validation, the rest training",
        image_shape=(size, size, 1),
        reader=_reader(num_images, size, seed, visits),
        notes=("drawn, not measured: shapes and grey levels resemble a radiograph, no finding in it is real",),
        reading=Reading(seen=num_images, read=num_images, rounded_from=("drawn as float32",)),
        digests=lambda: _digests(num_images, size, seed, visits),
    )


def _name(seed: int, visits: int, index: int) -> str:
    """The image's id; with other visits than two an index is another image, so it has another name."""
    if visits == VISITS:
        return f"phantom-{seed}-{index:06d}"
    return f"phantom-{seed}-patient-{index // visits:06d}-visit-{index % visits}"


def _digests(num_images: int, size: int, seed: int, visits: int) -> tuple[bytes, ...]:
    """One per image, of what it is drawn from: floats may differ in the last digit from machine to machine."""
    drawn_from = f"phantom {DRAWING} size {size} seed {seed} image"
    streams = (_image_stream(i // visits, i % visits) for i in range(num_images))
    texts = (f"{drawn_from} {n}" if s == _IMAGE_STREAM else f"{drawn_from} {s} {n}" for s, n in streams)
    return tuple(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)


def _reader(num_images: int, size: int, seed: int, visits: int) -> Callable[[np.ndarray], np.ndarray]:
    """The function that ``ImageData`` reads with; see :func:`load` for what it keeps."""
    keep = num_images * size * size * 4 <= CACHE_BYTES
    lock = threading.Lock()
    kept: list[np.ndarray] = []

    def read(indices: np.ndarray) -> np.ndarray:
        if indices.size and not (indices.min() >= 0 and indices.max() < num_images):
            raise InputError(f"indices: {indices.min()} to {indices.max()}; expected 0 to {num_images - 1}")
        if not keep:
            return render(indices, size=size, seed=seed, visits=visits)[0]
        with lock:  # two threads that read first would both draw everything
            if not kept:
                kept.append(render(np.arange(num_images), size=size, seed=seed, visits=visits)[0])
        return kept[0][indices]

    return read


def _check_size(size: int, name: str) -> None:
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise InputError(f"{name}: {size}; expected {MIN_SIZE} to {MAX_SIZE} pixels")


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise InputError(f"seed: {seed}; expected 0 or more")


def _check_visits(visits: int) -> None:
    if visits < 1:
        raise InputError(f"visits: {visits}; expected 1 or more")


# --- Factors -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Generators:
    """The two random generators of an image, after its factors were drawn from them."""

    patient: np.random.Generator
    image: np.random.Generator


def _draw_factors(indices: np.ndarray, seed: int, visits: int) -> tuple[PhantomFactors, list[_Generators]]:
    """Draw the factors of images; what the generators give next are the images' random fields."""
    generators = [
        _Generators(
            _generator(seed, _PATIENT_STREAM, i // visits), _generator(seed, *_image_stream(i // visits, i % visits))
        )
        for i in indices.tolist()
    ]
    # One row of uniforms an image, then columns at a time. A new factor takes a new column at the end: the
    # numbers of columns must not change, or every image changes.
    of_patient = np.array([g.patient.random(24) for g in generators], np.float32).reshape(-1, 24).T
    of_image = np.array([g.image.random(48) for g in generators], np.float32).reshape(-1, 48).T
    anatomy = _draw_anatomy(of_patient)
    acquisition = _draw_acquisition(of_image[:24])
    opacities = _draw_opacities(of_image[24:], anatomy, acquisition)
    factors = PhantomFactors(patient=indices // visits, index=indices, **anatomy, **acquisition, **opacities)
    return factors, generators


def _image_stream(patient: int, visit: int) -> tuple[int, int]:
    """The stream of a visit, and its number there: a later visit has a stream of its own, so it moves no other."""
    return (_IMAGE_STREAM, VISITS * patient + visit) if visit < VISITS else (visit, patient)


def _generator(seed: int, stream: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, stream, number])))


def _between(u: np.ndarray, low: float, high: float) -> np.ndarray:
    """Uniform numbers of [0, 1) moved to [low, high), as float32."""
    return (low + (high - low) * u).astype(np.float32)


def _draw_anatomy(u: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "thorax_width": _between(u[0], 0.62, 0.76),
        "lung_height": _between(u[1], 0.50, 0.64),
        "lung_top": _between(u[2], 0.08, 0.15),
        "cardiothoracic_ratio": _between(0.5 * (u[3] + u[4]), 0.36, 0.64),
        "heart_slant": _between(u[5], 0.25, 0.65),
        "aortic_knob": _between(u[6], 0.025, 0.045),
        "dome_difference": _between(u[7], 0.01, 0.045),
        "rib_spacing": _between(u[8], 0.060, 0.075),
        "rib_slope": _between(u[9], 0.8, 1.5),
        "bone_density": _between(u[10], 0.75, 1.25),
        "obesity": _between(u[11] * u[12], 0.0, 1.0),  # a product: most patients are thin
        "breast": np.where(u[13] < 0.5, _between(u[14], 0.05, 0.22), 0),
        "shoulder_height": _between(u[15], 0.06, 0.16),
    }


def _draw_acquisition(u: np.ndarray) -> dict[str, np.ndarray]:
    collimated = (u[12] < 0.3) & (u[13:17] < 0.6)  # a third of the images, on some of the four sides
    return {
        "inspiration": _between(u[0], 0.88, 1.0),
        "tilt": _between(0.5 * (u[1] + u[2]), -0.06, 0.06),
        "zoom": _between(u[3], 0.90, 1.08),
        "shift_x": _between(u[4], -0.03, 0.03),
        "shift_y": _between(u[5], -0.02, 0.05),
        "exposure": _between(u[6], 0.72, 1.25),
        "black": _between(u[7] * u[7], 0.0, 0.22),
        "white": _between(u[8], 0.86, 1.0),
        "tone": _between(u[9], -0.35, 0.5),
        "softness": _between(u[10], 0.0, 1.0),
        "noise": _between(u[11], 0.003, 0.010),
        "collimation": np.where(collimated, _between(u[17:21], 0.01, 0.06), 0).T,
        "stomach_gas": np.where(u[21] < 0.4, _between(u[22], 0.03, 0.07), 0),
    }


def _draw_opacities(
    u: np.ndarray, anatomy: dict[str, np.ndarray], acquisition: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The label, and for pneumonia 1 to 3 places inside the lungs."""
    label = (u[0] < 0.5).astype(np.int64)
    count = np.where(label == 1, 1 + np.floor(u[1] * MAX_OPACITIES), 0).astype(np.int64)
    used = np.arange(MAX_OPACITIES) < count[:, None]
    k = MAX_OPACITIES
    image_left = u[2 : 2 + k] < 0.5
    height = _between(u[5 : 5 + k], 0.22, 0.88)  # from the apex (0) to the dome (1)
    across = _between(u[8 : 8 + k], 0.2, 0.8)  # from the mediastinum or the heart (0) to the ribs (1)
    radius = _between(u[11 : 11 + k], 0.05, 0.12)
    strength = _between(u[14 : 14 + k], 0.35, 0.8)
    y = anatomy["lung_top"] + height * anatomy["lung_height"] * acquisition["inspiration"]
    half = 0.5 * anatomy["thorax_width"]
    outer = half * np.sqrt(1 - np.clip(1 - height / 0.75, 0, 1) ** 2)
    heart_edge = 2 * half * anatomy["cardiothoracic_ratio"] * np.where(image_left, 0.36, 0.64)
    inner = np.where(height > 0.55, np.maximum(heart_edge, 0.07), 0.07)
    inner = np.minimum(inner, outer - 0.06)
    x = np.where(image_left, -1, 1) * (inner + across * (outer - inner))
    image_x, image_y = _to_image(x, y, acquisition)
    return {
        "label": label,
        "num_opacities": count,
        "opacity_x": np.where(used, image_x.T, 0).astype(np.float32),
        "opacity_y": np.where(used, image_y.T, 0).astype(np.float32),
        "opacity_radius": np.where(used, (radius * acquisition["zoom"]).T, 0).astype(np.float32),
        "opacity_strength": np.where(used, strength.T, 0).astype(np.float32),
    }


def _to_image(x: np.ndarray, y: np.ndarray, pose: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """From the body (x from the midline, y down) to fractions of the image; :func:`_to_body` is the way back."""
    cos, sin = np.cos(pose["tilt"]), np.sin(pose["tilt"])
    y = y - 0.5
    image_x = 0.5 + pose["shift_x"] + pose["zoom"] * (cos * x - sin * y)
    image_y = 0.5 + pose["shift_y"] + pose["zoom"] * (sin * x + cos * y)
    return image_x, image_y


# --- Drawing: every array is (n, size, size) float32, every factor (n, 1, 1) ---------------------------------------


class _Columns:
    """The factors with two axes of length 1 added, so that they broadcast against images."""

    def __init__(self, factors: PhantomFactors) -> None:
        for f in fields(factors):
            value = getattr(factors, f.name)
            setattr(self, f.name, value[:, None, None] if value.ndim == 1 else value[:, :, None, None])


def _render_chunk(factors: PhantomFactors, generators: list[_Generators], size: int) -> np.ndarray:
    """Draw one chunk of images: float32 of shape (n, size, size) in [0, 1]."""
    times = -(-_DRAWN_AT_LEAST // size)  # drawn so many times larger than asked for, then averaged
    drawn = size * times
    p = _Columns(factors)
    warp_x, warp_y, grain, mottle = _random_fields(generators, drawn)
    image_x, image_y = _image_axes(drawn)
    x, y = _to_body(image_x, image_y, p)
    x += 0.006 * warp_x
    y += 0.006 * warp_y
    body = _attenuation(x, y, grain, mottle, image_x, image_y, p)
    image = _film(body, p)
    image = _soften(image, p)
    _collimate(image, image_x, image_y, p)
    if times > 1:
        image = image.reshape(-1, size, times, size, times).mean(axis=(2, 4), dtype=np.float32)
    return _add_noise(image, generators, p)


def _image_axes(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres as fractions of the image: x of shape (1, 1, size), y of shape (1, size, 1)."""
    centres = ((np.arange(size) + 0.5) / size).astype(np.float32)
    return centres[None, None, :], centres[None, :, None]


def _to_body(image_x: np.ndarray, image_y: np.ndarray, p: _Columns) -> tuple[np.ndarray, np.ndarray]:
    """From fractions of the image to the body: x from the midline, y down."""
    cos, sin = np.cos(p.tilt) / p.zoom, np.sin(p.tilt) / p.zoom
    x, y = image_x - (0.5 + p.shift_x), image_y - (0.5 + p.shift_y)
    return cos * x + sin * y, 0.5 + (cos * y - sin * x)


def _random_fields(generators: list[_Generators], size: int) -> list[np.ndarray]:
    """Four smooth random fields of variance 1: two that bend outlines, the lungs' grain, the opacities' mottle."""
    warp = np.stack([_normals(g.patient, 2, _WARP_CELLS) for g in generators])
    grain = np.stack([_normals(g.patient, 1, _GRAIN_CELLS)[0] for g in generators])
    mottle = np.stack([_normals(g.image, 1, _MOTTLE_CELLS)[0] for g in generators])
    return [_enlarge(field, size) for field in (warp[:, 0], warp[:, 1], grain, mottle)]


def _normals(generator: np.random.Generator, number: int, cells: int) -> np.ndarray:
    return generator.standard_normal((number, cells, cells), dtype=np.float32)


def _enlarge(field: np.ndarray, size: int) -> np.ndarray:
    """Interpolate (n, cells, cells) smoothly to (n, size, size)."""
    weights = _interpolation(field.shape[-1], size)
    return weights @ field @ weights.T


@functools.lru_cache(maxsize=32)
def _interpolation(cells: int, size: int) -> np.ndarray:
    """(size, cells) Gaussian weights; rows have norm 1, so that variance 1 in gives variance 1 out."""
    pixels = (np.arange(size)[:, None] + 0.5) / size * (cells - 1)
    weights = np.exp(-0.5 * ((pixels - np.arange(cells)) / 0.6) ** 2)
    return (weights / np.sqrt((weights**2).sum(axis=1, keepdims=True))).astype(np.float32)


def _step(distance: np.ndarray, width: float | np.ndarray) -> np.ndarray:
    """0 below -width, 1 above width, smooth between. ``distance`` is overwritten."""
    t = distance
    t *= 0.5 / width
    t += 0.5
    np.clip(t, 0, 1, out=t)
    return t * t * (3 - 2 * t)


def _bump(distance: np.ndarray, width: float) -> np.ndarray:
    """1 at 0, falling to 0 at ``width`` on both sides, smooth. ``distance`` is overwritten."""
    t = distance
    t *= t
    t *= -1 / width**2
    t += 1
    np.maximum(t, 0, out=t)
    return t * t


def _attenuation(
    x: np.ndarray,
    y: np.ndarray,
    grain: np.ndarray,
    mottle: np.ndarray,
    image_x: np.ndarray,
    image_y: np.ndarray,
    p: _Columns,
) -> np.ndarray:
    """How much the body takes out of the beam: 0 beside the body, about 1 for the chest wall."""
    ax = np.abs(x)
    body = _outline(ax, y, p)
    inside_cage = _inside_rib_cage(ax, y, p)
    above_dome = _above_diaphragm(x, ax, y, p)
    solid = _mediastinum(x, ax, y, p)

    chest = _step(inside_cage + 0, 0.012)  # 1 in the rib cage, lungs or not
    # Only lungs make the diaphragm's edge sharp: in the chest wall the belly begins gradually.
    belly = 1 - _step(above_dome, 0.065 - 0.06 * chest)
    air = chest * (1 - belly)
    air *= 1 - solid
    filled = _opacities(image_x, image_y, mottle, p)

    total = body * (0.88 + 0.22 * p.obesity)
    # Heart and belly are about as dense where they meet, so that the diaphragm is lost behind the heart.
    total += np.maximum(belly, 0.85 * solid * chest) * _organs(y, body)
    total -= belly * _stomach_gas(x, y, p)
    vessels = _vessels(x, ax, y, mottle, p)
    density = 0.10 * vessels + 0.018 * grain
    density += 0.46 * filled
    density -= 0.52
    total += air * density
    total += _bones(x, ax, y, inside_cage, air, belly, body, p)
    total -= 0.14 * _windpipe(x, y, p)
    total += _breasts(ax, y, p)
    return total


def _outline(ax: np.ndarray, y: np.ndarray, p: _Columns) -> np.ndarray:
    """Thickness of the soft tissue, 0 to 1: neck, shoulders, trunk and arms."""
    half = 0.5 * p.thorax_width + 0.075 + 0.15 * p.obesity
    shoulder = _step(0.36 - y, 0.12)
    trunk_edge = half + 0.16 * shoulder
    t = ax / trunk_edge
    t *= t
    trunk = np.sqrt(np.maximum(1 - t * t, 0))
    # Arms hang beside the trunk, further out the lower; many are outside the image.
    arm = (ax - (half + 0.02) - 0.28 * (y - 0.22)) / 0.085
    arm = np.sqrt(np.maximum(1 - arm * arm, 0))
    arm *= 0.62
    np.maximum(trunk, arm, out=trunk)
    # The exponential lifts the shoulders' line steeply near the midline: that is the neck.
    neck = np.exp((0.10 + 0.03 * p.obesity - ax) * 18)
    depth = y - p.lung_top + p.shoulder_height - 0.22 * ax + 0.12 * neck
    return trunk * np.sqrt(np.clip(depth * 4, 0, 1))


def _lung_bottom(p: _Columns) -> np.ndarray:
    return p.lung_top + p.lung_height * p.inspiration


def _inside_rib_cage(ax: np.ndarray, y: np.ndarray, p: _Columns) -> np.ndarray:
    """Roughly the distance to the inner edge of the ribs, positive inside: half an ellipse on straight sides."""
    centre = 0.10  # each lung has its own rounded apex, this far from the midline
    half = 0.5 * p.thorax_width - centre
    up = 0.75 * p.lung_height * p.inspiration
    above = np.maximum((p.lung_top + up - y) / up, 0)
    across = (ax - centre) / half
    return (1 - np.sqrt(above * above + across * across)) * half


def _above_diaphragm(x: np.ndarray, ax: np.ndarray, y: np.ndarray, p: _Columns) -> np.ndarray:
    """Distance above the diaphragm, negative in the belly: two domes, the image's left one higher."""
    from_top = np.minimum(ax / (0.25 * p.thorax_width) - 1, 1)  # -1 at the midline, 1 at the ribs
    dome = _lung_bottom(p) + 0.07 * from_top * from_top
    return dome - y + p.dome_difference * (x > 0)


def _mediastinum(x: np.ndarray, ax: np.ndarray, y: np.ndarray, p: _Columns) -> np.ndarray:
    """Share of the lung's air that heart and great vessels displace, 0 to 1."""
    top = p.lung_top
    column = _step(0.058 + 0.05 * (y - top) - ax, 0.022)
    heart = _heart(x, y, p)
    knob_y = top + 0.29 * p.lung_height
    knob = np.square(x - 0.045) + np.square(y - knob_y)
    knob = _step((1 - knob / np.square(p.aortic_knob)) * 0.03, 0.02)
    hilum_y = top + 0.50 * p.lung_height
    hila = np.square((ax - 0.075) / 0.045) + np.square((y - hilum_y) / 0.075)
    hila = np.maximum(1 - hila, 0)
    clear = (1 - column) * (1 - 0.9 * heart)
    clear *= (1 - 0.85 * knob) * (1 - 0.5 * hila)
    return 1 - clear


def _heart(x: np.ndarray, y: np.ndarray, p: _Columns) -> np.ndarray:
    """A slanted ellipse whose width is cardiothoracic_ratio * thorax_width, two thirds of it to the image's right."""
    width = p.cardiothoracic_ratio * p.thorax_width
    tall = 0.11 + 0.17 * width
    # A slant widens an ellipse; what it adds is taken off here, so that the width is the one promised.
    wide = np.sqrt(np.maximum(np.square(0.5 * width) - np.square(p.heart_slant * tall), np.square(0.3 * width)))
    down = y - (_lung_bottom(p) - 0.45 * tall)
    across = (x - 0.16 * width - p.heart_slant * down) / wide
    down /= tall
    inside = (1 - np.sqrt(across * across + down * down)) * wide
    thin_rim = 0.55 * _step(inside + 0, 0.010)  # lung in front of and behind the rim
    return thin_rim + 0.45 * _step(inside - 0.035, 0.045)


def _organs(y: np.ndarray, body: np.ndarray) -> np.ndarray:
    """What heart, vessels, liver and bowel add to the chest wall: more further down, where the trunk is thicker."""
    return body * (0.12 + 0.5 * np.clip(y - 0.1, 0, 0.8))


def _stomach_gas(x: np.ndarray, y: np.ndarray, p: _Columns) -> np.ndarray:
    """What gas under the left dome takes away."""
    gas_y = _lung_bottom(p) + p.dome_difference + 0.07
    radius = np.maximum(p.stomach_gas, 1e-3)
    gas = np.square((x - 0.19) / (1.4 * radius)) + np.square((y - gas_y) / radius)
    return 0.35 * _step((1 - gas) * 0.02, 0.012)


def _vessels(x: np.ndarray, ax: np.ndarray, y: np.ndarray, mottle: np.ndarray, p: _Columns) -> np.ndarray:
    """Branches that fan out from the hila: ridges in the angle, finer and fainter with the distance."""
    right, down = ax - 0.06, y - (p.lung_top + 0.48 * p.lung_height)
    distance = np.sqrt(right * right + down * down)
    angle = np.arctan2(down, right)
    angle += 0.28 * mottle
    angle += np.float32(0.35) * (x > 0)  # the two lungs are not mirror images
    coarse = np.cos(9 * angle)
    fine = np.cos(19 * angle + 12 * distance)
    far = np.exp(distance * -6)
    near = far * far
    outside = 1 - near * near  # the branches' common root is hidden by the hilum; drawn, it looks like a star
    return (np.square(np.maximum(coarse, 0)) * near * 1.4 + np.square(np.maximum(fine, 0)) * far) * outside


def _bones(
    x: np.ndarray,
    ax: np.ndarray,
    y: np.ndarray,
    inside_cage: np.ndarray,
    air: np.ndarray,
    belly: np.ndarray,
    body: np.ndarray,
    p: _Columns,
) -> np.ndarray:
    """Ribs, clavicles, shoulder blades and spine."""
    ribs = _ribs(ax, y, p)
    ribs *= _step(inside_cage + 0.012, 0.010)
    ribs *= 0.35 + 0.65 * air
    ribs *= 1 - 0.7 * belly
    ribs *= _step(y - p.lung_top - 0.005, 0.02)
    edge = _bump(inside_cage + 0.008, 0.022)  # the cage's wall seen along its surface
    edge *= 1 - 0.8 * belly
    edge *= _step(ax - 0.10, 0.05)

    line = y - (p.lung_top + 0.075) + 0.28 * ax
    line -= 0.025 * np.sin(ax * 16)
    clavicle = _bump(line, 0.022)
    clavicle *= _step(ax - 0.03, 0.012)
    clavicle *= _step(0.40 - ax, 0.03)

    scapula = _step(ax - 0.5 * p.thorax_width + 0.09 - 0.25 * (y - 0.3), 0.015)
    scapula *= _bump(y - p.lung_top - 0.19, 0.19)

    spine = _step(0.036 - ax, 0.018)
    vertebrae = np.cos(y * (2 * np.pi / 0.052))
    spine *= 0.8 + 0.2 * vertebrae

    total = 0.13 * ribs + 0.10 * edge
    total += 0.17 * clavicle
    total += 0.07 * scapula
    total += 0.09 * spine
    total *= p.bone_density * (1 - 0.4 * p.obesity)
    total *= np.minimum(body * 2, 1)  # no bone outside the skin
    return total


def _ribs(ax: np.ndarray, y: np.ndarray, p: _Columns) -> np.ndarray:
    """Posterior arcs, and fainter anterior ones that bend the other way: each is one periodic profile."""
    turn = 2 * np.pi / p.rib_spacing
    sag = p.rib_slope * np.square(ax)
    back = np.cos((y - p.lung_top - sag) * turn)
    front = np.cos((y - p.lung_top + 0.75 * ax) * (turn * 0.8))
    front *= _step(ax - 0.14, 0.06)
    # A flat crest with brighter rims: cos(t) with a negative third harmonic, 4 c^3 - 3 c.
    back *= 1.6 - 0.8 * back * back
    return 0.5 + 0.5 * back + 0.17 * front


def _windpipe(x: np.ndarray, y: np.ndarray, p: _Columns) -> np.ndarray:
    pipe = _bump(x - 0.006, 0.026)
    return pipe * _step(p.lung_top + 0.36 * p.lung_height - y, 0.04)


def _breasts(ax: np.ndarray, y: np.ndarray, p: _Columns) -> np.ndarray:
    shape = np.square((ax - 0.25 * p.thorax_width - 0.03) / 0.19)
    shape += np.square((y - _lung_bottom(p) + 0.06) / 0.15)
    return p.breast * np.sqrt(np.maximum(1 - shape, 0))


def _opacities(image_x: np.ndarray, image_y: np.ndarray, mottle: np.ndarray, p: _Columns) -> np.ndarray:
    """Share of the lung's air that pneumonia fills, 0 to 1: soft discs with a ragged edge."""
    clear = np.ones_like(mottle)
    for k in range(MAX_OPACITIES):
        if not p.num_opacities.max() > k:
            break
        radius = np.maximum(p.opacity_radius[:, k], 1e-3)
        d = np.square((image_x - p.opacity_x[:, k]) / radius) + np.square((image_y - p.opacity_y[:, k]) / radius)
        d += 0.25 * mottle
        clear *= 1 - p.opacity_strength[:, k] * np.exp(-0.9 * np.maximum(d, 0))
    return 1 - clear


def _film(attenuation: np.ndarray, p: _Columns) -> np.ndarray:
    """Grey levels: a curve that saturates, then the window and the bend of the viewing station."""
    grey = np.tanh(attenuation * p.exposure)
    np.maximum(grey, 0, out=grey)
    grey += p.tone * grey * (1 - grey)
    grey *= p.white - p.black
    grey += p.black
    return grey


def _soften(image: np.ndarray, p: _Columns) -> np.ndarray:
    """Blur with a Gaussian, mixed with the sharp image."""
    blur = _blur_matrix(image.shape[-1])
    blurred = blur @ image @ blur.T
    return image + p.softness * (blurred - image)


@functools.lru_cache(maxsize=16)
def _blur_matrix(size: int) -> np.ndarray:
    """(size, size) Gaussian weights with a standard deviation of 0.008 of the side; rows sum to 1."""
    pixels = np.arange(size) / size
    weights = np.exp(-0.5 * ((pixels[:, None] - pixels) / 0.008) ** 2)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _collimate(image: np.ndarray, image_x: np.ndarray, image_y: np.ndarray, p: _Columns) -> None:
    """Darken the borders that the collimator's blades cover, in place."""
    left, right, top, bottom = (p.collimation[:, side] for side in range(4))
    # The blades cast a soft shadow. Where there is no blade, the first pixel must stay as it is.
    across = _shadow(image_x, left) * _shadow(1 - image_x, right)
    down = _shadow(image_y, top) * _shadow(1 - image_y, bottom)
    image *= across
    image *= down


def _shadow(position: np.ndarray, blade: np.ndarray) -> np.ndarray:
    lit = np.clip((position - blade) / 0.012 + 0.5, 0.06, 1)
    return np.where(blade > 0, lit, 1)


def _add_noise(image: np.ndarray, generators: list[_Generators], p: _Columns) -> np.ndarray:
    """Quantum noise (its variance grows with the grey level) on a floor of electronic noise; clipped to [0, 1]."""
    size = image.shape[-1]
    noise = np.stack([_normals(g.image, 1, size)[0] for g in generators])
    noise *= np.sqrt(image + 0.1)
    noise *= p.noise * 1.3  # 1.3 = 1 / sqrt(0.5 + 0.1): the factor is the deviation at mid-grey
    noise += image
    return np.clip(noise, 0, 1, out=noise)
