"""Audit what a model has kept of its training images: of a run, or of any model by folders of images.

Four questions, each with its own numbers and its own controls:

* **copies**: are samples nearer to a training image than images of other people get
  (:mod:`medvdm.evaluation.privacy.copies`)?
* **membership**: can somebody who holds the weights tell training images, or training patients, from others
  (:mod:`medvdm.evaluation.privacy.membership`)?
* **canaries**: were secrets learned that were planted for this (:mod:`medvdm.evaluation.privacy.canaries`)?
* **published**: what do the files of the run give away by themselves
  (:mod:`medvdm.evaluation.privacy.published`)?

Nothing here certifies anything: a test that finds nothing has found nothing.

Each part that is finished is kept in a folder (``privacy/.parts-...`` in the run's, or in ``--work``), so an audit that
was killed goes on where it was. The folder goes away when the result is there, and where the input is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medvdm import data as data_
from medvdm.data import DataConfig, ImageData, planted
from medvdm.data.convert import resize
from medvdm.errors import DataError, InputError, MissingFileError
from medvdm.evaluation.held_out import entropy
from medvdm.evaluation.privacy import canaries, controls, membership, published, verdict
from medvdm.evaluation.privacy.copies import audit_copies
from medvdm.evaluation.privacy.search import Keep, Shelf
from medvdm.images import to_levels
from medvdm.paths import local_path
from medvdm.runs.config import PrivacyConfig, SampleConfig, settings
from medvdm.runs.model_card import renew_card
from medvdm.runs.record import version
from medvdm.runs.run import Run, as_seen, changed, load_data
from medvdm.runs.sample import drawer
from medvdm.runs.store import PRIVACY, atomic, check_writable, write_json

DEFAULTS, SAMPLING = PrivacyConfig(), SampleConfig(num=256)
PART = 256  #: images whose losses are computed, and kept, at a time


def audit_privacy(
    run: Run,
    data: ImageData | None = None,
    config: PrivacyConfig = DEFAULTS,
    sampling: SampleConfig = SAMPLING,
    *,
    save: bool = True,
    data_dir: str | None = None,
    folders: Folders | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Audit a run for privacy: copies among its samples, membership, canaries, and what its files give away.

    Held-out images are those of the validation and test patients. Where images of training patients were withheld
    (``DataConfig.withhold``), they are the third group, which tells memory of a person from memory of an image.

    Args:
        run: from :func:`medvdm.load`.
        data: the run's own data, where it has to be given again; loaded if None.
        config: the settings of the audit.
        sampling: how samples are drawn, and how many.
        data_dir: where the images are now; by default where they were.
        save: also write the result into the run's folder, under ``privacy/``, and renew its model card.
        folders: samples, training and held-out images from elsewhere instead of the run's.
        changes: settings of either by name.

    Returns:
        JSON-ready: the keys of :func:`medvdm.evaluation.privacy.copies.audit_copies` (``num_samples``, ``num_copies``,
        ``copies``, ``false_alarm_rate``, ...), ``membership``, ``canaries`` (None without any), ``published``,
        ``controls``, ``verdict`` (lines of text), ``notes``, and where the samples come from.

    Raises:
        InputError: a setting that cannot be used, too few images to calibrate on, or folders that do not fit the run.
        RunError: data that the run was not trained on, or a conditional model whose null was not trained.
    """
    names = {f.name for f in dataclasses.fields(PrivacyConfig)}
    config = settings(config, {k: v for k, v in changes.items() if k in names})
    sampling = settings(sampling, {k: v for k, v in changes.items() if k not in names})
    if jax.process_count() > 1:
        raise InputError(f"num_processes: {jax.process_count()}; expected 1 for a privacy audit")
    run.require_trained(null=True)
    if save:
        check_writable(run.path / PRIVACY)
    given = Folders() if folders is None else folders
    _check_given(run, given)
    own = given.train is None
    data = load_data(run, data_dir=data_dir) if data is None and own else data
    if data is not None and data.fingerprint() != run.record["data"]["fingerprint"]:
        raise changed(run)
    key = _key(run.provenance(**dataclasses.asdict(sampling), **dataclasses.asdict(config), **given.digests()))
    with _parts(run.path / PRIVACY if save else None, key) as keep:
        train, held_out, other_day = _groups(run, data if own else None, data_dir, given)
        samples = _drawn(run, sampling, keep) if given.samples is None else given.samples
        result = _copies(samples, train, held_out, config, keep)
        result["membership"] = _membership(run, train, held_out, other_day, config, keep)
        result["canaries"] = _canaries(run, config, keep) if own else None
        result["published"] = _published(run, train, held_out, config)
        result["notes"] = [*given.notes, *result["notes"]]
        how = dataclasses.asdict(sampling) if given.samples is None else None
        result = {**run.provenance(), "sampling": how, **_finished(result, config)}
        if save:
            (run.path / PRIVACY).mkdir(exist_ok=True)
            drawn = "given" if how is None else f"x{sampling.steps}-seed{sampling.seed}"
            name = f"{run.step}-{run.weights}-{len(samples)}{drawn}-{key[:8]}"
            write_json(run.path / PRIVACY / f"{name}.json", result)
            renew_card(run.path)
    return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folders:
    """Images from folders (or of samples an .npz file), for a model that is not ours. See :func:`read_folders`."""

    samples: Shelf | None = None
    train: Shelf | None = None
    held_out: Shelf | None = None
    notes: tuple[str, ...] = ()

    def digests(self) -> dict[str, str]:
        """A short hash of what is given, by its name."""
        given = {name: getattr(self, name) for name in ("samples", "train", "held_out")}
        return {name: _digest(shelf) for name, shelf in given.items() if shelf is not None}


