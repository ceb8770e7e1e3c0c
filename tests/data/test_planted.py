"""What a privacy audit needs of the data: images withheld of people who stay, canaries planted, and both refused."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from medvdm import data as data_
from medvdm.data import DataConfig, ImageData, from_arrays, planted
from medvdm.errors import DataError, InputError
from medvdm.runs.record import data_record

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 18, 21)).astype(np.uint8)  # not square, no multiple of 4


def made(pixels: np.ndarray = PIXELS, images_each: int = 3) -> ImageData:
    return from_arrays(pixels, np.arange(len(pixels)) % 2, patients=np.arange(len(pixels)) // images_each)


def phantoms(**changes: Any) -> DataConfig:
    return DataConfig(**{"num_images": 60, "image_size": 16, **changes})


# --- Withheld ----------------------------------------------------------------------------------------------------


def test_one_image_of_each_of_some_training_patients_is_left_out() -> None:
    everything = made()
    kept, left_out = planted.withhold(everything, 5, seed=1)
    assert len(left_out) == 5 and len(set(everything.patients[left_out])) == 5
    assert (everything.splits[left_out] == "train").all()
    assert len(kept) == 55 and set(kept.patients) == set(everything.patients)  # everybody is still there
    rows = [i for i in range(60) if i not in left_out]
    assert kept.ids == tuple(everything.ids[i] for i in rows)
    for what in ("labels", "patients", "splits"):
        assert np.array_equal(getattr(kept, what), getattr(everything, what)[rows])
    assert np.array_equal(kept.levels(np.arange(55))[..., 0], PIXELS[rows])
    assert kept._digests == tuple(everything._digests[i] for i in rows)
    assert kept.reading.read == 55 and sum(kept.reading.skipped.values()) == 5
    assert "withheld for a privacy audit: 5 images" in kept.notes[-1] and "asked" not in kept.notes[-1]


def test_what_is_withheld_is_drawn_by_the_seed() -> None:
    everything = made()
    first, again, other = (planted.withhold(everything, 5, seed)[1].tolist() for seed in (1, 1, 2))
    assert first == again != other
    # Each image of three has one chance in three: of 2100 draws 700, four standard deviations 87.
    one_patient = from_arrays(PIXELS[:3], [0, 1, 0], patients=["a"] * 3, splits=["train"] * 3)
    counts = Counter(int(planted.withhold(one_patient, 1, seed)[1][0]) for seed in range(2100))
    assert all(abs(counts[i] - 700) < 87 for i in range(3))


def test_fewer_patients_with_two_images_than_asked_for() -> None:
    everything = made()
    able = len(set(everything.patients[everything.splits == "train"]))
    kept, left_out = planted.withhold(everything, 1000)
    assert len(left_out) == able == len(everything) - len(kept)
    assert f"(1,000 asked for; {able} have two)" in kept.notes[-1]


def test_no_patient_with_two_images() -> None:
    everything = made(images_each=1)
    kept, left_out = planted.withhold(everything, 4)
    assert len(left_out) == 0 and kept.fingerprint() == everything.fingerprint()
    assert "nothing" in kept.notes[-1] and kept.reading == everything.reading
    with pytest.raises(DataError, match="no training patient has two"):
        planted.withheld(phantoms(visits=1, withhold=3))


def test_the_config_gives_the_withheld_images_back() -> None:
    config = phantoms(withhold=4, canaries=2, visits=3, data_seed=7)
    training, held = data_.load(config), planted.withheld(config)
    everything = data_.load(phantoms(visits=3, data_seed=7))
    assert set(held.ids) == set(everything.ids) - set(training.ids) and len(held) == 4
    at = [everything.ids.index(name) for name in held.ids]
    assert np.array_equal(held.read(np.arange(4)), everything.read(at))
    assert set(held.patients) <= set(training.patients[training.splits == "train"])
    with pytest.raises(InputError, match="withhold: 0"):
        planted.withheld(phantoms())


# --- Canaries ----------------------------------------------------------------------------------------------------


def discs(shape: tuple[int, int, int], number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The canary less the X-ray under it, and which cells are brighter, found from the pixels of all its references."""
    canary = planted.canary(number, shape, seed)
    images = np.concatenate([canary[None], planted.references(number, 300, shape, seed)]).astype(int)
    added = images - images.min(axis=0)  # each cell is empty in half of the secrets
    h, w = shape[0] // 4, shape[1] // 4
    top, left = (shape[0] % 4) // 2, (shape[1] % 4) // 2
    cells = added[:, top : top + 4 * h, left : left + 4 * w, 0].reshape(-1, 4, h, 4, w).sum(axis=(2, 4))
    return added, cells


