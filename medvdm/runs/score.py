"""Score images by a run: what each costs in bits, where that lies among held-out images, and where it is spent.

No number here says that an image is healthy, ill or usable. It says how an image compares with the run's own.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medvdm.data import ImageData, files
from medvdm.errors import DataError, InputError, MedvdmError, RunError
from medvdm.evaluation import codecs as codecs_
from medvdm.evaluation import typicality
from medvdm.evaluation.held_out import check_counts, stderr_of_draws
from medvdm.evaluation.typicality import Placed
from medvdm.images import to_levels
from medvdm.models.likelihoods import check_levels
from medvdm.paths import local_path
from medvdm.runs.config import ScoreConfig, settings
from medvdm.runs.provenance import PROVENANCE_CHUNK
from medvdm.runs.record import version
from medvdm.runs.run import Run, changed, load_data
from medvdm.runs.store import HELD_OUT, atomic, check_writable, read_json, write_json
from medvdm.theory.bound import bits_per_dim

DEFAULTS = ScoreConfig()


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What n images cost, and where that lies among held-out images of the run's own data.

    Attributes:
        bits: (n,) the bound in bits per dimension, the mean over the draws.
        stderr: (n,) its standard error over the draws.
        statistics: by name what is placed among the held-out images: ``bits``, ``over_gaussian`` and, with a codec,
            ``over_`` and its name; see :mod:`medvdm.evaluation.typicality`. Bits per dimension.
        maps: (n, h, w) bits of each pixel, channels together; None where they were not asked for.
        num_patients: of the held-out images.
        share: of images like the held-out ones that a test may call unusual.
        notes: what could not be done as asked.
    """

    bits: np.ndarray
    stderr: np.ndarray
    statistics: dict[str, Placed]
    maps: np.ndarray | None
    num_patients: int
    share: float
    notes: tuple[str, ...] = ()

    @property
    def unusual(self) -> dict[str, np.ndarray]:
        """(n,) by name of a test whether it calls an image unusual.

        ``bits_high`` is the threshold on bits alone, which lets everything pass that is easy to describe. The others
        look at both sides of each statistic, under its name.
        """
        tests = {name: one.atypical(self.share) for name, one in self.statistics.items()}
        return {"bits_high": self.statistics["bits"].high(self.share), **tests}

    def image(self, i: int) -> dict[str, Any]:
        """What was found out about image i, as JSON takes it."""
        return {
            "bits_per_dim": float(self.bits[i]),
            "bits_per_dim_stderr": float(self.stderr[i]),
            "statistics": {
                name: {"value": float(one.values[i]), "fewer": int(one.fewer[i]), "as_far": int(one.as_far[i])}
                for name, one in self.statistics.items()
            },
            "unusual": [name for name, found in self.unusual.items() if found[i]],
        }