def read_folders(
    samples: str | None,
    train: str | None,
    held_out: str | None,
    *,
    patient_pattern: str | None = None,
    image_size: int | None = None,
) -> Folders:
    """The images of an audit by folders, each as :mod:`medvdm.data.folder` reads them, whatever its sub-folders say.

    Samples and held-out images are brought to the size of the training images, which is noted. An image of which
    nothing says whose it is counts as a patient of its own, also where an image of another folder has the same name.

    Args:
        samples: folder of samples, or an .npz file with ``images``.
        train: folder of training images.
        held_out: folder of images of other patients from the same source, which the threshold is calibrated on.
        patient_pattern: regular expression with one group that gives the patient from the relative path, for training
            and held-out images.
        image_size: height and width that all are brought to.

    Raises:
        as :func:`medvdm.data.load`.
    """
    notes: list[str] = []

    def shelf(what: str, place: str | None, pattern: str | None, size: int | None) -> Shelf | None:
        if place is None:
            return None
        if what == "samples" and place.endswith(".npz"):
            found = _archive(local_path(place, what), size)
        else:
            found = data_.load(DataConfig(data="folder", data_dir=place, patient_pattern=pattern, image_size=size))
        notes.extend(f"{what}: {note}" for note in found.notes)
        shelf = Shelf.from_data(found, np.arange(len(found)))
        if pattern is not None:
            return shelf
        people = [f"{what}: {who}" if who == name else who for who, name in zip(found.patients, found.ids, strict=True)]
        return dataclasses.replace(shelf, patients=np.array(people))

    of_train = shelf("train", train, patient_pattern, image_size)
    if of_train is not None and image_size is None:
        height, width, _ = of_train.read(np.arange(1)).shape[1:]
        image_size = height if height == width else None
    return Folders(
        samples=shelf("samples", samples, None, image_size),
        train=of_train,
        held_out=shelf("held_out", held_out, patient_pattern, image_size),
        notes=tuple(notes),
    )