@pytest.mark.parametrize("shape", [(16, 16, 1), (64, 64, 1), (18, 21, 3), (50, 35, 1)])
def test_every_secret_has_eight_equal_discs_and_the_same_sum(shape: tuple[int, int, int]) -> None:
    added, cells = discs(shape, 3, seed=5)
    assert len(np.unique(cells)) == 2 and cells.min() == 0  # a cell is empty or holds the one disc
    filled = cells > 0
    assert (filled.sum(axis=(1, 2)) == 8).all()
    assert len({pattern.tobytes() for pattern in filled}) == 301  # distinct, the planted one among them
    assert np.array_equal(filled[0], planted.secret(3, seed=5))
    assert len(np.unique(added.sum(axis=(1, 2, 3)))) == 1
    assert (added == added[..., :1]).all()  # all channels alike
    assert 40 <= added.max() <= planted.STRENGTH


def test_a_secret_is_one_of_all_and_no_level_is_clipped() -> None:
    assert len(list(itertools.combinations(range(16), 8))) == planted.SECRETS
    numbers = planted._secret_numbers(2, 0)
    assert np.array_equal(np.sort(numbers), np.arange(planted.SECRETS))
    assert planted._bases(np.arange(40), (32, 32, 1), 0).max() <= 255 - planted.STRENGTH
    assert len(planted.references(0, planted.SECRETS - 1, (16, 16, 1))) == 12_869


def test_each_cell_is_filled_in_half_of_the_canaries() -> None:
    """A secret drawn at random: four standard errors of a fair coin. Canaries of other seeds have others."""
    secrets = np.array([planted.secret(i) for i in range(400)])
    assert (np.abs(secrets.mean(axis=0) - 0.5) < 4 * 0.5 / np.sqrt(400)).all()
    same = np.mean([np.array_equal(planted.secret(i), planted.secret(i, seed=1)) for i in range(100)])
    assert same < 0.05


def test_a_canary_is_a_person_of_its_own() -> None:
    bases = planted._bases(np.arange(8), (32, 32, 1), 0).astype(float)[..., 0]
    assert min(np.abs(a - b).mean() for a, b in itertools.combinations(bases, 2)) > 5
    assert not np.array_equal(planted.canary(0, (32, 32, 1)), planted.canary(0, (32, 32, 1), seed=1))
    assert np.array_equal(planted.canary(0, (32, 32, 1)), planted.canary(0, (32, 32, 1)))


@pytest.mark.parametrize("stored", [np.uint8, np.float32])
def test_canaries_are_planted_in_training_only(stored: type) -> None:
    pixels = PIXELS if stored is np.uint8 else (PIXELS / 255).astype(np.float32)
    plain = made(pixels)
    data = planted.plant(plain, 3, "1,2", seed=4)
    assert data.ids[60:] == ("canary-000-copy-01", "canary-001-copy-01", "canary-001-copy-02", "canary-002-copy-01")
    assert data.patients[60:].tolist() == ["canary 0", "canary 1", "canary 1", "canary 2"]
    assert (data.splits[60:] == "train").all() and not data.labels[60:].any()
    assert np.array_equal(planted.is_canary(data), np.arange(64) >= 60) and not planted.is_canary(plain).any()
    expected = np.array([planted.canary(i, (18, 21, 1), 4) for i in (0, 1, 1, 2)])
    assert np.array_equal(data.levels(np.arange(60, 64)), expected)
    mixed = [63, 5, 60, 5]
    assert np.array_equal(data.levels(mixed), [expected[3], PIXELS[5, ..., None], expected[0], PIXELS[5, ..., None]])
    assert np.array_equal(data.read(mixed), data.levels(mixed).astype(np.float32) / np.float32(255))
    assert data.reader(np.array(mixed)).dtype == stored
    assert np.array_equal(data.read([7, 3]), plain.read([7, 3]))
    assert data.read([]).shape == (0, 18, 21, 1)
    assert data.level_use().rounded == 0


