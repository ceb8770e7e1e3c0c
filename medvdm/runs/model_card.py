"""The model card of a run: results first, for a reader who has never seen the library; all settings last.

It is made from the run's own files and from nothing else, so it cannot describe other data or another model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from medvdm.errors import MedvdmError
from medvdm.evaluation.audit import LEAST_IMAGES
from medvdm.runs.provenance import PROVENANCE_CHUNK, SYNTHETIC, text_of
from medvdm.runs.store import AUDITS, CARD, METRICS, PRIVACY, RESULTS, atomic, read_json, read_lines, read_record
from medvdm.training.privacy_accounting import sentence


def renew_card(path: Path) -> None:
    """(Re)write the model card from the run's files.

    A file among the results that cannot be read is left out, and the card says so.
    """
    record, _ = read_record(path)
    write_card(path / CARD, card_record(path, record))


def card_record(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`model_card` takes, from a record and the other files of a run."""
    steps = read_lines(path / METRICS)
    last = steps[-1] if steps else None
    results, left_out = readable(path / RESULTS, "vlb_bpd")
    audits, also_left_out = readable(path / AUDITS, "samples")
    privacy, of_privacy_left_out = readable(path / PRIVACY, "verdict")
    return {
        **record,
        "training": {
            "steps_done": last["step"] if last else 0,
            "seconds": last["seconds"] if last else 0.0,
            "last": {k: v for k, v in last.items() if k.endswith("_bpd")} if last else {},
        },
        "evaluations": results,
        "audits": audits,
        "privacy_audits": privacy,
        "left_out": left_out + also_left_out + of_privacy_left_out,
    }


