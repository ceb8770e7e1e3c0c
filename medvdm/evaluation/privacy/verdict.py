"""What the numbers of a privacy audit say in words, and what they do not. Nothing here certifies anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Ends every verdict.
NO_CERTIFICATE = (
    "This is no certificate. A test that finds nothing has found nothing: a stronger attack, more samples, or somebody "
    "who knows more of a patient may find what these do not."
)


def alarms(result: Mapping[str, Any]) -> list[str]:
    """The parts of an audit that found something, by name.

    ``copies``: a sample was called a copy. ``membership``, ``person``: the lower end of the 95 % interval of the AUC of
    the headline attack is above one half. ``canaries``: exposure more than two standard errors above chance for some
    number of copies. ``controls``: a control did not behave, so the audit itself is in doubt.
    """
    found = []
    if result["num_copies"]:
        found.append("copies")
    member = result.get("membership") or {}
    for name, one in (("membership", member), ("person", member.get("person") or {})):
        if one.get("auc_interval") and one["auc_interval"][0] > 0.5:
            found.append(name)
    canaries = result.get("canaries") or {}
    if any(
        row["exposure"] - 2 * (row["exposure_stderr"] or 0) > canaries["chance"] for row in canaries.get("rows", ())
    ):
        found.append("canaries")
    if not all(one["behaved"] for one in result["controls"].values()):
        found.append("controls")
    return found


def words(result: Mapping[str, Any]) -> list[str]:
    """The verdict, a line for each part that was looked at; the last is :data:`NO_CERTIFICATE`."""
    lines = [*_controls(result), *_copies(result), *_membership(result), *_canaries(result)]
    return [*lines, NO_CERTIFICATE]


def _controls(result: Mapping[str, Any]) -> list[str]:
    wrong = [name for name, one in result["controls"].items() if not one["behaved"]]
    if not wrong:
        return []
    return [f"Do not rely on this audit: its controls did not behave ({', '.join(wrong)})."]


def _copies(result: Mapping[str, Any]) -> list[str]:
    n, k = result["num_samples"], result["num_copies"]
    if k:
        first = result["copies"][0]
        lines = [
            f"{k:,} of {n:,} samples are nearer to one training image than images of other people get: copies, or nearly "
            f"({first['sample']} of {first['training_image']}, for one)."
        ]
    else:
        lines = [f"None of {n:,} samples was found to be a copy of one of {result['num_train']:,} training images."]
    if (visits := result.get("visits")) is not None:
        lines.append(
            f"The same rule finds {_percent(visits)} of true second X-rays of a training patient, so a sample that shows a "
            "patient on another day may well pass it."
        )
    else:
        lines.append(
            "No patient has two images, so it is not known which second images of a patient the rule would find."
        )
    return lines


def _membership(result: Mapping[str, Any]) -> list[str]:
    found = result.get("membership")
    if not found:
        return ["Membership was not attacked: that needs the weights."]
    lines = [_told("training images", found)]
    if found.get("person"):
        lines.append(_told("images of training patients from another day, which were not trained on,", found["person"]))
    return lines


def _told(whom: str, one: Mapping[str, Any]) -> str:
    if one.get("auc_interval") is None:
        return f"Too few patients to say whether {whom} can be told from others."
    low, high = one["auc_interval"]
    numbers = f"AUC {one['auc']:.2f}, 95 % interval {low:.2f} to {high:.2f}"
    if low > 0.5:
        tpr = one.get("tpr_at_1pct_fpr")
        some = "" if tpr is None else f"; where 1 % of others are accused, {_percent(tpr)} are found"
        return f"Whoever has the weights can tell {whom} from images of other people ({numbers}{some})."
    return f"Whoever has the weights was not seen to tell {whom} from images of other people ({numbers})."


def _canaries(result: Mapping[str, Any]) -> list[str]:
    found = result.get("canaries")
    if not found:
        return []
    rows = "; ".join(
        f"planted {row['copies']} times {row['exposure']:.1f} bits, AUC {row['auc']:.2f}" for row in found["rows"]
    )
    return [f"Secrets that were planted are exposed by {rows} (chance: {found['chance']:.1f} bits, AUC 0.50)."]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