def score(
    run: Run,
    images: np.ndarray,
    config: ScoreConfig = DEFAULTS,
    *,
    maps: bool = False,
    data: ImageData | None = None,
    save: bool = True,
    **changes: Any,
) -> Scores:
    """Score images by a run of gray values, without labels.

    The values of the held-out images are kept in the run's folder (``held_out/``) and used again by the next call with
    the same settings. They take as long as scoring that many images, minutes for a cascade at 256 pixels; and with them
    a run can score where its data are not.

    Args:
        run: from :func:`medvdm.load`, with an 8-bit likelihood. One with a Bernoulli likelihood is refused: the least
            that its pixels can cost is their entropy, which is 0 for black and white, so its bits tell how gray an
            image is.
        images: (n, h, w) or (n, h, w, c) uint8, as many pixels as the run's.
        config: the settings.
        maps: also say where each image's bits are spent.
        data: the run's own data where it cannot load them itself (given from Python, or moved).
        save: keep the values of the held-out images; a folder that cannot be written to is noted, no error.
        changes: settings of :class:`medvdm.runs.config.ScoreConfig` by name: ``draws``, ``codec``, ...

    Raises:
        InputError: an unknown setting, a value that cannot be used, images of another shape, a share that so few
            held-out images cannot bear, or a run with a Bernoulli likelihood.
        InputTypeError: images that are not uint8.
        RunError: a run without validation images, or whose null was not trained; other data than the run's own; what
            was kept is damaged.
        MissingPackageError: a codec without the package for it.
    """
    config = settings(config, changes)
    check(run, config)
    images = np.asarray(images)
    check_levels(images)
    images = images[..., None] if images.ndim == 3 else images
    shape = run.config.model.image_shape
    if images.shape[1:] != shape or not len(images):
        raise InputError(f"images: shape {images.shape}; expected (n, *{shape}), that of the run, at least 1")
    held_out, num_patients, notes = _held_out(run, config, data, save)
    typicality.check_share(config.share, len(held_out["bits"]))
    found = typicality.costs(
        run.graph,
        run.params,
        images,
        draws=config.draws,
        batch_size=config.batch_size,
        seed=config.seed,
        maps=maps,
    )
    values = _statistics(run, images, found.totals, config)
    return Scores(
        bits=values["bits"],
        stderr=bits_per_dim(stderr_of_draws(found.totals), shape),
        statistics={name: typicality.placed(values[name], held_out[name]) for name in values},
        maps=None if found.maps is None else found.maps / math.log(2.0),
        num_patients=num_patients,
        share=config.share,
        notes=notes,
    )


def check(run: Run, config: ScoreConfig) -> None:
    """Refuse what :func:`score` would refuse of a run and of settings, before anything is read."""
    if not run.eight_bit:
        raise InputError(
            f"run: {run.path} has a Bernoulli likelihood (architecture '{run.config.model.architecture}'), whose bits "
            "tell how gray an image is; expected a model of 8-bit gray values, as of the preset pixel"
        )
    run.require_whole("the Gaussian of its training images and what tells its data")
    check_counts(config.draws, config.batch_size, config.seed)
    if config.draws < 2:
        raise InputError(f"draws: {config.draws}; expected at least 2, for a standard error")
    if config.held_out < 1:
        raise InputError(f"held_out: {config.held_out}; expected at least 1")
    typicality.check_share(config.share, config.held_out)
    if config.codec != "none":
        codecs_.check()
    run.require_trained(null=True)
    if not run.record["data"]["counts"]["val"]["images"]:
        raise RunError(f"{run.path}: its data have no validation images; expected some to place an image among")


def _statistics(run: Run, levels: np.ndarray, totals: np.ndarray, config: ScoreConfig) -> dict[str, np.ndarray]:
    """(n,) bits per dimension by name."""
    shape = run.config.model.image_shape
    bits = bits_per_dim(totals.mean(axis=0), shape)
    values = {"bits": bits, "over_gaussian": bits - bits_per_dim(run.gaussian.nats(levels), shape)}
    if config.codec != "none":
        parts = [codecs_.file_bytes(levels[i : i + 64], (config.codec,)) for i in range(0, len(levels), 64)]
        size = np.concatenate([part[config.codec] for part in parts])
        values[f"over_{config.codec}"] = bits - size * 8 / math.prod(shape)
    # Equal images tie, whatever batch they were in: the rest is rounding, and far below the noise.
    return {name: np.round(one, 5) for name, one in values.items()}


# --- The held-out images ------------------------------------------------------------------------------------------