def audit_folders(
    folders: Folders, config: PrivacyConfig = DEFAULTS, *, work: str | Path | None = None, **changes: Any
) -> dict[str, Any]:
    """Audit samples of any model for copies of its training images.

    Args:
        folders: from :func:`read_folders`, all three given.
        config: the settings.
        work: folder that keeps what is finished, for an audit that may be interrupted.
        changes: settings by name.

    Returns:
        The keys of :func:`medvdm.evaluation.privacy.copies.audit_copies`, ``controls``, ``verdict`` and ``notes``.

    Raises:
        InputError: a folder is not named, or as ``audit_copies``.
    """
    config = settings(config, changes)
    for name in ("samples", "train", "held_out"):
        if getattr(folders, name) is None:
            raise InputError(f"{name}: missing; expected a folder of images, since there is no run to take them from")
    work = None if work is None else local_path(work, "work")
    if work is not None and work.exists() and not work.is_dir():
        raise InputError(f"work: {work} is a file; expected a folder, or nothing")
    with _parts(work, _key({**folders.digests(), **dataclasses.asdict(config)})) as keep:
        result = _copies(folders.samples, folders.train, folders.held_out, config, keep)
    result |= {"membership": None, "canaries": None, "published": None}
    result["notes"] = [*folders.notes, *result["notes"], "no run: membership cannot be attacked without the weights"]
    return _finished(result, config)


# --- The parts ----------------------------------------------------------------------------------------------------


def _copies(samples: Shelf, train: Shelf, held_out: Shelf, config: PrivacyConfig, keep: Keep) -> dict[str, Any]:
    result = audit_copies(samples, train, held_out, keep=keep, alarm=config.alarm, seed=config.audit_seed)
    result["controls"] = controls.run_controls(train, held_out, keep=keep, alarm=config.alarm, seed=config.audit_seed)
    return result


def _check_given(run: Run, given: Folders) -> None:
    """Refuse folders that do not fit the run."""
    if given.train is not None and given.held_out is None:
        raise InputError("held_out: missing; expected a folder of images of other patients beside that of train")
    for name in ("samples", "train", "held_out"):
        shelf = getattr(given, name)
        if shelf is not None and (shape := shelf.read(np.arange(1)).shape[1:]) != run.config.model.image_shape:
            found, expected = ("x".join(map(str, one)) for one in (shape, run.config.model.image_shape))
            raise InputError(f"{name}: images of {found}; expected those of the run, {expected}")


def _groups(
    run: Run, data: ImageData | None, data_dir: str | None, given: Folders
) -> tuple[Shelf, Shelf, Shelf | None]:
    """Training images, held-out images, and other images of training patients, as the run's model knows them."""
    train, held_out, other_day = given.train, given.held_out, None
    if data is not None:
        seen = as_seen(run, data)
        train = Shelf.from_data(seen, np.flatnonzero((data.splits == "train") & ~planted.is_canary(data)))
        other_day = _other_day(run, data_dir)
        if held_out is None:
            held_out = Shelf.from_data(seen, np.flatnonzero(data.splits != "train"))
    return train, held_out, other_day


def _other_day(run: Run, data_dir: str | None) -> Shelf | None:
    """The images that were withheld from training; None where there are none."""
    if not run.config.data.withhold or run.config.data.data not in data_.names():
        return None
    try:
        withheld = planted.withheld(dataclasses.replace(run.config.data, data_dir=data_dir or run.config.data.data_dir))
    except DataError:  # no training patient had two images
        return None
    return Shelf.from_data(as_seen(run, withheld), np.arange(len(withheld)))