def readable(folder: Path, key: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The JSON records of a folder that hold ``key``, and the names of the other files. Hidden files are nobody's."""
    records, left_out = [], []
    for file in sorted(folder.glob("*.json")):
        if file.name.startswith("."):
            continue
        try:
            found = read_json(file)
        except MedvdmError:
            found = None
        if isinstance(found, dict) and key in found:
            records.append(found)
        else:
            left_out.append(f"{folder.name}/{file.name}")
    return records, left_out


def write_card(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write :func:`model_card` of ``record`` as UTF-8.

    Raises:
        MissingFileError: the folder of ``path`` is not there.
        OSError: the file cannot be written; nothing of it is left.
    """
    text = model_card(record)
    with atomic(path) as file:
        file.write(text.encode())


def model_card(record: Mapping[str, Any]) -> str:
    """The model card of a run in Markdown, from the run's own record.

    Args:
        record: all keys are optional; what is not there is said not to be recorded.

            * ``version``: of medvdm;
            * ``config``: the settings, as :func:`medvdm.runs.config.to_json` gives them;
            * ``data``: ``name``, ``origin``, ``split_rule``, ``counts`` (by split: ``images``, ``patients``),
              ``class_names``, ``image_shape``, ``fingerprint``, ``reading`` (``seen``, ``read``, ``skipped``,
              ``stored_range``, ``guessed``), ``level_use`` (of a model of gray levels: ``images``, ``distinct``,
              ``distinct_per_image``), ``notes``;
            * ``environment``: versions and devices by name;
            * ``notes``: what a reader should know of the training, one line each;
            * ``privacy``: ``epsilon``, ``delta``, ``unit`` and what they follow from, of a training with ``dp_noise``;
            * ``training``: ``steps_done``, ``seconds``, ``last`` (terms of the last step);
            * ``evaluations``: results of :func:`medvdm.evaluation.held_out.evaluate_weights`, each one column of a
              table;
            * ``audits``: results of :func:`medvdm.runs.audit.audit`, each a table;
            * ``privacy_audits``: results of :func:`medvdm.runs.privacy.audit_privacy`, each said in words;
            * ``left_out``: names of result files that could not be read;
            * ``release``: what :mod:`medvdm.runs.export` has done, for a run that was exported.
    """
    data = _part(record, "data")
    parts = [
        _head(data),
        _short(record, data),
        _results(record, data),
        *_audits(record),
        _kept(record),
        _USE,
        _limits(record, data),
        _data(data),
        _training(record),
        *_privacy(record),
        _MARKS,
        *_release(record),
        _cite(data),
        _settings(record),
    ]
    return "\n\n".join(parts) + "\n"


def _part(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return record.get(name) or {}


def _inline(value: Any) -> str:
    """Text from the record on one line, with what Markdown or HTML would act on escaped."""
    text = " ".join(text_of(value).split())
    return re.sub(r"[\\`*|<\[#]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


_STATEMENT = "The images that this model draws are synthetic; none is a medical image of any person."


def _head(data: Mapping[str, Any]) -> str:
    return f"# Model card: medvdm on {_name(data)}\n\n> **Not for clinical use.** {_STATEMENT}"


def _name(data: Mapping[str, Any]) -> str:
    return _inline(data.get("name")) or "data that is not recorded"


def _short(record: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """The first screen: what the model is, what it was made from and how good it is, in plain words."""
    config, training = _part(record, "config"), _part(record, "training")
    what = "draws synthetic images"
    if shape := data.get("image_shape") or _part(config, "model").get("image_shape"):
        what += f" of {_shape(shape)}"
    if "conditional" in config:
        classes = ", ".join(map(_inline, data.get("class_names") or ())) or "not recorded"
        what += f", conditional on the class ({classes})" if config["conditional"] else ", unconditional"
    lines = [f"**What it does**: {what}."]
    counts = _part(data, "counts")
    seen = f"**{_name(data)}**"
    if own := counts.get("train"):
        seen = f"{_count(own.get('images'))} images of {_count(own.get('patients'))} patients of {seen}"
    lines.append(f"**Trained on**: {seen}.")
    if training.get("steps_done") is not None:
        planned = _part(config, "training").get("steps")
        done = f"{training['steps_done']:,}"
        unfinished = planned is not None and training["steps_done"] < planned
        lines.append(f"Training steps: {done}" + (f" of {planned:,}: **not finished**" if unfinished else ""))
    if best := _headline(record.get("evaluations") or ()):
        lines += _in_words(best)
    else:
        lines.append("**How good it is on new images**: not measured.")
    audits = record.get("audits") or ()
    if audits:
        lines += _samples_in_words(audits[-1])
    else:
        lines.append("**What its samples are like**: not measured (`medvdm audit` does).")
    made = f"Made with medvdm {_inline(record.get('version')) or '(version not recorded)'}"
    if preset := config.get("preset"):
        made += f", preset: {_inline(preset)}"
    return "## In short\n\n" + _bullets([*lines, made + "."])


def _headline(evaluations: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The evaluation to speak of first: of the model's own held-out images, by its newest weights and most draws."""
    own = [e for e in evaluations if e.get("split") in ("test", "val") and e.get("own_data") is not False]
    own = [e for e in own if isinstance(e.get("vlb_bpd" if _eight_bit(e) else "excess_bpd"), int | float)]

    def rank(e: Mapping[str, Any]) -> tuple[Any, ...]:
        return e["split"] == "test", e.get("step") or 0, e.get("labels") != "null", e.get("draws") or 0

    return max(own, key=rank, default=None)


def _in_words(e: Mapping[str, Any]) -> list[str]:
    """An evaluation in two sentences."""
    on = f"{_count(e.get('num_images'))} {e['split']} images of {_count(e.get('num_patients'))} patients"
    if _eight_bit(e):
        return _eight_bit_in_words(e, on)
    lines = [
        f"**How good it is on new images**: measured on {on} that were not trained on, it is"
        f" **{_number(e['excess_bpd'], _bpd)} bits per pixel** above the floor, the least that any model could reach"
        " (smaller is better; 0 is perfect)."
    ]
    floor = e.get("floor_bpd")
    others = [
        f"{name} {_number(e[key] - floor, _bpd)}"
        for name, key in (("a linear model without a network", "lingauss_bpd"), ("the mean image", "mean_image_bpd"))
        if isinstance(floor, int | float) and isinstance(e.get(key), int | float)
    ]
    if others:
        compared = f"**To compare with**, on the same images: {', '.join(others)}."
        if isinstance(e.get("mean_image_bpd"), int | float) and e["excess_bpd"] > e["mean_image_bpd"] - floor:
            compared += " The model knows less than the mean image."
        lines.append(compared)
    return lines


def _eight_bit_in_words(e: Mapping[str, Any], on: str) -> list[str]:
    """The same for a model of 8-bit gray values."""
    error = e.get("vlb_bpd_stderr")
    lines = [
        f"**How good it is on new images**: measured on {on} that were not trained on, it describes an image exactly"
        f" with **{_number(e['vlb_bpd'], _two)} bits per pixel** and channel"
        + ("" if error is None else f" (± {_number(error, _two)})")
        + ", smaller is better; stored as they are, they take 8."
    ]
    names = {"gaussian_bpd": "a Gaussian without a network", "png_bpd": "PNG files", "jxl_bpd": "JPEG XL files"}
    names |= {"jxl_sheet_bpd": "one JPEG XL file of all images"}
    found = [f"{name} {_number(e[key], _two)}" for key, name in names.items() if isinstance(e.get(key), int | float)]
    return lines + ([f"**To compare with**, on the same images: {', '.join(found)}."] if found else [])


def _eight_bit(e: Mapping[str, Any]) -> bool:
    """Whether an evaluation is of a model of 8-bit gray values."""
    return e.get("likelihood") == "8-bit"


def _samples_in_words(a: Mapping[str, Any]) -> list[str]:
    samples = _part(a, "samples")
    auc, fine, size = samples.get("c2st_pca"), samples.get("power_high"), a.get("num_images")
    found = []
    if isinstance(auc, int | float):
        few = "; so few images say little" if isinstance(size, int) and size < LEAST_IMAGES else ""
        found.append(
            f"a simple classifier tells {_count(size)} of them from as many real images with AUC {_number(auc, _two)}"
            f" (0.5: not at all; 1: always{few})"
        )
    if isinstance(fine, int | float):
        found.append(
            f"their fine detail has {_number(100 * fine, lambda v: f'{v:.0f}')} % of the power of real images'"
        )
    return [f"**What its samples are like**: {'; '.join(found)}."] if found else []


_USE = """## Intended use

For teaching and for research on generative models: to study the variational bound, its terms and its sampler.

**Not for clinical use.** The model must not be used for diagnosis, triage, treatment, or any decision about a person.
Its samples are no evidence of a finding and must not be passed on as medical images."""


def _limits(record: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """What limits the use of the model; anything about the data follows from the record of the data."""
    lines = []
    name, origin = text_of(data.get("name")), text_of(data.get("origin"))
    if name == "phantom":
        lines.append(
            "The training images are drawn by a procedure: no patient, no scanner and no disease is behind them."
            " Nothing about real images follows from its results."
        )
    if name == "nih":
        lines.append(
            "The labels of the data were text-mined from radiology reports, not read from the images: some are wrong,"
            " and a sample drawn for a label shows what correlates with the label (such as the view), not the disease."
        )
    if name == "chestmnist":
        lines.append("The labels of the data were text-mined from radiology reports, not read from the images.")
    if "MedMNIST" in origin:
        lines.append(
            "The patients are unknown: each image counts as a patient of its own. If a patient has several images,"
            " they may be on both sides of the split, and the standard error is too small."
        )
    if name == "folder" or "given by the caller" in origin:
        lines.append(
            "The images, labels and patients are as the user gave them; medvdm has not checked what they show,"
            " nor the right to use them."
        )
    if not data:
        lines.append("The training data are not recorded, so nothing can be said about whom the model represents.")
    lines += [
        "A model repeats the biases of its training images: it represents those images and no other population,"
        " device or hospital.",
        "Samples can show shapes that no body has, and can resemble training images; no test here proves that"
        " none was memorised.",
        *(
            []
            if data.get("level_use")  # a diffusion on the pixels themselves
            else ["The pixels are independent given the latent, so images are smooth and small structures are lost."]
        ),
        "No reader study and no clinical validation has been done.",
    ]
    if not record.get("evaluations"):
        lines.insert(0, "The model has not been evaluated: its quality is unknown.")
    elif not any(e.get("split") in ("val", "test") for e in record["evaluations"]):
        lines.insert(0, "No evaluation is on held-out images only: the results above say little about new images.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _data(data: Mapping[str, Any]) -> str:
    if not data:
        return "## Data\n\nThe data are not recorded."
    lines = [f"Source: {_inline(data.get('name')) or 'not recorded'}"]
    for title, key in {"What it is": "origin", "Split": "split_rule", "Fingerprint": "fingerprint"}.items():
        if data.get(key):
            lines.append(f"{title}: {_inline(data[key])}")
    if data.get("image_shape"):
        values = "gray values from 0 to 255" if data.get("level_use") else "values in [0, 1]"
        lines.append(f"Images: {_shape(data['image_shape'])}, {values}")
    if data.get("class_names"):
        lines.append(f"Classes: {', '.join(map(_inline, data['class_names']))}")
    lines += _reading(_part(data, "reading"))
    if use := _part(data, "level_use"):
        lines.append(
            f"Gray levels: {_count(use.get('distinct'))} of 256 occur in {_count(use.get('images'))} training images, "
            f"{_number(use.get('distinct_per_image'), lambda v: f'{v:.0f}')} in the median image"
        )
    lines += [f"Note: {_inline(note)}" for note in data.get("notes") or ()]
    text = "## Data\n\n" + _bullets(lines)
    if counts := data.get("counts"):
        rows = [
            [_inline(split), *(_count((of or {}).get(k)) for k in ("images", "patients"))]
            for split, of in counts.items()
        ]
        text += "\n\n" + _table(["split", "images", "patients"], rows)
    return text


def _reading(reading: Mapping[str, Any]) -> list[str]:
    """What was looked at, read, skipped and guessed."""
    lines = []
    if reading.get("seen") is not None and reading.get("read") is not None:
        skipped = {reason: n for reason, n in _part(reading, "skipped").items() if n}
        why = "; ".join(f"{_inline(reason)}: {_count(n)}" for reason, n in skipped.items())
        lines.append(
            f"Looked at {_count(reading['seen'])}, read {_count(reading['read'])}, "
            + (f"skipped {_count(sum(skipped.values()))} ({why})" if skipped else "skipped none")
        )
    if reading.get("stored_range"):
        low, high = reading["stored_range"]
        lines.append(f"Stored values from {_number(low, _two)} to {_number(high, _two)} of what the files can hold")
    return lines + [f"Guessed: {_inline(guess)}" for guess in reading.get("guessed") or ()]


def _training(record: Mapping[str, Any]) -> str:
    text = "## Training"
    training = _part(record, "training")
    if notes := record.get("notes"):
        text += "\n\n" + _bullets(f"Note: {_inline(note)}" for note in notes)
    rows = [[_inline(key), _inline(value)] for key, value in _part(record, "environment").items()]
    if training.get("seconds") is not None:
        rows.append(["training time", _duration(training["seconds"])])
    if rows:
        text += "\n\n" + _table(["computed with", ""], rows, left=2)
    if last := training.get("last"):
        terms = ", ".join(f"{_inline(_TERM_NAMES.get(k, k))} {_number(v, _bpd)}" for k, v in last.items())
        text += (
            "\n\nTerms of the last training step, one batch, in bits per dimension (not a held-out result): "
            + terms
            + "."
        )
    return text if text != "## Training" else f"{text}\n\nNothing about the training is recorded."


def _privacy(record: Mapping[str, Any]) -> list[str]:
    """A section on what the weights can tell of one patient; none without noise in training."""
    promise = _part(record, "privacy")
    if not promise:
        return []
    return [
        f"""## Differential privacy

Trained with {_inline(sentence(promise))}.

- Whoever has the weights, and knows all training images but those of one patient, can guess whether it was this
  patient or another one only a little better than by chance: no true-positive rate is above e^epsilon times the
  false-positive rate, plus delta.
- Not covered: `metrics.jsonl`, `baselines.npz`, `gaussian.npz`, results and audits on training images, the numbers of
  this card on the training images, and settings that were chosen by looking at other runs on the same images. Weights
  that were kept by their loss on validation images (`best`) may tell of these.
- It holds if the patients' names are right, and for whoever does not know the noise: a file `noise.key`, there until
  training ends, must not be passed on."""
    ]


def _settings(record: Mapping[str, Any]) -> str:
    config = _part(record, "config")
    if not config:
        return "## All settings\n\nThe settings are not recorded."
    shown = json.loads(json.dumps(config))
    folder = (shown.get("data") or {}).get("data_dir")
    if folder:  # a card is made to be passed on; where the images lay on one computer is nobody's business
        shown["data"]["data_dir"] = PureWindowsPath(folder).name
    for name in _part(record, "release").get("withheld") or ():
        part, _, key = name.partition(".")
        shown[part].pop(key, None)
    return f"## All settings\n\nFolders by their last name only.\n\n```json\n{json.dumps(shown, indent=2)}\n```"


_TERM_NAMES = {
    "reconstruction_bpd": "reconstruction",
    "diffusion_bpd": "diffusion",
    "latent_bpd": "latent (prior)",
    "vlb_bpd": "total",
    "loss_bpd": "training loss",
}


def _two(value: float) -> str:
    return f"{value:.2f}"


def _bpd(value: float) -> str:
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}"


Row = tuple[str, str, str, Callable[[float], str]]  #: title, key, unit, how to write a number

_ROWS: tuple[Row, ...] = (
    ("images", "num_images", "", lambda v: f"{v:,}"),
    ("patients", "num_patients", "", lambda v: f"{v:,}"),
    ("draws of noise per image", "draws", "", lambda v: f"{v:,}"),
    ("seed of the draws", "seed", "", lambda v: f"{v}"),
    ("**excess over the floor**", "excess_bpd", "bits/dim", _bpd),
    ("negative bound (total)", "vlb_bpd", "bits/dim", _bpd),
    ("its standard error", "vlb_bpd_stderr", "bits/dim", _bpd),
    ("reconstruction", "reconstruction_bpd", "bits/dim", _bpd),
    ("diffusion", "diffusion_bpd", "bits/dim", _bpd),
    ("latent (prior)", "latent_bpd", "bits/dim", _bpd),
    ("floor of these images", "floor_bpd", "bits/dim", _bpd),
    ("**rate**", "rate_bits_per_image", "bits/image", lambda v: f"{v:,.1f}"),
    ("PSNR of the reconstruction", "psnr_db", "dB", lambda v: f"{v:.2f}"),
    ("SSIM of the reconstruction", "ssim", "", lambda v: f"{v:.3f}"),
    ("baseline: mean image", "mean_image_bpd", "bits/dim", _bpd),
    ("baseline: PCA-64, no rate charged", "pca64_bpd", "bits/dim", _bpd),
    ("baseline: linear-Gaussian VDM, total", "lingauss_bpd", "bits/dim", _bpd),
)
#: The rows of a model of 8-bit gray values; those that were not measured are left out.
_EIGHT_BIT_ROWS: tuple[Row, ...] = (
    *_ROWS[:4],
    ("**negative bound (total)**", "vlb_bpd", "bits/dim", _bpd),
    *(row for row in _ROWS if row[1] in ("vlb_bpd_stderr", "reconstruction_bpd", "diffusion_bpd", "latent_bpd")),
    ("Gaussian of the training images", "gaussian_bpd", "bits/dim", _bpd),
    ("bound minus that", "over_gaussian_bpd", "bits/dim", _bpd),
    ("its standard error", "over_gaussian_bpd_stderr", "bits/dim", _bpd),
    *(
        (f"{title}, {how}", f"{name}{key}", "bits/dim", _bpd)
        for how, key in (("a file per image", "_bpd"), ("all in one file", "_sheet_bpd"))
        for name, title in (("png", "PNG"), ("webp", "WebP"), ("jpegls", "JPEG-LS"), ("jxl", "JPEG XL"))
    ),
    ("bound minus JPEG XL, a file per image", "over_jxl_bpd", "bits/dim", _bpd),
    ("its standard error", "over_jxl_bpd_stderr", "bits/dim", _bpd),
)


def _results(record: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    evaluations = list(record.get("evaluations") or ())
    left_out = ""
    if names := record.get("left_out"):
        left_out = f"\n\nLeft out, as they could not be read: {', '.join(map(_inline, names))}."
    if not evaluations:
        return (
            "## Results\n\nThis model has not been evaluated on held-out images (no evaluation is recorded),"
            " so the card reports no result." + left_out
        )
    head = ["", "unit", *(_column(e, data) for e in evaluations)]
    rows = []
    eight_bit = any(map(_eight_bit, evaluations))
    for title, key, unit, show in _EIGHT_BIT_ROWS if eight_bit else _ROWS:
        if any(e.get(key) is not None if eight_bit else key in e for e in evaluations):
            rows.append([title, unit, *(_number(e.get(key), show) for e in evaluations)])
    own = set(data.get("notes") or ())
    notes = [
        f"Of {_inline(e.get('data'))}: {_inline(note)}"
        for e in evaluations
        if e.get("own_data") is False
        for note in e.get("notes") or ()
        if note not in own
    ]
    about = "".join(f"\n{line}" for line in ["", _bullets(dict.fromkeys(notes))] if notes)
    meaning = _EIGHT_BIT_MEANING if eight_bit else _MEANING
    return f"## Results\n\n{_table(head, rows, left=2)}{about}{left_out}\n\n{meaning}"


def _column(evaluation: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    words = [f"{_inline(evaluation.get('split') or 'split not recorded')}"]
    if (name := evaluation.get("data")) and (name != data.get("name") or evaluation.get("own_data") is False):
        words.append(f"of other data: {_inline(name)}")
    if weights := evaluation.get("weights"):
        words.append({"ema": "averaged weights", "raw": "raw weights"}.get(weights, f"weights: {_inline(weights)}"))
    labels = evaluation.get("labels")
    if labels not in (None, "none"):
        words.append({"true": "labels given", "null": "labels withheld"}.get(labels, f"labels: {_inline(labels)}"))
    if (step := evaluation.get("step")) is not None:
        words.append(f"step {step:,}" if isinstance(step, int) else f"step {_inline(step)}")
    return ", ".join(words)


_MEANING = """### What the numbers mean

- *bits/dim* is bits per pixel and channel; smaller is better, except for PSNR and SSIM.
- The *negative bound* is reconstruction + diffusion + latent. Its standard error is over images, with those of one
  patient counted as one cluster.
- The reconstruction is a Bernoulli cross-entropy with gray targets. It cannot be zero: its *floor* is the mean binary
  entropy of the pixels themselves. Only the *excess over the floor* (negative bound - floor) depends on the model. It
  is the distortion (reconstruction - floor) and the rate; the mean image and PCA-64 are charged no rate.
  The floor differs from one set of images to another: compare the excess, on the same images, never the total.
- The *rate* (diffusion + latent) is what the model pays for its latent, in bits for a whole image. Divided by the
  number of pixels it looks tiny; it is not.
- A Bernoulli 'likelihood' of gray values is not a normalised density. These numbers are **not comparable** with the
  bits/dim of models of 8-bit images.
- The cross-entropy is nearly blind to blur: a small excess is no proof of sharp images. No number of the table measures
  whether samples are anatomically right, or whether they repeat training images.
- A dash means: not computed."""


_EIGHT_BIT_MEANING = """### What the numbers mean

- *bits/dim* is bits per pixel and channel; smaller is better.
- The *negative bound* is reconstruction + diffusion + latent: an upper bound on the mean of -log2 of the probability
  that the model gives to an image of 8-bit gray values. Its standard error is over images, with those of one patient
  counted as one cluster.
- The probabilities of all images sum to one. So the bound is comparable with the bits/dim of other 8-bit models on the
  same images, and with the files of lossless codecs: a lossless code that uses the model can spend that much on
  average. It would be slow, and none is part of medvdm.
- Codecs' files include their headers, which cost small images much; *all in one file* has one for all of them.
- Gray values that were rounded, smoothed, lossily compressed or have gaps take fewer bits for reasons that are not the
  model's: see the notes.
- Few bits are mostly a matter of fine detail and noise. They are no proof that samples are anatomically right or that
  they repeat no training image.
- A dash means: not computed."""


#: Rows of an audit: title, key, what is good.
_AUDIT_ROWS = (
    ("likeness of pairs (MS-SSIM)", "ms_ssim", "as real; higher: too alike"),
    ("coarse detail (power)", "power_low", "1"),
    ("middle detail", "power_middle", "1"),
    ("fine detail", "power_high", "1; lower: blurred"),
    ("distance of gray values", "gray_distance", "as real, or lower"),
    ("classifier (AUC), coarse shape", "c2st_coarse", "0.5; 1: always told apart"),
    ("classifier (AUC), 64 components", "c2st_pca", "0.5"),
    ("classifier (AUC), detail", "c2st_spectrum", "0.5"),
    ("nearest training image, pixels", "nearest_pixel", "as real; far lower: copies"),
    ("the smallest of the set", "nearest_pixel_least", "as real; near 0: a copy"),
    ("nearest training image, components", "nearest_pca", "as real; far lower: copies"),
)
_AUDIT_SETS = {
    "samples": "samples",
    "decoded": "decoded",
    "linear_gaussian": "samples of a linear model",
    "real": "real",
}


def _audits(record: Mapping[str, Any]) -> list[str]:
    """A section with a table for each audit; none without audits."""
    audits = list(record.get("audits") or ())
    if not audits:
        return []
    text = "## Audit of its samples"
    for a in audits:
        sets = {name: title for name, title in _AUDIT_SETS.items() if isinstance(a.get(name), Mapping)}
        rows = [
            [title, *(_with_error(a[name], key) for name in sets), good]
            for title, key, good in _AUDIT_ROWS
            if any(key in a[name] for name in sets)
        ]
        text += f"\n\n{_audit_head(a)}\n\n{_table(['', *sets.values(), 'good'], rows)}"
    return [f"{text}\n\n{_AUDIT_MEANING}"]


def _audit_head(a: Mapping[str, Any]) -> str:
    label = a.get("label")
    of = f", drawn for {' and '.join(map(_inline, label))}" if label else ""
    number = a.get("num_images") or _part(a, "samples").get("num_images")
    weights = {"ema": "averaged weights", "raw": "raw weights"}.get(a.get("weights"), "weights not recorded")
    return (
        f"{_count(number)} images of each set against as many real ones of the split"
        f" '{_inline(a.get('split'))}': {weights}, step {_count(a.get('step'))},"
        f" {_count(a.get('steps_sampled'))} steps of sampling, seed {_inline(a.get('seed'))}{of}."
    )


def _with_error(found: Mapping[str, Any], key: str) -> str:
    digits = 4 if key.startswith(("gray", "nearest")) else 2
    text = _number(found.get(key), lambda v: f"{v:.{digits}f}")
    error = found.get(f"{key}_stderr")
    return text if error is None else f"{text} ± {_number(error, _two)}"


_AUDIT_MEANING = """Compare *samples* with *real*, images of the other held-out split: what chance does.
A column *decoded* is of held-out images through encoder and decoder, the best that samples can be. ± is a standard
error.
Nothing here says whether a sample is anatomically right, and a large distance to the nearest training image is no
proof that nothing was memorised."""


def _kept(record: Mapping[str, Any]) -> str:
    """What privacy audits found, in their own words, or that there was none."""
    audits = list(record.get("privacy_audits") or ())
    if not audits:
        return (
            "## What it kept of its training images\n\nNot audited (`medvdm audit RUN --privacy`): nothing is known of "
            "whether a training image, or a patient, can be found in this model or in its samples."
        )
    text = "## What it kept of its training images"
    for one in audits:
        weights = {"ema": "averaged weights", "raw": "raw weights"}.get(one.get("weights"), "weights not recorded")
        samples = "samples of " if one.get("sampling") else "samples that were given, and the weights of "
        text += (
            f"\n\n{_count(one.get('num_samples'))} {samples}step {_count(one.get('step'))}, {weights}, against"
            f" {_count(one.get('num_train'))} training and {_count(one.get('num_held_out'))} held-out images:\n\n"
            + _bullets(_inline(line) for line in one.get("verdict") or ())
        )
    return text


_MARKS = f"""## Marks on its samples

Every file of samples that medvdm writes says that it is synthetic, and from which run it comes:

- `.npz`: `synthetic` is true; `statement` and `provenance` (JSON: run, version, seed, ...) say the rest;
- `.png`: text chunks (`Comment`, `{PROVENANCE_CHUNK}`) and the IPTC digital source type `trainedAlgorithmicMedia`;
- `.dcm`: Synthetic Data (0008,001C) is YES; image comments, derivation and a private block of `medvdm` say the rest.

`medvdm verify FILE...` reads them. The statement is: "{SYNTHETIC}" Keep the marks when the files are passed on;
converting a file can remove them."""


def _release(record: Mapping[str, Any]) -> list[str]:
    """What an exported run has, and what it has not; nothing for another run."""
    release = _part(record, "release")
    if not release:
        return []
    kind = {"ema": "averaged weights", "raw": "raw weights"}.get(release.get("weights"), "weights")
    left_out = [
        "The optimiser's state and other checkpoints: they tell more about single training images than the weights do.",
        "Baselines and the Gaussian of gray values: a mean image and components of the training images.",
        "The losses by step and the value of each held-out image: they are of single images.",
        "Folders, file names, patient patterns and the fingerprint of the data: nobody needs them to draw samples."
        + (f" So {_count(n)} notes on the data are not here." if (n := release.get("data_notes")) else ""),
        "The seed of training: it tells which image was in which batch, and undoes noise that was added for privacy.",
    ]
    still_in = [
        "The weights. They were computed from the training images, and a model is **not anonymous**: it can repeat"
        " images that it was trained on.",
        *(
            ["Among the weights, the mean image and the principal components of the training images."]
            if release.get("components")
            else []
        ),
        "The name of the data, the numbers of images and patients, the names of classes that samples are drawn for, and"
        " the settings.",
        "The results above, which are means over many images.",
    ]
    notes = [f"Note: {_inline(note)}." for note in release.get("notes") or ()]
    return [
        f"## What was released\n\nExported by medvdm {_inline(release.get('version'))}: {kind} of step"
        f" {_count(release.get('step'))}, `weights.npz` (SHA-256 {_inline(release.get('sha256'))[:16]}...).\n\n"
        f"Left out:\n\n{_bullets(left_out)}\n\nStill in:\n\n{_bullets(still_in)}"
        + (f"\n\n{_bullets(notes)}" if notes else "")
    ]


def _cite(data: Mapping[str, Any]) -> str:
    text = """## How to cite

The software: medvdm, with the version above. The methods:

- Rguibi et al., "Improving Medical Imaging with Medical Variation Diffusion Model: An Analysis and Evaluation",
  J. Imaging 2023, 9(9), 171, <https://doi.org/10.3390/jimaging9090171>.
- Kingma, Salimans, Poole and Ho, "Variational Diffusion Models", 2021, <https://arxiv.org/abs/2107.00630>.

Neither says anything about this model's data or results, which are those above."""
    if data.get("origin"):
        text += f" Name the data, too: {_inline(data['origin'])}."
    return text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table; all columns but the first ``left`` are numbers, aligned to the right."""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def _number(value: Any, show: Callable[[float], str]) -> str:
    """A number as ``show`` writes it; a dash for None and NaN, other values as they are."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return show(value) if isinstance(value, int | float) else _inline(value)


def _count(value: Any) -> str:
    return _number(value, lambda v: f"{v:,}")


def _shape(shape: Sequence[int]) -> str:
    if len(shape) != 3:
        return _inline(shape)
    kind = {1: "gray", 3: "RGB"}.get(shape[2], f"{shape[2]} channels")
    return f"{shape[0]} x {shape[1]} pixels ({kind})"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