def _held_out(
    run: Run, config: ScoreConfig, data: ImageData | None, save: bool
) -> tuple[dict[str, np.ndarray], int, tuple[str, ...]]:
    """Every statistic of the held-out images, kept or measured now; their patients, and what to note."""
    path = run.path / HELD_OUT / f"{_name(run, config)}.json"
    kept = _kept(path) if path.exists() else None
    if kept is not None:
        return kept["values"], kept["num_patients"], ()
    data = load_data(run) if data is None else data
    if data.fingerprint() != run.record["data"]["fingerprint"]:
        raise changed(run)
    indices = data.indices("val")
    indices = indices[np.rint(np.linspace(0, len(indices) - 1, min(config.held_out, len(indices)))).astype(int)]
    levels = data.levels(indices)
    found = typicality.costs(
        run.graph, run.params, levels, draws=config.draws, batch_size=config.batch_size, seed=config.seed
    )
    values = _statistics(run, levels, found.totals, config)
    num_patients = len(set(data.patients[indices]))
    if not save:
        return values, num_patients, ()
    try:
        check_writable(path.parent)
        path.parent.mkdir(exist_ok=True)
    except (RunError, OSError) as problem:
        return values, num_patients, (f"the values of the held-out images were not kept ({problem})",)
    record = {
        "version": version(),
        "num_patients": num_patients,
        "values": {name: one.tolist() for name, one in values.items()},
    }
    write_json(path, record)
    return values, num_patients, ()


def _name(run: Run, config: ScoreConfig) -> str:
    """The same for the same values of the same images. The run's data are part of its record."""
    parts = [str(run.step), run.weights, f"draws{config.draws}", f"seed{config.seed}", f"num{config.held_out}"]
    return "-".join([*parts, *([] if config.codec == "none" else [config.codec])])


def _kept(path: Path) -> dict[str, Any] | None:
    """What an earlier call has kept; None from another version, which may measure otherwise."""
    record = read_json(path)
    try:
        if record["version"] != version():
            return None
        values = {name: np.asarray(one, np.float64) for name, one in record["values"].items()}
        sizes = {one.shape for one in values.values()}
        good = "bits" in values and len(sizes) == 1 and all(np.isfinite(one).all() for one in values.values())
        if good and len(sizes.pop()) == 1:
            return {"values": values, "num_patients": int(record["num_patients"])}
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    raise RunError(f"{path}: holds no values of held-out images; expected what score wrote, or no such file")


# --- Files --------------------------------------------------------------------------------------------------------


def score_files(
    run: Run,
    paths: Sequence[str | Path],
    config: ScoreConfig = DEFAULTS,
    *,
    maps: str | Path | None = None,
    data: ImageData | None = None,
    window: str | None = None,
    save: bool = True,
) -> dict[str, Any]:
    """Score image files, each read and brought to the run's size as ``--data folder`` does it for training.

    A file that cannot be read is told in the result, and the others are scored.

    Args:
        run, config, data, save: as of :func:`score`.
        paths: of the files: PNG, JPEG, TIFF, BMP or DICOM.
        maps: folder for the maps, ``NAME-bits.png`` for each file: 16 bits, at the run's size, in which 0 is no bit and
            65535 the costliest pixel of the image; the file's text says how many bits a gray value is.
        window: stored values that become black and white, ``LOW,HIGH`` or ``full``; the run's own by default.

    Returns:
        As JSON takes it: ``run``, ``version``, ``step``, ``weights``, ``draws``, ``seed``, ``share``; ``held_out`` with
        the number of images and patients and every statistic's median; ``images`` with ``file``, ``notes``, ``map`` and
        the keys of :meth:`Scores.image`; ``failed`` with ``file`` and ``problem``; ``notes``.

    Raises:
        as :func:`score`; also InputError for no file, two files whose maps would have one name, or a window that
        cannot be used.
    """
    check(run, config)
    window = _window(run, window)
    named = [local_path(path, "file") for path in paths]
    if not named:
        raise InputError("file: none; expected at least one image file")
    folder = None if maps is None else _map_folder(maps, named)
    images, read, failed = [], [], []
    for path in named:
        try:
            levels, notes = read_levels(path, run, window)
        except MedvdmError as problem:
            failed.append({"file": str(path), "problem": str(problem)})
            continue
        images.append(levels)
        read.append((path, notes))
    result = {
        "run": run.name,
        "version": version(),
        "step": run.step,
        "weights": run.weights,
        "draws": config.draws,
        "seed": config.seed,
        "share": config.share,
        "held_out": None,
        "images": [],
        "failed": failed,
        "notes": [],
    }
    if not images:
        return result
    found = score(run, np.stack(images), config, maps=folder is not None, data=data, save=save)
    result["notes"] = list(found.notes)
    result["held_out"] = {
        "images": len(found.statistics["bits"].held_out),
        "patients": found.num_patients,
        "medians": {name: one.median for name, one in found.statistics.items()},
    }
    if folder is not None:
        folder.mkdir(exist_ok=True)
    for i, (path, notes) in enumerate(read):
        entry = {"file": str(path), **found.image(i), "notes": list(notes), "map": None}
        if folder is not None:
            entry["map"] = str(folder / _map_name(path))
            _write_map(folder / _map_name(path), found.maps[i], run.provenance(file=path.name, seed=config.seed))
        result["images"].append(entry)
    return result


