"""A run with withheld images and canaries: trained, loaded, resumed, and marked as none to publish."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny

import medvdm
from medvdm import data as data_
from medvdm.cli.main import main
from medvdm.data import planted
from medvdm.errors import InputError
from medvdm.runs.run import load_data
from medvdm.runs.store import CARD

PLANTED = {"visits": 3, "withhold": 2, "canaries": 4, "canary_copies": "1,2,4"}


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run from the command line."""
    out = tmp_path_factory.mktemp("audited") / "run"
    assert (
        main(["train", "--preset", "demo", "--no-progress", "--out", str(out), *tiny.options(steps=2, **PLANTED)]) == 0
    )
    return out


def test_the_data_of_a_run_come_back_with_its_canaries(audited: Path) -> None:
    run = medvdm.load(audited)
    data = load_data(run)
    assert data.fingerprint() == run.record["data"]["fingerprint"]
    assert int(planted.is_canary(data).sum()) == 1 + 2 + 4 + 1
    assert data.counts() == run.record["data"]["counts"]
    held = planted.withheld(run.config.data)
    assert len(held) == 2 and not set(held.ids) & set(data.ids)


def test_the_card_says_that_the_model_is_none_to_publish(audited: Path) -> None:
    card = (audited / CARD).read_text()
    assert "Note: not a model to publish: 4 canaries in 8 copies planted in the training images" in card
    assert "withheld for a privacy audit: 2" in card
    assert "Looked at 60, read 58" in card


def test_a_run_with_canaries_is_resumed_and_evaluated(audited: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["train", "--preset", "demo", "--no-progress", "--resume", "--out", str(audited)]
    assert main([*options, *tiny.options(steps=3, **PLANTED)]) == 0
    assert medvdm.load(audited).step == 3
    assert main([*options, *tiny.options(steps=3, **{**PLANTED, "canaries": 3})]) == 2
    assert "canaries: 3; expected 4" in capfd.readouterr().err
    assert main(["evaluate", str(audited), "--draws", "2"]) == 0


def test_images_from_python_that_lack_the_canaries_are_refused(tmp_path: Path) -> None:
    images = np.random.default_rng(0).uniform(size=(60, 16, 16)).astype(np.float32)
    data = medvdm.from_arrays(images, np.arange(60) % 2)
    with pytest.raises(InputError, match="canaries: 2, and the images given from Python have 0"):
        medvdm.fit(tiny.config(canaries=2), tmp_path / "run", data=data, progress=False)
    assert not (tmp_path / "run").exists()


def test_data_loaded_by_name_may_be_given_from_python(tmp_path: Path) -> None:
    config = tiny.config(steps=1, canaries=2, withhold=1)
    data = data_.load(config.data)
    run = medvdm.fit(config, tmp_path / "run", data=data, progress=False)
    assert load_data(run).fingerprint() == data.fingerprint()