def _drawn(run: Run, sampling: SampleConfig, keep: Keep) -> Shelf:
    """Samples of the run. A batch is drawn when one of it is first read, and kept; one at a time is in memory."""
    draw, size = drawer(run, sampling), min(sampling.num, sampling.batch_size)

    def read(rows: np.ndarray) -> np.ndarray:
        images = np.empty((len(rows), *run.config.model.image_shape), np.float32)
        for number in np.unique(rows // size).tolist():
            of_batch = rows // size == number
            batch = keep(f"drawn-{number}", lambda number=number: {"images": draw(number)})["images"]
            images[of_batch] = batch[rows[of_batch] % size]
        return images

    names = [f"sample {i}" for i in range(sampling.num)]
    return Shelf(read, np.array(names), names)


def _spread(shelf: Shelf, config: PrivacyConfig) -> np.ndarray:
    """Positions of at most so many images as the settings say, spread evenly."""
    return np.rint(np.linspace(0, len(shelf) - 1, min(config.images, len(shelf)))).astype(int)


def _losses(
    run: Run, shelf: Shelf, rows: np.ndarray, name: str, gammas: np.ndarray, config: PrivacyConfig, keep: Keep
) -> dict[str, np.ndarray]:
    """(n,) bound and yardstick in nats, and (L, n) errors at each noise level, part by part."""
    found = []
    for start in range(0, len(rows), PART):
        part = rows[start : start + PART]

        def compute(part: np.ndarray = part) -> dict[str, np.ndarray]:
            images = to_levels(shelf.read(part)) if run.eight_bit else shelf.read(part)
            more = {"draws": config.draws, "seed": config.audit_seed, "batch_size": config.loss_batch}
            return {
                "bound": membership.bounds(run.graph, run.params, images, **more),
                "levels": membership.level_losses(run.graph, run.params, images, gammas=gammas, **more),
                "yardstick": _yardstick(images),
            }

        found.append(keep(f"losses-{name}-{start}", compute))
    return {key: np.concatenate([one[key] for one in found], axis=-1) for key in found[0]}


def _gammas(run: Run, config: PrivacyConfig) -> np.ndarray:
    """Noise levels from gamma(0) to gamma(1) of the run's schedule, spread evenly."""
    return np.linspace(*np.asarray(run.model.gamma(jnp.array([0.0, 1.0])), np.float64), config.levels)


def _yardstick(images: np.ndarray) -> np.ndarray:
    """(n,) nats that an image costs without the model: its entropy, or the size of its PNG file."""
    if images.dtype != np.uint8:
        return entropy(images)
    return np.array([_png_bytes(one) for one in images]) * 8 * math.log(2.0)


def _png_bytes(image: np.ndarray) -> int:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    return len(file.getvalue())


def _membership(
    run: Run, train: Shelf, held_out: Shelf, other_day: Shelf | None, config: PrivacyConfig, keep: Keep
) -> dict[str, Any]:
    groups = {"member": train, "held_out": held_out, "other_day": other_day}
    losses, group, patients = [], [], []
    gammas = _gammas(run, config)
    for name, shelf in groups.items():
        if shelf is None or not len(shelf):
            continue
        rows = _spread(shelf, config)
        losses.append(_losses(run, shelf, rows, name, gammas, config, keep))
        group += [name] * len(rows)
        patients += list(shelf.patients[rows])
    return membership.membership(
        np.concatenate([one["levels"] for one in losses], axis=-1),
        np.concatenate([one["bound"] for one in losses]),
        np.array(group),
        np.array(patients),
        gammas=gammas,
        yardstick=np.concatenate([one["yardstick"] for one in losses]),
        seed=config.audit_seed,
    )


def _canaries(run: Run, config: PrivacyConfig, keep: Keep) -> dict[str, Any] | None:
    """Exposure of the canaries that the run was trained with; None without any."""
    number, shape, seed = run.config.data.canaries, run.config.model.image_shape, run.config.data.data_seed
    if not number:
        return None
    copies = planted.copies_of(number, run.config.data.canary_copies)
    labels = np.zeros((1 + config.secrets, run.config.model.classes), np.float32) if run.config.model.classes else None
    losses = []
    for i in range(number):

        def compute(i: int = i) -> dict[str, np.ndarray]:
            secrets = planted.references(i, config.secrets, shape, seed)
            images = np.concatenate([planted.canary(i, shape, seed)[None], secrets])
            images = images if run.eight_bit else images / np.float32(255)
            more = {"draws": config.draws, "seed": config.audit_seed, "batch_size": config.loss_batch}
            return {"bound": membership.bounds(run.graph, run.params, images, labels=labels, **more)}

        losses.append(keep(f"canary-{i}", compute)["bound"])
    every = np.stack(losses)
    return canaries.summary(copies, every[:, 0], every[:, 1:])


def _published(run: Run, train: Shelf, held_out: Shelf, config: PrivacyConfig) -> dict[str, Any] | None:
    """What mean image and components give away, of the baselines' file and of a model that holds some itself.

    None where there are fewer patients than the attack needs.
    """
    spaces = {"baselines.npz": (run.baselines.mean, run.baselines.components, run.baselines.variances)}
    if "basis" in run.params:
        spaces["weights"] = tuple(np.asarray(run.params["basis"][name]) for name in ("mean", "components", "variances"))
    some = [shelf.take(_spread(shelf, config)) for shelf in (train, held_out)]
    patients = [shelf.patients for shelf in some]
    if min(len(set(who.tolist())) for who in patients) < membership.LEAST:
        return None
    images = [shelf.read(np.arange(len(shelf))) for shelf in some]
    return {
        name: published.components_give(
            *images, *space, patients=patients[0], held_out_patients=patients[1], seed=config.audit_seed
        )
        for name, space in spaces.items()
    }


def _finished(result: dict[str, Any], config: PrivacyConfig) -> dict[str, Any]:
    """With the settings, the alarms and the verdict."""
    return {
        "version": version(),
        "settings": dataclasses.asdict(config),
        **result,
        "alarms": verdict.alarms(result),
        "verdict": verdict.words(result),
    }


# --- What is kept on the way --------------------------------------------------------------------------------------


def _key(about: dict[str, Any]) -> str:
    """A short hash of all that the numbers of an audit depend on."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _parts(folder: Path | None, key: str) -> Iterator[Keep]:
    """Keeps each part's arrays until the audit is through; a folder that ``key`` names, so parts of others are not
    taken. Without a folder they are kept nowhere beyond the audit.

    Whoever has to mend the input will not come back to these parts, so nothing is left of a refusal.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield _keeper(Path(temporary))
        return
    parts, is_new = folder / f".parts-{key}", not folder.exists()
    try:
        yield _keeper(parts)
    except (InputError, DataError):
        _remove(parts, is_new)
        raise
    _remove(parts, is_new)


def _remove(parts: Path, with_its_folder: bool) -> None:
    shutil.rmtree(parts, ignore_errors=True)
    if with_its_folder:
        with suppress(OSError):  # it is not there, or holds something by now
            parts.parent.rmdir()


def _keeper(folder: Path) -> Keep:
    def keep(name: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        path = folder / f"{name}.npz"
        try:
            with np.load(path, allow_pickle=False) as kept:
                return dict(kept)
        except (FileNotFoundError, zipfile.BadZipFile, ValueError, EOFError):
            pass  # not there, or damaged: once more
        found = compute()
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(path) as file:
            np.savez(file, **found)
        return found

    return keep


def _archive(path: Path, image_size: int | None) -> ImageData:
    """Images of an .npz file as :func:`medvdm.runs.provenance.write_samples` writes it, brought to a size."""
    try:
        with np.load(path, allow_pickle=False) as found:
            images = found["images"]
    except FileNotFoundError:
        raise MissingFileError(f"samples: {path} is not there; expected an .npz file with 'images'") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as problem:
        raise InputError(f"samples: {path}: {problem}; expected an .npz file with 'images'") from None
    data = data_.from_arrays(images, name="samples")
    if image_size is None or data.image_shape[:2] == (image_size, image_size):
        return dataclasses.replace(data, notes=())
    small = np.stack([resize(data.read(np.array([i]))[0], image_size) for i in range(len(data))])
    height, width, _ = data.image_shape
    note = f"resized from {width} x {height} (width x height) to {image_size} x {image_size} pixels"
    return dataclasses.replace(data_.from_arrays(small, name="samples"), notes=(note,))


def _digest(shelf: Shelf) -> str:
    """A short hash of a shelf's names and patients, and of a few of its images."""
    some = shelf.read(np.unique(np.linspace(0, len(shelf) - 1, 16).astype(int)))
    about = [list(map(str, shelf.names)), list(map(str, shelf.patients))]
    return hashlib.sha256(json.dumps(about).encode() + some.tobytes()).hexdigest()[:16]
