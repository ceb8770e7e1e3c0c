"""Sources of images by name.

>>> from medvdm import data
>>> images = data.load(data.DataConfig(data="phantom", num_images=100, image_size=32))
>>> images.read(images.indices("train")[:4]).shape
(4, 32, 32, 1)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from medvdm.data import planted
from medvdm.data.arrays import from_arrays
from medvdm.data.base import SPLITS, ImageData, Reading, index_of, split_of_patient
from medvdm.errors import InputError, nearest

__all__ = [
    "SPLITS",
    "DataConfig",
    "ImageData",
    "Reading",
    "example_images",
    "from_arrays",
    "index_of",
    "load",
    "names",
    "split_of_patient",
]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they are brought to one size."""

    data: str = "phantom"
    """Source of the images, which is phantom (generated), nih, folder, or a 2-D MedMNIST such as pneumoniamnist."""
    data_dir: str | None = None
    """Folder with the images (nih, folder), or folder or .npz file of MedMNIST, which is downloaded otherwise."""
    image_size: int | None = None
    """Height and width in pixels that the images are brought to; by default the size that the source has."""
    fit: Literal["pad", "crop", "stretch"] = "pad"
    """What image_size does to images that are not square (black bars, the centre square, or a changed aspect)."""
    num_images: int = 2800
    """Number of images (phantom only)."""
    data_seed: int = 0
    """Seed of the images (phantom), of which are withheld, and of the canaries."""
    visits: int = 2
    """Images of each patient (phantom only)."""
    withhold: int = 0
    """Training patients of whom one image is left out of training, for a privacy audit."""
    canaries: int = 0
    """Synthetic X-rays with a secret that are added to the training images, for a privacy audit."""
    canary_copies: str = "1"
    """How often canaries are added, as numbers in turn (1,2,4)."""
    patient_pattern: str | None = None
    """Regular expression with one group, searched in the relative path, that gives the patient (folder only)."""
    window: str = "full"
    """Stored values that become black and white (folder only), as LOW,HIGH (in Hounsfield units for CT), or data or
    percentile (least and greatest value, or percentiles 0.1 and 99.9, of the training images), or full, which is each
    file's own range."""


def names() -> tuple[str, ...]:
    """Names that :func:`load` knows."""
    return tuple(_loaders())


def load(config: DataConfig) -> ImageData:
    """Load the images that ``config`` describes.

    Raises:
        InputError: unknown source, a setting that it cannot use, or images too small for canaries.
        MissingFileError, DataError, MissingPackageError: see the source's own ``load``.
    """
    loaders = _loaders()
    if config.data not in loaders:
        raise InputError(f"data: '{config.data}'; {nearest(config.data, loaders)}")
    _check(config)
    return planted.apply(loaders[config.data](config), config)


def example_images(*, image_size: int = 64, num_images: int = 2800) -> ImageData:
    """Chest X-rays to look at without a download: real ones if there are any here, else phantoms.

    Real ones are NIH images in the folder that the environment variable MEDVDM_DATA_DIR names, or in its sub-folder
    ``nih-chestxray8-256``.

    Args:
        image_size: height and width in pixels.
        num_images: number of phantoms; of real images, all are taken.

    Raises:
        MissingFileError, DataError: MEDVDM_DATA_DIR is set and holds no NIH images, see :mod:`medvdm.data.nih`.
    """
    folder = os.environ.get("MEDVDM_DATA_DIR")
    if not folder:
        return load(DataConfig(image_size=image_size, num_images=num_images))
    inside = os.path.join(folder, "nih-chestxray8-256")
    return load(DataConfig(data="nih", data_dir=inside if os.path.isdir(inside) else folder, image_size=image_size))


def _check(config: DataConfig) -> None:
    """Refuse settings that would be ignored or fail late."""
    from medvdm.data.convert import FITS

    if config.image_size is not None and config.image_size < 1:
        raise InputError(f"image_size: {config.image_size}; expected at least 1")
    if config.fit not in FITS:
        raise InputError(f"fit: '{config.fit}'; {nearest(str(config.fit), FITS)}")
    if config.data_dir is not None and not config.data_dir:
        raise InputError("data_dir: ''; expected a folder")
    if config.data_dir is not None and config.data == "phantom":
        raise InputError(f"data_dir: '{config.data_dir}'; phantom images are generated and read from no folder")
    if config.patient_pattern is not None and config.data != "folder":
        raise InputError(f"patient_pattern: '{config.patient_pattern}'; used by --data folder only, not {config.data}")
    if config.window != "full" and config.data != "folder":
        raise InputError(f"window: '{config.window}'; used by --data folder only, not {config.data}")
    if config.visits != 2 and config.data != "phantom":
        raise InputError(f"visits: {config.visits}; used by --data phantom only, not {config.data}")
    if config.withhold < 0:
        raise InputError(f"withhold: {config.withhold}; expected 0 or more patients")
    planted.copies_of(config.canaries, config.canary_copies)
    if config.canary_copies != "1" and not config.canaries:
        raise InputError(f"canary_copies: '{config.canary_copies}'; used with canaries only (--canaries N)")


def _loaders() -> dict[str, Callable[[DataConfig], ImageData]]:
    from medvdm.data import medmnist

    return {"phantom": _phantom, "nih": _nih, "folder": _folder, **dict.fromkeys(medmnist.FLAGS, _medmnist)}


# Each source is imported when it is used: one that is broken or lacks a package leaves the others alone.


def _phantom(config: DataConfig) -> ImageData:
    from medvdm.data import phantom

    return phantom.load(
        num_images=config.num_images, image_size=config.image_size, seed=config.data_seed, visits=config.visits
    )


def _nih(config: DataConfig) -> ImageData:
    from medvdm.data import nih

    return nih.load(config.data_dir, config.image_size, config.fit)


def _folder(config: DataConfig) -> ImageData:
    from medvdm.data import folder

    return folder.load(config.data_dir, config.image_size, config.fit, config.patient_pattern, config.window)


def _medmnist(config: DataConfig) -> ImageData:
    from medvdm.data import medmnist

    return medmnist.load(config.data, config.data_dir, config.image_size, config.fit)
