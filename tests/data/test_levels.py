"""Integer images: every source gives its bytes back, other values are rounded by one rule, and gaps are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from test_convert import write_dicom
from test_nih import write_labels

from medvdm.data import DataConfig, ImageData, files, folder, from_arrays, load, medmnist, nih
from medvdm.data.levels import IMAGE_BITS, LevelUse, find_gaps
from medvdm.errors import DataError, InputError, InputTypeError
from medvdm.images import to_levels

ALL = np.arange(256, dtype=np.uint8).reshape(16, 16)  # each of the 256 levels once, no two rows alike


# ---------------------------------------------------------------- the rule


def test_the_rule_is_floor_of_255_x_and_a_half():
    """Against whole numbers: k / 65535 is nearest to level floor((510 k + 65535) / 131070)."""
    k = np.arange(65536)
    expected = (510 * k + 65535) // 131070
    for kind in (np.float32, np.float64):
        np.testing.assert_array_equal(to_levels((k / 65535).astype(kind)), expected)
    assert to_levels(np.float32([0.5])) == 128  # 127.5, exactly half way


def test_no_rounding_error_of_its_own():
    """The greatest float32 below a half-way point stays below: in float32, 255 x + 1/2 would round up to it."""
    below = np.nextafter(np.float32(0.5 / 255), np.float32(0))
    assert 255 * float(below) < 0.5 and np.float32(255) * below + np.float32(0.5) == 1  # the trap
    assert to_levels(np.array([below])) == 0


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_levels_come_back_from_floats(kind):
    np.testing.assert_array_equal(to_levels((ALL / 255).astype(kind)), ALL)


def test_bytes_pass_as_they_are():
    assert to_levels(ALL) is ALL


@pytest.mark.parametrize(("images", "kind", "words"), [
    (np.array([0.5, np.nan]), InputError, "nan"), (np.array([-1e-3]), InputError, "[0, 1]"),
    (np.array([1.5]), InputError, "dividing by 255"), (np.array([np.inf]), InputError, "[0, 1]"),
    (ALL.astype(np.uint16), InputTypeError, "uint16"), (ALL.astype(int), InputTypeError, "int64"),
    (ALL > 3, InputTypeError, "bool"),
])  # fmt: skip
def test_what_is_no_image_is_refused(images, kind, words):
    with pytest.raises(kind) as error:
        to_levels(images, "scans")
    assert str(error.value).startswith("scans: ") and words in str(error.value)


# ---------------------------------------------------------------- every source


def of_file(write: Callable[[Path], object], name: str) -> Callable[[Path], ImageData]:
    def made(root: Path) -> ImageData:
        write(root / name)
        return folder.load(str(root))

    return made


def of_nih(root: Path, image_size: int | None = None) -> ImageData:
    write_labels(root, [("00000001_000.png", "Effusion", 1)])
    Image.fromarray(ALL).save(root / "00000001_000.png")
    return nih.load(str(root), image_size)


def of_medmnist(root: Path, image_size: int | None = None) -> ImageData:
    parts = {f"{split}_images": ALL[None] for split in ("train", "val", "test")}
    parts |= {f"{split}_labels": np.zeros((1, 1), np.uint8) for split in ("train", "val", "test")}
    np.savez(root / "pneumoniamnist.npz", **parts)
    return medmnist.load("pneumoniamnist", str(root), image_size)


SOURCES = {
    "arrays": lambda _: from_arrays(ALL[None]),
    "arrays float32": lambda _: from_arrays(ALL[None].astype(np.float32) / np.float32(255)),
    "arrays float64": lambda _: from_arrays(ALL[None] / 255),
    "png": of_file(lambda p: Image.fromarray(ALL).save(p), "a.png"),
    "png of 16 bits": of_file(lambda p: Image.fromarray(ALL.astype(np.uint16) * 257).save(p), "a.png"),
    "tiff": of_file(lambda p: tifffile.imwrite(p, ALL, photometric="minisblack"), "a.tif"),
    "tiff, white is zero": of_file(lambda p: tifffile.imwrite(p, 255 - ALL, photometric="miniswhite"), "a.tif"),
    "tiff, float": of_file(lambda p: tifffile.imwrite(p, ALL / np.float32(255), photometric="minisblack"), "a.tif"),
    "bmp": of_file(lambda p: Image.fromarray(ALL).save(p), "a.bmp"),
    "dicom": of_file(lambda p: write_dicom(p, ALL), "a.dcm"),
    "dicom, inverted": of_file(lambda p: write_dicom(p, 255 - ALL, kind="MONOCHROME1"), "a.dcm"),
    "dicom, rescaled": of_file(lambda p: write_dicom(p, ALL, RescaleSlope=3, RescaleIntercept=-1024), "a.dcm"),
    "nih": of_nih,
    "nih of its own size": lambda root: of_nih(root, 16),
    "medmnist": of_medmnist,
    "medmnist of its own size": lambda root: of_medmnist(root, 16),
}
STORED_AS_BYTES = {
    *("arrays", "png", "tiff", "tiff, white is zero", "bmp"),
    *("nih", "nih of its own size", "medmnist", "medmnist of its own size"),
}


@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_its_bytes_back(tmp_path, monkeypatch, source, limit):
    """All 256 values, from memory and from disk; bytes stay bytes on the way."""
    if limit is not None:
        monkeypatch.setattr(files, "MEMORY_LIMIT", limit)
    data = SOURCES[source](tmp_path)
    levels = data.levels([0])
    assert levels.dtype == np.uint8
    np.testing.assert_array_equal(levels, ALL[None, ..., None])
    np.testing.assert_allclose(data.read([0]), levels / np.float32(255), rtol=0, atol=1e-7)
    assert data.reader(np.array([0])).dtype == (np.uint8 if source in STORED_AS_BYTES else np.float32)


@pytest.mark.parametrize("source", sorted(STORED_AS_BYTES))
def test_what_is_stored_as_bytes_states_no_rounding(tmp_path, source):
    assert SOURCES[source](tmp_path).reading.rounded_from == ()


def test_colours_keep_their_bytes():
    rgb = np.stack([ALL, 255 - ALL, ALL.T], axis=-1)[None]
    np.testing.assert_array_equal(from_arrays(rgb).levels([0]), rgb)


def test_read_and_levels_agree_wherever_the_images_come_from():
    data = load(DataConfig(num_images=6, image_size=16))
    np.testing.assert_array_equal(data.levels([4, 1]), to_levels(data.read([4, 1])))
    assert data.levels([]).shape == (0, 16, 16, 1) and data.levels([]).dtype == np.uint8


def test_a_reader_of_nonsense_is_refused():
    data = from_arrays(ALL[None])
    object.__setattr__(data, "reader", lambda i: np.full((len(i), 16, 16, 1), np.nan, np.float32))
    for read in (data.read, data.levels):
        with pytest.raises(InputError, match="nan"):
            read([0])


# ---------------------------------------------------------------- what was rounded, and why


def rounding(data: ImageData) -> str:
    """The note on rounding of images that are all for training; '' if there is none."""
    object.__setattr__(data, "splits", np.full(len(data), "train"))
    return next((note for note in data.level_use().notes if "rounded" in note), "")


def test_what_is_rounded_says_so_with_the_reason(tmp_path):
    deep = (ALL.astype(np.uint16) << 8) + 100
    for name, why in {"16": "files of 16 bits", "12": "files of DICOM, 12 bits", "mixed": "files of 16 bits"}.items():
        (tmp_path / name).mkdir()
        if name == "12":
            write_dicom(tmp_path / name / "a.dcm", deep >> 4, bits=12)
        else:
            Image.fromarray(deep).save(tmp_path / name / "a.png")
        if name == "mixed":
            Image.fromarray(ALL).save(tmp_path / name / "b.png")
        assert f"({why})" in rounding(folder.load(str(tmp_path / name))), name
    both = rounding(folder.load(str(tmp_path / "16"), image_size=8))
    assert "(files of 16 bits; resized from 16 x 16): 100% of the pixels" in both
    window = rounding(folder.load(str(tmp_path / "16"), window="0,70000"))
    assert "(files of 16 bits; window 0,70000)" in window


def test_what_is_resized_or_made_of_floats_says_so(tmp_path):
    assert "(resized from 16 x 16)" in rounding(of_nih(tmp_path, 8))
    assert "(resized from 16 x 16)" in rounding(of_medmnist(tmp_path, 8))
    assert "(arrays of float64)" in rounding(from_arrays(ALL[None] / 300))
    assert "(drawn as float32)" in rounding(load(DataConfig(num_images=2, image_size=16)))


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_not_rounded_does_not_say_so(tmp_path, source):
    assert rounding(SOURCES[source](tmp_path)) == ""


def test_the_share_that_was_rounded_is_counted():
    images = np.concatenate([np.full((3, 4, 4), 51 / 255), np.full((1, 4, 4), 51.3 / 255)])
    assert ": 25% of the pixels lay" in rounding(from_arrays(images))


# ---------------------------------------------------------------- gaps of one histogram


def histogram(**pixels: int) -> np.ndarray:
    counts = np.zeros(256, np.int64)
    for level, n in pixels.items():
        counts[int(level[1:])] = n
    return counts


@pytest.mark.parametrize("step", [2, 3, 5, 17])
def test_a_comb_saves_the_logarithm_of_its_step(step):
    """An even comb without its two ends, whose outer halves are not missing."""
    comb = np.zeros(256, np.int64)
    comb[::step] = 1000
    teeth = 255 // step + 1
    gaps = find_gaps(comb, comb, 20)
    assert (gaps.missing, gaps.between) == ((teeth - 1) * (step - 1), (teeth - 1) * step - 1)
    ends = 2 * np.log2((1 + step) / 2)
    assert gaps.bits == pytest.approx(((teeth - 2) * np.log2(step) + ends) / teeth)


def test_no_gaps_where_none_are_sure():
    assert find_gaps(np.zeros(256, int), np.zeros(256, int), 20).bits == 0
    assert find_gaps(histogram(_7=10**6), histogram(_7=10**6), 20).missing == 0
    full = np.full(256, 3)
    assert find_gaps(full, full, 20).missing == 0
    rare = histogram(_10=19, _12=1000, _13=1000)
    assert find_gaps(rare, rare, 20).missing == 0  # 19 beside the empty level: too few to be sure
    rare[10] = 20
    assert find_gaps(rare, rare, 20).missing == 1


def test_a_black_border_is_no_gap():
    """Half of the pixels are 0 and the tissue begins at 30: what that saves is far below what is reported."""
    counts = np.zeros(256, np.int64)
    counts[30:] = np.random.default_rng(0).poisson(100 * np.sin(np.linspace(0, np.pi, 226)) + 20)
    counts[0] = counts.sum()
    assert find_gaps(counts, counts, 5).bits < 0.005


# ---------------------------------------------------------------- gaps of sets of images


def phantoms(size: int = 28, n: int = 150) -> np.ndarray:
    return load(DataConfig(num_images=n, image_size=size)).levels(np.arange(n))[..., 0]


@pytest.fixture(scope="module")
def natural() -> np.ndarray:
    """(n, 28, 28) uint8 without gaps."""
    return phantoms()


def use_of(images: np.ndarray) -> LevelUse:
    return from_arrays(images, splits=["train"] * len(images)).level_use()


def image_bits(use: LevelUse) -> float:
    return float(np.mean([gaps.bits for gaps in use.image_gaps]))


def min_max(image: np.ndarray) -> np.ndarray:
    low, high = int(image.min()), int(image.max())
    return np.round((image.astype(float) - low) / max(high - low, 1) * 255).astype(np.uint8)


def equalised(image: np.ndarray) -> np.ndarray:
    below = np.bincount(image.ravel(), minlength=256).cumsum()
    return np.round(255 * below / below[-1]).astype(np.uint8)[image]


#: Done to the whole set by one curve, and what of 254 levels between 0 and 255 it leaves empty at least.
CURVES = {
    "seven bits stretched": (lambda x: np.round((x >> 1) * (255 / 127)).astype(np.uint8), 110),
    "12 of 256 levels": (lambda x: np.round(x / 255 * 11).astype(np.uint8) * np.uint8(23), 220),  # 253 is too rare
    "two levels": (lambda x: (x >> 7) * np.uint8(255), 254),
    "gamma": (lambda x: np.round(255 * (x / 255) ** 0.6).astype(np.uint8), 30),
}
#: Done to each image by a curve of its own: the set has hardly a gap, each image has many.
EACH = {
    "equalised": equalised,
    "stretched": min_max,
    "six bits, stretched": lambda image: min_max(image >> 2),
}


@pytest.mark.parametrize("size", [8, 16, 28, 64])
def test_phantoms_have_no_gaps(size):
    use = use_of(phantoms(size))
    assert use.notes == () and image_bits(use) < IMAGE_BITS / 2


@pytest.mark.parametrize("times", [2, 4])
def test_copies_of_pixels_make_no_gap(natural, times):
    """An image enlarged without interpolation has each pixel many times, and still few independent ones."""
    use = use_of(natural.repeat(times, axis=1).repeat(times, axis=2))
    assert use.notes == () and image_bits(use) < IMAGE_BITS / 2


def test_neither_noise_nor_flat_nor_few_images_have_gaps():
    rng = np.random.default_rng(0)
    for images in (
        rng.integers(0, 256, (300, 28, 28)),
        rng.integers(0, 256, (300, 5, 5)),
        np.clip(rng.normal(128, 40, (3, 28, 28)), 0, 255),
        rng.integers(0, 256, (1, 4, 4)),
        np.repeat(rng.integers(0, 256, (40, 1, 1)), 64).reshape(40, 8, 8),
    ):
        assert use_of(images.astype(np.uint8)).notes == ()


def test_smooth_images_without_noise_have_no_gaps():
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    draws = np.random.default_rng(0).random((60, 2))
    use = use_of(np.stack([128 + 100 * np.sin(3 * a * y + b) * np.cos(2 * b * x) for a, b in draws]).astype(np.uint8))
    assert use.notes == ()


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_for_all_images_is_noticed(natural, name):
    curve, least = CURVES[name]
    use = use_of(curve(natural))
    (note,) = [note for note in use.notes if "never occur" in note]
    assert use.gaps.missing >= least
    assert note.startswith(f"{use.gaps.missing} of {use.gaps.between} gray levels between ")
    assert f"up to {use.gaps.bits:.2f} lower" in note


@pytest.mark.parametrize("name", EACH)
def test_a_curve_for_each_image_is_noticed(natural, name):
    use = use_of(np.stack([EACH[name](image) for image in natural]))
    (note,) = [note for note in use.notes if "image by image" in note]
    assert f"up to {image_bits(use):.2f} lower" in note
    assert image_bits(use) > use.gaps.bits + 0.05


def test_some_images_with_gaps_among_many_are_noticed(natural):
    mixed = np.concatenate([natural, np.stack([equalised(image) for image in natural[:15]])])
    (note,) = use_of(mixed).notes
    assert note.startswith("9% of the images have gaps of their own")


def test_what_gaps_save_of_independent_pixels_is_what_is_said():
    """Equalising each image lowers the entropy of a pixel in its image by about as much as the note says."""
    rng = np.random.default_rng(0)
    images = np.clip(rng.normal(128, 25, (40, 96, 96)), 0, 255).astype(np.uint8)

    def entropy(image: np.ndarray) -> float:
        p = np.bincount(image.ravel(), minlength=256) / image.size
        return float(-(p[p > 0] * np.log2(p[p > 0])).sum())

    changed = np.stack([equalised(image) for image in images])
    lost = 8 - np.mean([entropy(image) for image in changed])  # an equalised image without gaps has 8 bits
    assert image_bits(use_of(changed)) == pytest.approx(lost, rel=0.1)


def test_channels_are_looked_at_one_by_one(natural):
    """Gaps in one channel are seen though the others fill the levels."""
    red = np.stack([min_max(image >> 2) for image in natural])
    use = use_of(np.stack([red, natural, natural[::-1]], axis=-1))
    assert use.notes[0].startswith("33% of the images have gaps of their own")
    assert len(use.image_gaps) == 3 * len(natural) and use.pixels.sum() == 3 * natural.size


def test_little_contrast_is_noticed(natural):
    (note,) = use_of(natural // 16).notes
    assert "from gray level 0 to 1" in note and "contrast" in note  # 16 levels
    assert use_of(natural // 2).notes == ()
    dark = natural // 16
    dark[0, 0, 0] = 255  # one hot pixel
    assert any("contrast" in note for note in use_of(dark).notes)


def test_training_images_are_looked_at_and_no_others(natural):
    changed = np.stack([equalised(image) for image in natural[:50]])
    data = from_arrays(np.concatenate([natural, changed]), splits=["train"] * len(natural) + ["test"] * 50)
    assert data.level_use().notes == () and data.level_use().images == len(natural)
    assert data.level_use() is data.level_use()
    with pytest.raises(DataError, match="'train' has no images"):
        from_arrays(natural, splits=["test"] * len(natural)).level_use()


def test_a_large_set_is_looked_at_in_part(natural, monkeypatch):
    monkeypatch.setattr("medvdm.data.levels.MOST_IMAGES", 100)
    read: list[int] = []
    data = from_arrays(np.round((natural >> 1) * (255 / 127)).astype(np.uint8), splits=["train"] * len(natural))
    inner = data.reader
    object.__setattr__(data, "reader", lambda i: (read.append(len(i)), inner(i))[1])
    use = data.level_use()
    assert (use.images, use.of) == (100, 150) and sum(read) <= 101
    assert use.notes and all(note.endswith("(a sample of 100 of 150 images)") for note in use.notes)


def test_counts(natural):
    use = use_of(natural)
    assert use.distinct == len(np.unique(natural))
    assert use.distinct_per_image == np.median([len(np.unique(image)) for image in natural])
    np.testing.assert_array_equal(use.pixels, np.bincount(natural.ravel(), minlength=256))


# ---------------------------------------------------------------- real images


@pytest.mark.parametrize(("source", "place"), [("pneumoniamnist", "medmnist"), ("nih", "nih-chestxray8-256")])
def test_real_images_use_all_levels(real_data, source, place):
    data = load(DataConfig(data=source, data_dir=str(real_data / place)))
    use = data.level_use()
    assert use.notes == () and use.distinct >= 250 and image_bits(use) < IMAGE_BITS / 4


def test_real_images_that_are_equalised_are_noticed(real_data):
    data = load(DataConfig(data="pneumoniamnist", data_dir=str(real_data / "medmnist")))
    images = data.levels(data.indices("train")[:200])[..., 0]
    for change in EACH.values():
        assert image_bits(use_of(np.stack([change(image) for image in images]))) > 0.2