def read_levels(path: Path, run: Run, window: str = "full") -> tuple[np.ndarray, tuple[str, ...]]:
    """A file as gray values of the run's size, (h, w, 1) uint8, and what was done to it.

    Raises:
        MissingFileError, DataError, MissingPackageError: as :func:`medvdm.data.convert.read_gray`.
        DataError: another size than the run's where that is no square.
        InputError: a run of images with more than one channel.
    """
    height, width, channels = run.config.model.image_shape
    if channels != 1:
        raise InputError(
            f"run: {run.path} is of images with {channels} channels, and files are read as gray; expected "
            "medvdm.score from Python"
        )
    size = height if height == width else None
    found = files.open_images([path], size, run.config.data.fit, window=window)
    if found.image_shape != (height, width, 1):
        shape = "x".join(map(str, found.image_shape[:2]))
        raise DataError(f"{path}: found {shape} pixels; expected those of the run, {height}x{width}")
    stored = found.reader(np.array([0]))
    rounded = ("rounded to 256 gray levels",) if stored.dtype != np.uint8 else ()
    return to_levels(stored, str(path))[0], (*found.notes, *rounded)


def _window(run: Run, window: str | None) -> str:
    asked = run.config.data.window if window is None else window
    if asked in ("data", "percentile"):
        whose = "the run's, taken from its training images" if window is None else "taken from many images"
        raise InputError(f"window: '{asked}', {whose}; expected LOW,HIGH, two numbers (the run's notes have its own)")
    files.parsed_window(asked)
    return asked


# --- Maps ---------------------------------------------------------------------------------------------------------


def _map_name(path: Path) -> str:
    return f"{path.stem}-bits.png"


def _map_folder(maps: str | Path, paths: Sequence[Path]) -> Path:
    """The folder of the maps, which need not be there yet; two files of one name are refused."""
    folder = local_path(maps, "maps")
    twice = [name for name, count in Counter(map(_map_name, paths)).items() if count > 1]
    if twice:
        first, second = [path for path in paths if _map_name(path) == twice[0]][:2]
        raise InputError(f"maps: {first} and {second} would both be {twice[0]}; expected files of different names")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"maps: {folder} is a file; expected a folder, or nothing")
    if not folder.parent.is_dir():
        raise InputError(f"maps: {folder}: the folder {folder.parent} is not there; expected an existing one")
    return folder


def _write_map(path: Path, bits: np.ndarray, provenance: Mapping[str, Any]) -> None:
    """A map as a PNG of 16 bits, with its scale."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    scale = float(bits.max()) / 65535
    levels = np.rint(bits / scale).astype(np.uint16) if scale else np.zeros(bits.shape, np.uint16)
    info = PngInfo()
    for keyword, text in {
        "Title": "Bits of each pixel of an image, by medvdm",
        "Description": f"Not an image of a person: a map of where a model spends bits. One gray value is {scale:.9g} "
        "bits; all pixels together are the bits of the image. Not for clinical use.",
        "Software": f"medvdm {version()}",
        PROVENANCE_CHUNK: json.dumps({**provenance, "bits_per_gray_value": scale}, sort_keys=True, allow_nan=False),
    }.items():
        info.add_text(keyword, text.encode("utf-8", "backslashreplace").decode())
    with atomic(path) as file:
        Image.fromarray(levels).save(file, format="PNG", pnginfo=info)