def test_a_note_says_that_canaries_are_in() -> None:
    record = data_record(planted.plant(made(), 3, "1,2"))
    assert any("not a model to publish: 3 canaries in 4 copies" in note for note in record["notes"])
    assert record["counts"]["train"]["images"] == made().counts()["train"]["images"] + 4


def test_copies_of_a_canary_are_no_twins_across_the_split() -> None:
    assert planted.plant(made(), 3, "5").check_splits() == made().check_splits()


def test_the_fingerprint_covers_canaries() -> None:
    configs = [
        {},
        {"canaries": 3},
        {"canaries": 4},
        {"canaries": 3, "canary_copies": "1,2"},
        {"canaries": 3, "data_seed": 1},
        {"withhold": 3},
        {"withhold": 3, "canaries": 3},
    ]
    found = [data_.load(phantoms(**one)).fingerprint() for one in configs]
    assert len(set(found)) == len(configs)
    assert found == [data_.load(phantoms(**one)).fingerprint() for one in configs]
    assert found[0] == data_.load(phantoms(canary_copies="1", withhold=0, visits=2)).fingerprint()
    plain = made()
    seeds = [planted.plant(plain, 1, seed=seed) for seed in (0, 1)]  # only what is drawn differs
    assert seeds[0].ids == seeds[1].ids and seeds[0].fingerprint() != seeds[1].fingerprint()


def test_copies_are_dealt_out_in_turn() -> None:
    assert planted.copies_of(5, "1,2,4").tolist() == [1, 2, 4, 1, 2]
    assert planted.copies_of(2, " 3 ").tolist() == [3, 3]
    assert planted.copies_of(0, "1").tolist() == []


@pytest.mark.parametrize("copies", ["", "0", "1,,2", "1.5", "-1", "two", "1001", "9" * 50, "²", "1 2"])
def test_copies_that_are_no_positive_integers_are_refused(copies: str) -> None:
    with pytest.raises(InputError, match="canary_copies: '"):
        data_.load(phantoms(canaries=2, canary_copies=copies))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"canaries": -1}, "canaries: -1; expected 0 to 1000"),
        ({"canaries": 1001}, "canaries: 1001; expected 0 to 1000"),
        ({"canaries": 1, "image_size": 15}, "canaries: images of 15 x 15 pixels; expected 16 to 1024"),
        ({"canary_copies": "2"}, "canary_copies: '2'; used with canaries only"),
        ({"withhold": -2}, "withhold: -2"),
        ({"data": "nih", "data_dir": "x", "visits": 3}, "visits: 3; used by --data phantom only, not nih"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        data_.load(phantoms(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: planted.references(0, planted.SECRETS, (16, 16, 1)), "num: 12870; expected 1 to 12,869"),
        (lambda: planted.references(0, 0, (16, 16, 1)), "num: 0"),
        (lambda: planted.canary(-1, (16, 16, 1)), "number: -1"),
        (lambda: planted.canary(0, (16, 16, 1), seed=-1), "seed: -1"),
        (lambda: planted.canary(0, (16, 1025, 1)), "16 x 1025"),
        (lambda: planted.plant(made(), 0), "canaries: 0"),
        (lambda: planted.plant(made(PIXELS[:, :12]), 1), "12 x 21"),
        (lambda: planted.withhold(made(), 0), "withhold: 0"),
        (lambda: planted.withhold(made(), 1, seed=-1), "seed: -1"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(call: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()


def test_the_same_canaries_cannot_be_planted_twice() -> None:
    with pytest.raises(DataError, match="'canary-000-copy-01' is there twice"):
        planted.plant(planted.plant(made(), 2), 3)


def test_images_from_python_must_have_what_the_settings_say() -> None:
    plain, settings = made(), DataConfig()
    planted.check_given(plain, settings)
    planted.check_given(planted.plant(plain, 3), settings)
    planted.check_given(planted.plant(plain, 3, "2"), replace(settings, canaries=3))
    planted.check_given(planted.withhold(plain, 3)[0], replace(settings, withhold=3))
    for there in (plain, planted.plant(plain, 2)):
        with pytest.raises(InputError, match="canaries: 3, and the images given from Python have"):
            planted.check_given(there, replace(settings, canaries=3))
    with pytest.raises(InputError, match="withhold: 3, and all images are given from Python"):
        planted.check_given(plain, replace(settings, withhold=3))
