"""Models that come with the package: packed, read back, refused where damaged, and trained again for a few steps."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import Trained

import medvdm
from medvdm.cli.options import PRETRAINED
from medvdm.errors import InputError, RunError
from medvdm.runs.pretrained import CARD, FOLDER, NAMES, pack, pretrained, unpack
from medvdm.runs.weights import WEIGHTS

ROOT = Path(__file__).parents[2]
MOST = 2_000_000  # bytes that a model may take


def test_a_packed_run_draws_what_the_run_draws(trained: Trained, tmp_path: Path) -> None:
    run = medvdm.load(trained.path, ema=True)
    pack(run, tmp_path / "small", command="medvdm train")
    again = unpack(tmp_path / "small")
    assert (again.config, again.step, again.weights) == (run.config, run.step, "ema")
    assert jax.tree.structure(again.params) == jax.tree.structure(run.params)
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(run.params), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=2.0**-11, atol=2.0**-24)  # what float16 rounds
    found, expected = (medvdm.sample(r, 2, steps=3).images for r in (again, run))
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_weights_that_are_not_those_of_the_record_are_refused(trained: Trained, tmp_path: Path) -> None:
    pack(medvdm.load(trained.path, ema=True), tmp_path / "small", command="medvdm train")
    content = bytearray((tmp_path / "small" / WEIGHTS).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "small" / WEIGHTS).write_bytes(bytes(content))
    with pytest.raises(RunError, match="weights.npz: SHA-256 .* expected"):
        unpack(tmp_path / "small")


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(InputError, match="pretrained: 'fantom'; did you mean 'phantom'"):
        pretrained("fantom")
    assert PRETRAINED == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_comes_with_the_package_is_small_and_has_its_card(name: str) -> None:
    run = pretrained(name)
    assert run.record["data"]["name"] == "phantom"  # no patient data
    assert sum(path.stat().st_size for path in (FOLDER / name).iterdir()) < MOST
    card = (FOLDER / name / CARD).read_text("utf8")
    assert "phantom" in card and "/tmp" not in card and "/work" not in card
    assert run.record["pretrained"]["command"].startswith("medvdm train --preset pixel --data phantom")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_its_command_gives_the_first_losses_of_its_training(name: str) -> None:
    sys.path.insert(0, str(ROOT / "book" / "_tools"))
    import record

    from medvdm.data import load

    run = pretrained(name)
    made = run.record["pretrained"]
    config = record.parse_train(made["command"])
    assert config.training == run.config.training and config.data == run.config.data
    data = load(config.data)
    assert data.fingerprint() == run.record["data"]["fingerprint"]
    _, _, losses = record.train(config, data, len(made["first_vlb_bpd"]))
    np.testing.assert_allclose(losses, made["first_vlb_bpd"], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_its_samples_look_like_its_data(name: str) -> None:
    """Their mean image correlates with that of the data as that of as many real ones does."""
    run = pretrained(name)
    drawn = medvdm.sample(run, 16, steps=25, sampler="dpmpp").images
    from medvdm.data import load

    data = load(run.config.data)
    real = data.read(np.arange(256))
    mean, halves = real.mean(0).ravel(), real[:16].mean(0).ravel()

    def likeness(image: np.ndarray) -> float:
        return float(np.corrcoef(image.ravel(), mean)[0, 1])

    assert likeness(drawn.mean(0)) > 0.97 and likeness(halves) > 0.97
    assert abs(drawn.std() - real.std()) < 0.03
