"""What an audit says in words: every finding has its sentence, none certifies anything, and the alarms are counted."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from medvdm.evaluation.privacy import verdict
from medvdm.evaluation.privacy.membership import HEADLINE

FORBIDDEN = re.compile(r"safe|private|no risk|guarantee|anonym", re.IGNORECASE)


def attacked(low: float, tpr: float | None = 0.25) -> dict[str, Any]:
    """A question of membership as the headline attack answers it."""
    one = {"auc": low + 0.05, "auc_interval": [low, low + 0.1], "tpr_at_1pct_fpr": tpr}
    return {HEADLINE[1]: one}


def canaries(*rows: tuple[int, float, float | None]) -> dict[str, Any]:
    """Of (copies, exposure, its standard error)."""
    by_copies = [{"copies": n, "exposure": mean, "exposure_stderr": error, "auc": 0.6} for n, mean, error in rows]
    return {"exposure_chance": 1.4, "exposure_most": 6.7, "by_copies": by_copies}


QUIET: dict[str, Any] = {
    "num_samples": 1000,
    "num_train": 2000,
    "num_copies": 0,
    "copies": [],
    "visits": 0.04,
    "controls": {"training images, noise": {"behaved": True}, "held-out images": {"behaved": True}},
    "membership": {"member_vs_held_out": attacked(0.45), "other_day_vs_held_out": attacked(0.48)},
    "canaries": canaries((1, 1.5, 0.2), (8, 1.6, 0.2)),
    "published": {"baselines.npz": {"attack": attacked(0.47)[HEADLINE[1]]}},
}


def result(**changes: Any) -> dict[str, Any]:
    """An audit that found nothing, with changes."""
    return {**copy.deepcopy(QUIET), **changes}


COPIED = {"num_copies": 12, "copies": [{"sample": "sample 3", "training_image": "p17_2.png"}]}
BOTH = {"member_vs_held_out": attacked(0.7), "other_day_vs_held_out": attacked(0.6, None)}
RESULTS = {
    "nothing found": result(),
    "copies": result(**COPIED),
    "visits unknown": result(visits=None),
    "membership": result(membership=BOTH),
    "no weights": result(membership=None, canaries=None, published=None),
    "few patients": result(membership={"member_vs_held_out": None, "other_day_vs_held_out": None}),
    "no canaries": result(canaries=None),
    "exposed": result(canaries=canaries((1, 1.5, 0.2), (8, 6.0, 0.3))),
    "one canary each": result(canaries=canaries((1, 6.7, None))),
    "published": result(published=dict.fromkeys(("baselines.npz", "weights"), {"attack": attacked(0.8)[HEADLINE[1]]})),
    "not published": result(published=None),
    "controls": result(controls={"kernel density": {"behaved": False}, "held-out images": {"behaved": True}}),
}


@pytest.mark.parametrize("name", RESULTS)
def test_no_verdict_certifies(name: str) -> None:
    lines = verdict.words(RESULTS[name])
    assert lines[-1] == verdict.NO_CERTIFICATE and lines.count(verdict.NO_CERTIFICATE) == 1
    for line in lines:
        assert not FORBIDDEN.search(line), line
        assert len(line.splitlines()) == 1 and line.endswith(".")


@pytest.mark.parametrize(
    ("name", "alarms"),
    [
        ("nothing found", []),
        ("copies", ["copies"]),
        ("visits unknown", []),
        ("membership", ["membership", "person"]),
        ("no weights", []),
        ("few patients", []),
        ("no canaries", []),
        ("exposed", ["canaries"]),
        ("one canary each", []),  # its error is not known
        ("published", ["published"]),
        ("not published", []),
        ("controls", ["controls"]),
    ],
)
def test_alarms(name: str, alarms: list[str]) -> None:
    assert verdict.alarms(RESULTS[name]) == alarms


def test_alarms_are_given_in_order_and_independently() -> None:
    everything = result(
        **COPIED,
        membership={"member_vs_held_out": attacked(0.5), "other_day_vs_held_out": attacked(0.51)},
        canaries=canaries((1, 1.81, 0.2)),
        controls={"kernel density": {"behaved": False}},
    )
    assert verdict.alarms(everything) == ["copies", "person", "canaries", "controls"]
    assert verdict.alarms({**everything, "canaries": canaries((1, 1.79, 0.2))}) == ["copies", "person", "controls"]


def line(lines: list[str], part: str) -> str:
    """The one line that holds a part."""
    (found,) = [one for one in lines if part in one]
    return found


def test_copies_are_counted_and_no_training_image_is_named() -> None:
    lines = verdict.words(RESULTS["copies"])
    assert line(lines, "copies, or nearly").startswith("12 of 1,000 samples are nearer")
    assert not any("p17_2" in one for one in lines)  # a card may leave the house
    nothing = line(verdict.words(RESULTS["nothing found"]), "None of")
    assert nothing == "None of 1,000 samples was found to be a copy of one of 2,000 training images."


def test_how_often_another_day_is_seen() -> None:
    assert "finds 4 % of true second X-rays" in line(verdict.words(RESULTS["copies"]), "another day may well pass")
    assert line(verdict.words(RESULTS["visits unknown"]), "No patient has two training images")


def test_membership_in_words() -> None:
    lines = verdict.words(RESULTS["membership"])
    told = line(lines, "has the weights can tell training images")
    assert "AUC 0.75, 95 % interval 0.70 to 0.80" in told and "where 1 % of others are accused, 25 % are found" in told
    person = line(lines, "can tell images of training patients from another day")
    assert "accused" not in person, "the rate is not known"
    quiet = verdict.words(RESULTS["nothing found"])
    assert "AUC 0.50, 95 % interval 0.45 to 0.55" in line(quiet, "has the weights was not seen to tell training images")
    assert line(quiet, "was not seen to tell images of training patients from another day")


def test_what_was_not_looked_at_is_said() -> None:
    lines = verdict.words(RESULTS["no weights"])
    assert lines[-2] == "Membership was not attacked: that needs the weights."
    few = verdict.words(RESULTS["few patients"])
    assert line(few, "Too few patients") and line(few, "Too few images of training patients were withheld")
    assert not any("canary" in one for one in verdict.words(RESULTS["no canaries"]))


def test_canaries_in_words() -> None:
    found = line(verdict.words(RESULTS["exposed"]), "canary")
    assert "1.5 bits where planted once (AUC 0.60); 6.0 bits where planted 8 times" in found
    assert "by chance 1.4 bits" in found and "at most 6.7" in found


def test_an_audit_whose_controls_failed_says_so_first() -> None:
    first = verdict.words(RESULTS["controls"])[0]
    assert first == "Do not rely on this audit: its controls did not behave (kernel density)."


def test_what_the_files_give_away_in_words() -> None:
    lines = verdict.words(RESULTS["published"])
    assert "can tell training images" in line(lines, "Whoever has baselines.npz")
    assert "AUC 0.85, 95 % interval 0.80 to 0.90" in line(lines, "Whoever has the components in the weights can")
    assert "was not seen" in line(verdict.words(RESULTS["nothing found"]), "Whoever has baselines.npz")
    assert not any("baselines" in one for one in verdict.words(RESULTS["not published"]))
