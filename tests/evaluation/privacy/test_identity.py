"""Held-out patients are told apart by an encoder that has never seen them, better than by the pixels."""

import numpy as np
import pytest

from medvdm.data.phantom import render
from medvdm.evaluation.privacy import registration
from medvdm.evaluation.privacy.identity import Encoder, another_visit
from medvdm.evaluation.privacy.spaces import told_apart


@pytest.fixture(scope="module")
def images():
    return registration.small(render(np.arange(400), size=48)[0], 32)


def cosines(rows):
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


def test_encoder_tells_held_out_patients_apart(images):
    patients = np.array([str(i // 2) for i in range(400)])
    train, held_out = images[:280], images[280:]
    pixels = told_apart(registration.coarse(held_out, held_out).similarity, patients[280:])
    person = told_apart(cosines(Encoder.fit(train, patients[:280])(held_out)), patients[280:])
    assert person["auc"] > pixels["auc"] + 4 * np.hypot(person["auc_stderr"], pixels["auc_stderr"])
    alone = told_apart(cosines(Encoder.fit(train[::2], patients[:280:2])(held_out)), patients[280:])
    assert pixels["auc"] < alone["auc"] < person["auc"]  # nobody has two images: changed ones stand in


def test_encoder_does_not_see_exposure(images):
    """Brightness and contrast are no part of a person: a + b x gives the code of x."""
    encoder = Encoder.fit(images[:40], np.array([str(i // 2) for i in range(40)]))
    np.testing.assert_allclose(encoder(0.2 + 0.5 * images[40:50]), encoder(images[40:50]), rtol=1e-3, atol=1e-3)


def test_another_visit_stays_an_image(images):
    found = another_visit(images[:20], np.random.default_rng(0))
    assert found.shape == images[:20].shape and 0 <= found.min() and found.max() <= 1
    assert np.abs(found - images[:20]).mean() > 0.01


def test_told_apart_by_hand():
    """Four images of two patients: pairs of one patient at 0.9 and 0.5, others below, between and above."""
    similarity = np.zeros((4, 4))
    for (i, j), value in {(0, 1): 0.9, (2, 3): 0.5, (0, 2): 0.1, (0, 3): 0.6, (1, 2): 0.2, (1, 3): 0.3}.items():
        similarity[i, j] = value
    found = told_apart(similarity, np.array(["a", "a", "b", "b"]))
    assert found["auc"] == pytest.approx(7 / 8)  # of 8 pairs of pairs, (0.5, 0.6) alone is in the wrong order
    assert found["tpr_at_1pct_fpr"] == 0.5 and found["tpr_at_01pct_fpr"] is None
    assert told_apart(similarity, np.array(["a", "b", "c", "d"])) is None
