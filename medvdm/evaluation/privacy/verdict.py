"""What the numbers of a privacy audit say in words, and what they do not. Nothing here certifies anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medvdm.evaluation.privacy.membership import HEADLINE

#: Ends every verdict.
NO_CERTIFICATE = (
    "This is no certificate. A test that finds nothing has found nothing: a stronger attack, more samples, or somebody "
    "who knows more of a patient may find what these do not."
)
#: The questions of membership that a verdict answers, and whom each is about.
ASKED = {
    "membership": ("member_vs_held_out", "training images"),
    "person": (
        "other_day_vs_held_out",
        "images of training patients from another day, which were not trained on,",
    ),
}


def headlines(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The headline attack on 'membership' of images, and of a 'person', where there were enough patients."""
    found = result.get("membership") or {}
    return {name: found[question][HEADLINE[1]] for name, (question, _) in ASKED.items() if found.get(question)}


def alarms(result: Mapping[str, Any]) -> list[str]:
    """The parts of an audit that found something, by name.

    ``copies``: a sample was called a copy. ``membership``, ``person``: the 95 % interval of the AUC of the headline
    attack is above one half. ``canaries``: for some number of copies the mean exposure is more than two standard errors
    above chance. ``published``: the interval of the AUC by the components in some file is above one half. ``controls``:
    a control did not behave, so the audit itself is in doubt.
    """
    found = ["copies"] if result["num_copies"] else []
    found += [name for name, one in headlines(result).items() if one["auc_interval"][0] > 0.5]
    canaries = result.get("canaries")
    if canaries and any(
        row["exposure_stderr"] is not None
        and row["exposure"] - 2 * row["exposure_stderr"] > canaries["exposure_chance"]
        for row in canaries["by_copies"]
    ):
        found.append("canaries")
    if any(one["attack"]["auc_interval"][0] > 0.5 for one in (result.get("published") or {}).values()):
        found.append("published")
    if not all(one["behaved"] for one in result["controls"].values()):
        found.append("controls")
    return found


def words(result: Mapping[str, Any]) -> list[str]:
    """The verdict, a line for each part that was looked at; the last is :data:`NO_CERTIFICATE`."""
    return [
        *_controls(result),
        *_copies(result),
        *_membership(result),
        *_canaries(result),
        *_published(result),
        NO_CERTIFICATE,
    ]


def _controls(result: Mapping[str, Any]) -> list[str]:
    wrong = [name for name, one in result["controls"].items() if not one["behaved"]]
    return [f"Do not rely on this audit: its controls did not behave ({'; '.join(wrong)})."] if wrong else []


def _copies(result: Mapping[str, Any]) -> list[str]:
    n, k = result["num_samples"], result["num_copies"]
    if k:
        lines = [  # no names of training images: a card may leave the house
            f"{k:,} of {n:,} samples are nearer to one training image than images of other people get: copies, or "
            "nearly. Look at each beside its training image."
        ]
    else:
        lines = [f"None of {n:,} samples was found to be a copy of one of {result['num_train']:,} training images."]
    visits = result["visits"]
    if visits is None:
        lines.append("No patient has two training images, so it is not known how often the rule sees another day's.")
    else:
        lines.append(
            f"The same rule finds {_percent(visits)} of true second X-rays of a training patient, so a sample that "
            "shows a patient on another day may well pass it."
        )
    return lines


def _membership(result: Mapping[str, Any]) -> list[str]:
    if not result.get("membership"):
        return ["Membership was not attacked: that needs the weights."]
    found = headlines(result)
    lines = [_told("the weights", ASKED[name][1], one) for name, one in found.items()]
    if "membership" not in found:
        lines.append("Too few patients to say whether training images can be told from others.")
    if "person" not in found:
        lines.append(
            "Too few images of training patients were withheld to say whether a person is recognised on another day."
        )
    return lines


def _told(has: str, whom: str, one: Mapping[str, Any]) -> str:
    low, high = one["auc_interval"]
    numbers = f"AUC {one['auc']:.2f}, 95 % interval {low:.2f} to {high:.2f}"
    if low <= 0.5:
        return f"Whoever has {has} was not seen to tell {whom} from images of other people ({numbers})."
    tpr = one["tpr_at_1pct_fpr"]
    some = "" if tpr is None else f"; where 1 % of others are accused, {_percent(tpr)} are found"
    return f"Whoever has {has} can tell {whom} from images of other people ({numbers}{some})."


def _canaries(result: Mapping[str, Any]) -> list[str]:
    found = result.get("canaries")
    if not found:
        return []
    rows = "; ".join(
        f"{row['exposure']:.1f} bits where planted {_times(row['copies'])} (AUC {row['auc']:.2f})"
        for row in found["by_copies"]
    )
    chance, most = found["exposure_chance"], found["exposure_most"]
    return [f"Of a canary's secret are exposed {rows}; by chance {chance:.1f} bits (AUC 0.50), at most {most:.1f}."]


def _published(result: Mapping[str, Any]) -> list[str]:
    places = {"weights": "the components in the weights"}
    return [
        _told(places.get(name, name), "training images", one["attack"])
        for name, one in (result.get("published") or {}).items()
    ]


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
