"""Samples of a run: what they say of where they come from, and files that are written part by part."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import Trained

import medvdm
from medvdm.runs.run import Run


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
