"""Filling in files and arrays by a run: what is kept, what is written, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from helpers import refused, said, tree
from PIL import Image

import medvdm
from medvdm.errors import InputError
from medvdm.models import cascade
from medvdm.runs import provenance
from medvdm.runs.inpaint import inpaint_file
from medvdm.runs.run import load
from medvdm.theory.conditional import CellMean, Mask

QUICK = {"steps": 2, "turns": 1}
MISSING = np.zeros((16, 16), bool)
MISSING[4:9, 6:13] = True


@pytest.fixture(scope="module")
def pixels(trained_pixels):
    return load(trained_pixels)


@pytest.fixture
def files(tmp_path):
    """An 8-bit and a 16-bit image of the run's size, a mask, and both images' values."""
    rng = np.random.default_rng(0)
    eight, sixteen = rng.integers(0, 256, (16, 16), np.uint8), rng.integers(0, 65536, (16, 16), np.uint16)
    Image.fromarray(eight).save(tmp_path / "eight.png")
    Image.fromarray(sixteen).save(tmp_path / "sixteen.png")
    Image.fromarray(MISSING).save(tmp_path / "mask.png")
    return tmp_path, eight, sixteen


def test_arrays_keep_what_is_known_and_their_own_masks(pixels):
    x = np.random.default_rng(1).integers(0, 256, (2, 16, 16), np.uint8)
    masks = np.stack([MISSING, MISSING[::-1]])
    out = medvdm.inpaint(pixels, x, masks, samples=2, **QUICK)
    assert out.shape == (2, 2, 16, 16, 1) and out.dtype == np.uint8
    for one, image, mask in zip(out, x, masks, strict=True):
        np.testing.assert_array_equal(one[:, ~mask, 0], np.stack([image[~mask]] * 2))
        assert (one[0][mask] != one[1][mask]).any()
    same = medvdm.inpaint(pixels, x[:1].astype(np.float32)[..., None] / 255, MISSING, **QUICK)
    assert (np.abs(same[0, 0].astype(int) - out[0, 0]) <= 1).mean() > 0.98  # whatever the batch


@pytest.mark.parametrize("k", [2, 4])
def test_a_large_image_reduced_is_the_small_one(pixels, k):
    y = np.random.default_rng(2).integers(0, 256, (2, 16 // k, 16 // k, 1), np.uint8)
    y[0, 0, 0], y[1, 0, 0] = 0, 255
    out = medvdm.restore(pixels, y, CellMean(k), samples=2, **QUICK)
    for draw in (0, 1):
        np.testing.assert_array_equal(cascade.reduced(jnp.asarray(out[:, draw]), k), y)
    noisy = medvdm.restore(pixels, y, CellMean(k), noise=0.2, samples=2, **QUICK)
    assert (np.asarray(cascade.reduced(jnp.asarray(noisy[:, 0]), k)) != y).any()


def test_labels_and_guidance_are_those_of_sample(pixels):
    """With random weights, as few steps of training teach a label too little to change a gray value."""
    run = dataclasses.replace(pixels, params=tiny.weights(pixels.config.model, 0.15))
    x = np.full((1, 16, 16), 90, np.uint8)
    one, other = run.class_names
    little, much = (medvdm.inpaint(run, x, MISSING, label=one, guidance=w, **QUICK) for w in (1.0, 3.0))
    assert (little != much).any()
    assert (little != medvdm.inpaint(run, x, MISSING, label=other, guidance=1.0, **QUICK)).any()
    with pytest.raises(InputError, match="label: 'Nobody'"):
        medvdm.inpaint(run, x, MISSING, label="Nobody", **QUICK)


@pytest.mark.parametrize("name", ["eight", "sixteen"])
def test_a_file_keeps_its_bit_depth_and_its_known_values_and_says_what_it_is(pixels, files, name):
    folder, *values = files
    values = dict(zip(("eight", "sixteen"), values, strict=True))[name]
    before = tree(folder)
    (out,) = inpaint_file(pixels, folder / f"{name}.png", folder / "mask.png", folder / "out.png", **QUICK)
    with Image.open(out) as picture:
        found, text = np.array(picture), picture.text
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found[~MISSING], values[~MISSING])
    assert (found[MISSING] != values[MISSING]).any()
    if name == "sixteen":
        assert (found[MISSING] % 257 == 0).all()  # 256 gray values over the whole range
    assert text["Title"] == "Partly synthetic image"
    assert "35 of 256 pixels (13.7%) were drawn" in text["Description"]
    record = json.loads(text[provenance.PROVENANCE_CHUNK])
    assert (record["pixels_drawn"], record["steps"], record["seed"], record["command"]) == (35, 2, 0, "inpaint")
    assert record["run"] == pixels.name and len(record["image_sha256"]) == 64
    after = tree(folder)
    assert after.pop("out.png") and after == before


def test_the_command_writes_each_sample(trained_pixels, files, capfd):
    folder = files[0]
    options = ["--mask", folder / "mask.png", "--out", folder / "x.png", "--steps", 2, "--turns", 0, "--samples", 2]
    out, err = said(capfd, "inpaint", trained_pixels, folder / "eight.png", *options)
    names = [folder / "x-sample-1.png", folder / "x-sample-2.png"]
    assert out.splitlines() == [f"partly synthetic image: {name}" for name in names] and not err
    first, second = (np.array(Image.open(name)) for name in names)
    assert (first[MISSING] != second[MISSING]).any()
    np.testing.assert_array_equal(first[~MISSING], second[~MISSING])


def save(path, values):
    Image.fromarray(values).save(path)
    return path


def test_files_that_do_not_fit_are_refused_in_one_line_and_nothing_is_written(trained_pixels, files, capfd):
    folder = files[0]
    save(folder / "small.png", np.zeros((8, 16), np.uint8))
    save(folder / "black.png", np.zeros((16, 16), np.uint8))
    save(folder / "white.png", np.full((16, 16), 255, np.uint8))
    save(folder / "soft.png", np.arange(256, dtype=np.uint8).reshape(16, 16))
    (folder / "text.png").write_text("no image")
    before = tree(folder)

    def no(file, mask, out="out.png", *more, names):
        places = [folder / file, "--mask", folder / mask, "--out", folder / out]
        refused(capfd, "inpaint", trained_pixels, *places, *more, names=names)

    no("eight.png", "small.png", names=["small.png: found 16 x 8 pixels; expected 16 x 16, those of", "eight.png"])
    no("eight.png", "black.png", names=["black.png: marks no pixel"])
    no("eight.png", "white.png", names=["white.png: marks all pixels", "medvdm sample"])
    no("eight.png", "soft.png", names=["soft.png: found 256 gray values from 0 to 255; expected two"])
    no("small.png", "mask.png", names=["small.png: found 16 x 8 pixels; expected 16 x 16, the run's size"])
    no("text.png", "mask.png", names=["text.png: found text"])
    no("none.png", "mask.png", names=["none.png: no such file"])
    no("eight.png", "none.png", names=["none.png: no such file"])
    no("eight.png", "mask.png", "out.jpg", names=["out.jpg: suffix '.jpg'; expected .png"])
    no("eight.png", "mask.png", "eight.png", names=["out: ", "eight.png is the image itself"])
    no("eight.png", "mask.png", "mask.png", names=["mask.png is the mask itself"])
    no("eight.png", "mask.png", "no/out.png", names=["is not there"])
    no("eight.png", "mask.png", "out.png", "--samples", 0, names=["samples: 0; expected at least 1"])
    no("eight.png", "mask.png", "out.png", "--seed", -1, names=["seed: -1"])
    assert tree(folder) == before


def test_a_run_in_a_latent_space_is_refused(trained, files, capfd):
    folder = files[0]
    places = [folder / "eight.png", "--mask", folder / "mask.png", "--out", folder / "out.png"]
    refused(capfd, "inpaint", trained.path, *places, names=["runs in a latent space", "expected a diffusion on pixels"])


@pytest.mark.parametrize(
    ("shape", "mask", "says"),
    [
        ((1, 8, 16), MISSING, "images: shape"),
        ((1, 16, 16), MISSING[:8], "mask: shape"),
        ((2, 16, 16), np.stack([MISSING] * 3), "mask: shape"),
        ((1, 16, 16), MISSING.astype(np.uint8), "mask: dtype uint8; expected bool"),
        ((1, 16, 16), ~MISSING & MISSING, "mask: marks no pixel"),
        ((1, 16, 16), MISSING | ~MISSING, "mask: marks all pixels"),
        ((2, 16, 16), np.stack([MISSING, MISSING | ~MISSING]), "mask of image 1: marks all pixels"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(pixels, shape, mask, says):
    with pytest.raises(InputError, match=f"^{says}"):
        medvdm.inpaint(pixels, np.zeros(shape, np.uint8), mask)


def test_an_observation_that_does_not_fit_is_refused(pixels):
    for y, noise, says in [
        (np.zeros((1, 16, 16, 1), np.uint8), 0.0, r"y: shape \(1, 16, 16, 1\); expected \(n, 8, 8, 1\)"),
        (np.zeros((1, 8, 8, 1), np.int32), 0.0, "y: int32 values"),
        (np.full((1, 8, 8, 1), np.nan), 0.0, "y: float64 values"),
        (np.zeros((1, 8, 8, 1), np.uint8), -1.0, "noise: -1.0; expected 0 or more"),
    ]:
        with pytest.raises(InputError, match=f"^{says}"):
            medvdm.restore(pixels, y, CellMean(2), noise)
    with pytest.raises(InputError, match="^setting: 'resample' is unknown"):
        medvdm.restore(pixels, np.zeros((1, 8, 8, 1), np.uint8), CellMean(2), resample=3)
    known = Mask(jnp.ones((1, 16, 16, 1)))
    y = np.random.default_rng(3).integers(0, 256, (1, 16, 16, 1), np.uint8)
    np.testing.assert_array_equal(medvdm.restore(pixels, y, known, **QUICK)[:, 0], y)
