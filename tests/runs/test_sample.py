"""Samples of a run: what they say of where they come from, and files that are written part by part."""

from __future__ import annotations

import dataclasses
import json
import os
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import Trained

import medvdm
from medvdm.errors import DivergedError, InputError
from medvdm.runs.provenance import write_samples
from medvdm.runs.run import Run
from medvdm.runs.sample import sample_to


@pytest.fixture(scope="module")
def loaded(trained: Trained) -> Run:
    return medvdm.load(trained.path)


def test_a_chain_from_a_given_latent_is_no_pure_sample(loaded: Run, tmp_path: Path) -> None:
    """Its file says so, to programs and to people, with which latent: the start of a patient's image is one."""
    z = np.random.default_rng(0).standard_normal((2, loaded.config.model.latent)).astype(np.float32)
    starts = {
        "pure": {},
        "given": {"z": z},
        "half": {"z": z, "first": 2},
        "other": {"z": z + 1e-6, "first": 2},
        "late": {"first": 3},
    }
    said = {}
    for name, start in starts.items():
        drawn = medvdm.sample(loaded, 2, steps=4, **start)
        drawn.save(tmp_path / f"{name}.npz")
        said[name] = json.loads(str(np.load(tmp_path / f"{name}.npz")["provenance"]))["start"]
        assert said[name] == drawn.provenance["start"]
    assert said["pure"] == "N(0, I)" and said["late"] == "N(0, I) at step 3 of 4"
    assert said["given"].startswith("started from a given latent at step 4 of 4 (sha256 ")
    assert said["half"].startswith("started from a given latent at step 2 of 4 (sha256 ")
    assert len(set(said.values())) == 5, "another latent has another hash"
    from PIL import Image

    medvdm.sample(loaded, 2, steps=4, z=z, first=2).save(tmp_path / "half.png")
    assert said["half"] in Image.open(tmp_path / "half.png").text["Source"]


def test_a_file_written_batch_by_batch_is_the_one_of_the_whole(loaded: Run, tmp_path: Path) -> None:
    settings = {"steps": 3, "label": ("Pneumonia", "No Finding"), "guidance": 0.5, "seed": 7}
    sample_to(tmp_path / "parts.npz", loaded, 7, batch_size=3, **settings)
    medvdm.sample(loaded, 7, **settings).save(tmp_path / "whole.npz")
    with np.load(tmp_path / "parts.npz") as parts, np.load(tmp_path / "whole.npz") as whole:
        assert list(parts) == list(whole)
        for name in set(parts) - {"images"}:
            np.testing.assert_array_equal(parts[name], whole[name])
        np.testing.assert_allclose(parts["images"], whole["images"], atol=1e-5)
        assert parts["images"].shape == (7, 16, 16, 1) and parts["images"].dtype == np.float32
    sample_to(tmp_path / "grid.png", loaded, 4, steps=2)
    assert sorted(os.listdir(tmp_path)) == ["grid.png", "parts.npz", "whole.npz"]


def test_the_memory_of_a_file_of_samples_is_that_of_a_batch(tmp_path: Path) -> None:
    """64 parts of 1 MiB."""
    one = np.full((4, 256, 256, 1), 0.25, np.float32)
    tracemalloc.start()
    findings = np.zeros((256, 2), np.uint8)
    parts = (one * (i / 64) for i in range(64))
    write_samples(tmp_path / "s.npz", images=parts, findings=findings, class_names=["a", "b"], provenance={})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * one.nbytes
    with np.load(tmp_path / "s.npz") as file:
        np.testing.assert_array_equal(file["images"][:, 0, 0, 0], 0.25 * np.arange(64).repeat(4) / 64)


def test_the_memory_of_samples_is_that_of_what_is_returned_and_a_batch() -> None:
    """The batches of a large set, as the sampler hands them out, are put in their place one by one."""
    from medvdm.models.generate import Generated, collected

    images = np.ones((1, 4, 256, 256, 1), np.float32)
    tracemalloc.start()
    parts = (Generated((i * images)[-1], np.ones((1, 4, 3), np.float32), i * images, np.zeros(1)) for i in range(64))
    whole = collected(parts, 256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(whole.images[:, 5, 5, 0], np.arange(64).repeat(4))
    assert np.shares_memory(whole.images, whole.states)
    assert peak < whole.states.nbytes + 6 * images.nbytes


def test_a_run_that_fails_half_way_leaves_no_file(loaded: Run, tmp_path: Path) -> None:
    broken = jax.tree.map(lambda p: p * np.nan, loaded.params)
    with pytest.raises(DivergedError):
        sample_to(tmp_path / "s.npz", dataclasses.replace(loaded, params=broken), 4, steps=2)
    for parts, words in (([np.zeros((2, 8, 8, 1))], "2 in all parts; expected 3"), ([], "no part")):
        with pytest.raises(InputError, match=words):
            write_samples(
                tmp_path / "s.npz",
                images=iter(parts),
                findings=np.zeros((3, 1), np.uint8),
                class_names=["a"],
                provenance={},
            )
    assert os.listdir(tmp_path) == []


def test_counts_that_cannot_be_are_refused_in_either_form(loaded: Run, tmp_path: Path) -> None:
    for wrong, words in (
        ({"num": 0}, "num: 0"),
        ({"num": 4, "batch_size": 0}, "batch_size: 0"),
        ({"num": -1}, "num: -1"),
    ):
        with pytest.raises(InputError, match=words):
            medvdm.sample(loaded, **wrong)
        with pytest.raises(InputError, match=words):
            sample_to(tmp_path / "s.npz", loaded, **wrong)
    assert os.listdir(tmp_path) == []


def test_samples_of_a_diffusion_on_pixels_are_gray_values_and_their_states_pictures(
    trained_pixels: Path, tmp_path: Path
) -> None:
    """With a label and guidance; in batches as in one; and from a latent that is given."""
    run = medvdm.load(trained_pixels)
    settings = {"steps": 4, "label": "Pneumonia", "seed": 3}
    plain = medvdm.sample(run, 5, num_states=3, **settings)
    guided = medvdm.sample(run, 5, guidance=2.0, **settings)
    assert plain.images.shape == (5, 16, 16, 1) and plain.states.shape == (3, 5, 16, 16, 1)
    for drawn in (plain, guided):
        np.testing.assert_allclose(255 * drawn.images, np.rint(255 * drawn.images), atol=1e-4)
        assert 0 <= drawn.images.min() and drawn.images.max() <= 1
    np.testing.assert_array_equal(plain.states[-1], plain.images)
    assert np.abs(guided.images - plain.images).max() > 0
    sample_to(tmp_path / "s.npz", run, 5, batch_size=2, guidance=2.0, **settings)
    with np.load(tmp_path / "s.npz") as file:
        # Another batch size rounds otherwise, and a gray value on the edge of two may fall to the other one.
        np.testing.assert_allclose(file["images"], guided.images, atol=1.01 / 255)
    z = np.random.default_rng(0).standard_normal((2, 16, 16, 1)).astype(np.float32)
    again = [medvdm.sample(run, 2, steps=4, z=z, seed=seed).images for seed in (1, 1)]
    np.testing.assert_array_equal(*again)
    with pytest.raises(InputError, match=r"^z: shape \(2, 64\); expected \(2, 16, 16, 1\)"):
        medvdm.sample(run, 2, steps=4, z=z.reshape(2, -1)[:, :64])
