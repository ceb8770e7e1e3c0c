"""The model card: what a reader needs, from the run's own record and from nothing else."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import said

from medvdm.errors import MissingFileError
from medvdm.runs import config, model_card
from medvdm.runs.presets import preset
from medvdm.runs.provenance import SYNTHETIC

EVALUATION = {
    "data": "phantom",
    "own_data": True,
    "split": "test",
    "weights": "ema",
    "labels": "true",
    "step": 2000,
    "num_images": 1234,
    "num_patients": 617,
    "reconstruction_bpd": 0.61234,
    "diffusion_bpd": 0.00421,
    "latent_bpd": 0.0000574,
    "vlb_bpd": 0.61661,
    "vlb_bpd_stderr": 0.00212,
    "floor_bpd": 0.58931,
    "excess_bpd": 0.0273,
    "rate_bits_per_image": 17.44,
    "psnr_db": 21.987,
    "ssim": 0.7654,
    "pca64_bpd": 0.59,
    "mean_image_bpd": 0.7312,
    "lingauss_bpd": None,
}
SET = {
    **{"num_images": 70, "ms_ssim": 0.551, "ms_ssim_stderr": 0.021, "gray_distance": 0.01291},
    **{"power_low": 1.0, "power_middle": 0.18, "power_high": 0.264},
    **{"c2st_coarse": 0.58, "c2st_pca": 0.987, "c2st_spectrum": 1.0},
    **{"c2st_coarse_stderr": 0.03, "c2st_pca_stderr": 0.004, "c2st_spectrum_stderr": 0.0},
    **{"nearest_pixel": 0.1179, "nearest_pixel_least": 0.0743, "nearest_pca": 0.1098},
}
AUDIT = {
    **{"run": "first", "step": 2000, "weights": "ema", "split": "test", "seed": 3, "steps_sampled": 250},
    **{"label": [], "guidance": 0.0, "num_images": 70, "samples": SET, "decoded": SET},
    "real": {**SET, "c2st_pca": 0.46, "ms_ssim": 0.44},
}
DATA = {
    "phantom": {
        "name": "phantom",
        "origin": "procedural chest radiographs drawn by medvdm (seed 0); no real patient",
        "split_rule": "sha256 of the patient, mod 10: 0 and 1 test, 2 validation, the rest training",
        "counts": {
            "train": {"images": 4321, "patients": 2161},
            "val": {"images": 250, "patients": 125},
            "test": {"images": 1234, "patients": 617},
        },
        "class_names": ["No Finding", "Pneumonia"],
        "image_shape": [64, 64, 1],
        "fingerprint": "0123456789abcdef",
        "notes": ["drawn, not measured"],
        "reading": {
            "seen": 5805,
            "read": 5805,
            "skipped": {},
            "stored_range": [0.0, 1.0],
            "guessed": [],
        },
    },
    "nih": {
        "name": "nih",
        "origin": "NIH ChestX-ray14 (Wang et al., CVPR 2017; provider: NIH Clinical Center), labels of Data_Entry.csv",
        "split_rule": "sha256 of the patient",
        "counts": {"train": {"images": 538, "patients": 364}},
        "class_names": ["Effusion"],
        "image_shape": [256, 256, 1],
        "fingerprint": "f",
        "notes": ["111,320 of the 112,120 images in the label file are not there"],
        "reading": {
            "seen": 1000,
            "read": 538,
            "skipped": {"no row in the label file": 450, "not an image": 12, "unreadable": 0},
            "stored_range": [0.0, 0.0625],
            "guessed": ["the patient, from the file's name"],
        },
    },
    "pathmnist": {
        "name": "pathmnist",
        "origin": "PathMNIST of MedMNIST (Yang et al., Scientific Data 2023; CC BY 4.0), file pathmnist.npz",
        "split_rule": "official",
        "counts": {"train": {"images": 10, "patients": 10}},
        "class_names": ["adipose", "mucus"],
        "image_shape": [28, 28, 3],
        "fingerprint": "f",
        "notes": ["the file names no patients"],
    },
    "folder": {
        "name": "folder",
        "origin": "12 image files given by the user, folder 'knees'",
        "split_rule": "sha256 of the patient",
        "counts": {"train": {"images": 12, "patients": 6}},
        "class_names": ["left", "right"],
        "image_shape": [32, 32, 1],
        "fingerprint": "f",
        "notes": [],
    },
}


def record_of(data: str = "phantom") -> dict[str, Any]:
    settings = preset("demo", data=data, **({"data_dir": "/home/someone/images"} if data != "phantom" else {}))
    return copy.deepcopy(
        {
            "version": "0.1.0",
            "config": config.to_json(settings),
            "data": DATA[data],
            "environment": {"python": "3.11.7", "jax": "0.10.2", "flax": "0.12.8", "devices": "2 x cpu"},
            "training": {"steps_done": 2000, "seconds": 250.0, "last": {"vlb_bpd": 0.62, "latent_bpd": 6e-5}},
            "evaluations": [{**EVALUATION, "data": data}],
            "audits": [AUDIT],
            "notes": ["the warm-up of 250 steps is longer than the run"],
        }
    )


def row(card: str, title: str) -> list[str]:
    """The cells of the one table row with this title."""
    (found,) = [line for line in card.splitlines() if line.startswith(f"| {title} |")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def section(card: str, title: str) -> str:
    return card.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_card_has_all_sections_once_and_in_order() -> None:
    card = model_card.model_card(record_of())
    assert card.startswith("# Model card: medvdm on phantom\n")
    assert re.findall(r"^## (.*)$", card, re.M) == [
        "In short",
        "Results",
        "Audit of its samples",
        "What it kept of its training images",
        "Intended use",
        "Limits",
        "Data",
        "Training",
        "Marks on its samples",
        "How to cite",
        "All settings",
    ]
    assert "Not for clinical use" in card.split("##")[0] and "Not for clinical use" in section(card, "Intended use")
    assert SYNTHETIC in section(card, "Marks on its samples")
    cite = section(card, "How to cite")
    assert "10.3390/jimaging9090171" in cite and "2107.00630" in cite
    assert card.endswith("\n") and not card.endswith("\n\n")


def test_card_gives_the_data_as_recorded() -> None:
    card = model_card.model_card(record_of())
    text = section(card, "Data")
    for exact in (
        DATA["phantom"]["origin"],
        DATA["phantom"]["split_rule"],
        "0123456789abcdef",
        "64 x 64 pixels (gray)",
        "No Finding, Pneumonia",
        "Note: drawn, not measured",
    ):
        assert exact in text
    assert row(card, "train") == ["train", "4,321", "2,161"]
    assert row(card, "val") == ["val", "250", "125"]
    assert row(card, "test") == ["test", "1,234", "617"]


def test_card_gives_the_results_with_units() -> None:
    card = model_card.model_card(record_of())
    assert row(card, "negative bound (total)") == ["negative bound (total)", "bits/dim", "0.6166"]
    assert row(card, "its standard error")[1:] == ["bits/dim", "0.0021"]
    assert row(card, "reconstruction")[1:] == ["bits/dim", "0.6123"]
    assert row(card, "diffusion")[1:] == ["bits/dim", "0.0042"]
    assert row(card, "latent (prior)")[1:] == ["bits/dim", "5.74e-05"]
    assert row(card, "floor of these images")[1:] == ["bits/dim", "0.5893"]
    assert row(card, "**excess over the floor**")[1:] == ["bits/dim", "0.0273"]
    assert row(card, "**rate**")[1:] == ["bits/image", "17.4"]
    assert row(card, "PSNR of the reconstruction")[1:] == ["dB", "21.99"]
    assert row(card, "SSIM of the reconstruction")[1:] == ["", "0.765"]
    assert row(card, "baseline: mean image")[1:] == ["bits/dim", "0.7312"]
    assert row(card, "baseline: PCA-64, no rate charged")[1:] == ["bits/dim", "0.5900"]
    assert row(card, "baseline: linear-Gaussian VDM, total")[1:] == ["bits/dim", "–"]
    assert row(card, "images")[2] == "1,234" and row(card, "patients")[2] == "617"
    text = section(card, "Results")
    assert "| test, averaged weights, labels given, step 2,000 |" in text
    for words in ("floor", "not comparable", "one cluster", "bits for a whole image"):
        assert words in " ".join(text.replace("**", "").split())


def test_every_evaluation_has_a_column_of_its_own() -> None:
    record = record_of()
    record["evaluations"].append({**EVALUATION, "split": "val", "weights": "raw", "labels": "null", "vlb_bpd": 0.7})
    record["evaluations"].append({"split": "test", "data": "nih", "own_data": False, "vlb_bpd": 0.9})
    card = model_card.model_card(record)
    assert row(card, "negative bound (total)")[2:] == ["0.6166", "0.7000", "0.9000"]
    assert row(card, "**rate**")[2:] == ["17.4", "17.4", "–"]
    assert "| val, raw weights, labels withheld, step 2,000 | test, of other data: nih |" in card


def test_the_notes_of_other_data_stand_below_their_results() -> None:
    record = record_of()
    other = {**EVALUATION, "data": "nih", "own_data": False, "notes": ["brought to 64x64", "12 files skipped"]}
    record["evaluations"] += [other, {**other, "split": "val"}]
    text = section(model_card.model_card(record), "Results")
    assert text.count("- Of nih: brought to 64x64\n- Of nih: 12 files skipped\n") == 1
    record["evaluations"] = record["evaluations"][:1]
    assert "Of " not in section(model_card.model_card(record), "Results").split("###")[0]


@pytest.mark.parametrize("evaluations", [[], None, "absent"])
def test_card_of_a_run_without_evaluation_says_so(evaluations) -> None:
    record = record_of()
    if evaluations == "absent":
        del record["evaluations"]
    else:
        record["evaluations"] = evaluations
    card = model_card.model_card(record)
    assert "not been evaluated" in section(card, "Results") and "not been evaluated" in section(card, "Limits")
    assert "|" not in section(card, "Results") and "bits" not in section(card, "Results")
    assert "not been evaluated" not in model_card.model_card(record_of())


def test_card_warns_where_no_evaluation_is_held_out() -> None:
    record = record_of()
    record["evaluations"][0]["split"] = "train"
    assert "held-out" in section(model_card.model_card(record), "Limits")
    assert "held-out" not in section(model_card.model_card(record_of()), "Limits")


#: Words that belong to one source of data: a card on other data must not contain them.
WORDS = {
    "phantom": ("phantom", "procedur", "radiograph", "Pneumonia"),
    "nih": ("nih", "ChestX-ray", "Wang et al", "text-mined", "Effusion", "Data_Entry"),
    "pathmnist": ("mnist", "Yang et al", "adipose", "patients are unknown"),
    "folder": ("knees", "as the user gave them", "given by the user"),
}


@pytest.mark.parametrize("data", DATA)
def test_card_speaks_of_its_own_data_and_of_no_other(data) -> None:
    card = model_card.model_card(record_of(data)).casefold()
    for word in WORDS[data]:
        assert word.casefold() in card, word
    for other, words in WORDS.items():
        for word in words:
            assert other == data or word.casefold() not in card, (other, word)
    if data != "nih":
        assert "chest" not in card.replace(DATA[data]["origin"].casefold(), "")
    for number in ("112,120", "1,341", "5,856"):  # sizes of well-known sets, unless the record has them
        assert number not in card or any(number in note for note in DATA[data]["notes"])


def test_card_of_text_mined_chestmnist() -> None:
    record = record_of("pathmnist")
    record["data"] |= {"name": "chestmnist", "origin": "ChestMNIST of MedMNIST, file chestmnist.npz"}
    limits = section(model_card.model_card(record), "Limits")
    assert "text-mined" in limits and "patients are unknown" in limits


def test_card_shows_all_settings_but_not_where_the_folder_lies() -> None:
    record = record_of("folder")
    card = model_card.model_card(record)
    shown = json.loads(re.search(r"```json\n(.*?)\n```", card, re.S).group(1))
    assert shown["data"]["data_dir"] == "images" and "/home/someone" not in card
    shown["data"]["data_dir"] = record["config"]["data"]["data_dir"]
    assert shown == record["config"]
    assert record == record_of("folder")  # the record itself is not changed
    for text in ("3.11.7", "0.12.8", "2 x cpu", "4 min", "latent (prior) 6.00e-05", "total 0.6200"):
        assert text in section(card, "Training")


def first_screen(card: str) -> str:
    return " ".join(section(card, "In short").replace("**", "").split())


def test_the_first_screen_is_in_plain_words() -> None:
    """What it is, from whom, how good, what its samples are like: each number from the record, by hand here."""
    card = model_card.model_card(record_of())
    assert card.index("## In short") < 300
    text = first_screen(card)
    for words in (
        "draws synthetic images of 64 x 64 pixels (gray), conditional on the class (No Finding, Pneumonia).",
        "Trained on: 4,321 images of 2,161 patients of phantom.",
        "measured on 1,234 test images of 617 patients that were not trained on, it is 0.0273 bits per pixel above",
        "smaller is better",
        "the mean image 0.1419.",  # 0.7312 - 0.58931
        "a simple classifier tells 70 of them from as many real images with AUC 0.99 (0.5: not at all; 1: always)",
        "their fine detail has 26 % of the power of real images'",
    ):
        assert words in text, words
    for jargon in ("bits/dim", "json", "bpd", "ELBO", "latent"):
        assert jargon not in text


def test_the_first_screen_speaks_of_new_images_of_the_own_data_only() -> None:
    record = record_of()
    other = {**EVALUATION, "own_data": False, "data": "nih", "excess_bpd": 0.5}
    trained = {**EVALUATION, "split": "train", "excess_bpd": 0.001}
    record["evaluations"] = [other, trained]
    text = first_screen(model_card.model_card(record))
    assert "How good it is on new images: not measured." in text and "bits per pixel" not in text
    record["evaluations"] += [{**EVALUATION, "split": "val"}, {**EVALUATION, "step": 1000, "excess_bpd": 0.04}]
    assert "1,234 test images" in first_screen(model_card.model_card(record))
    record["evaluations"] += [{**EVALUATION, "excess_bpd": 0.03}, {**EVALUATION, "labels": "null", "excess_bpd": 0.02}]
    assert "it is 0.0300 bits" in first_screen(model_card.model_card(record)), "newest step, labels given"
    record["evaluations"].append({**EVALUATION, "excess_bpd": 0.029, "draws": 8})
    record["evaluations"].append({**EVALUATION, "excess_bpd": 0.031, "draws": 2})
    assert "it is 0.0290 bits" in first_screen(model_card.model_card(record)), "most draws"


def test_a_model_that_knows_less_than_the_mean_image_is_said_to() -> None:
    record = record_of()
    assert "knows less" not in first_screen(model_card.model_card(record))
    record["evaluations"][0] |= {"excess_bpd": 0.15, "lingauss_bpd": 0.60931}
    text = first_screen(model_card.model_card(record))
    assert "a linear model without a network 0.0200, the mean image 0.1419. The model knows less than" in text


def test_card_shows_each_audit_with_how_to_read_it() -> None:
    record = record_of()
    card = model_card.model_card(record)
    text = section(card, "Audit of its samples")
    assert "70 images of each set" in text and "averaged weights, step 2,000" in text and "seed 3." in text
    assert "| samples | decoded | real | good |" in text  # no column where no linear model was fitted
    assert row(card, "likeness of pairs (MS-SSIM)")[1:4] == ["0.55 ± 0.02", "0.55 ± 0.02", "0.44 ± 0.02"]
    assert row(card, "classifier (AUC), 64 components") == [
        *("classifier (AUC), 64 components", "0.99 ± 0.00", "0.99 ± 0.00", "0.46 ± 0.00", "0.5")
    ]
    assert row(card, "fine detail")[-1] == "1; lower: blurred"
    assert row(card, "distance of gray values")[1] == "0.0129"
    record["audits"] = [AUDIT, {**AUDIT, "label": ["Pneumonia", "a|b"], "samples": {**SET, "c2st_pca": 0.7}}]
    card = model_card.model_card(record)
    assert card.count("| samples | decoded | real | good |") == 2 and "drawn for Pneumonia and a\\|b." in card
    assert "AUC 0.70" in first_screen(card), "the last audit"
    assert "say little" not in first_screen(card)
    record["audits"] = [{**AUDIT, "num_images": 5}]
    assert "tells 5 of them" in first_screen(model_card.model_card(record))
    assert "so few images say little" in first_screen(model_card.model_card(record))
    record["audits"] = []
    card = model_card.model_card(record)
    assert "## Audit" not in card and "What its samples are like: not measured" in first_screen(card)


def test_card_says_what_was_read_skipped_and_guessed() -> None:
    text = section(model_card.model_card(record_of("nih")), "Data")
    assert "Looked at 1,000, read 538, skipped 462 (no row in the label file: 450; not an image: 12)" in text
    assert "Stored values from 0.00 to 0.06 of what the files can hold" in text
    assert "Guessed: the patient, from the file's name" in text and "unreadable" not in text
    assert "read 5,805, skipped none" in section(model_card.model_card(record_of()), "Data")


def test_card_says_how_many_gray_levels_a_model_of_them_saw() -> None:
    record = record_of("nih")
    assert "Gray levels" not in model_card.model_card(record)
    use = {"images": 1000, "distinct": 255, "distinct_per_image": 154.0, "rounded": 0.0}
    record["data"] = {**record["data"], "level_use": use}
    text = section(model_card.model_card(record), "Data")
    assert "- Gray levels: 255 of 256 occur in 1,000 training images, 154 in the median image" in text


EIGHT_BIT = {
    **{name: EVALUATION[name] for name in EVALUATION if not name.endswith("_bpd")},
    **dict.fromkeys(("floor_bpd", "excess_bpd", "psnr_db", "ssim", "pca64_bpd", "mean_image_bpd", "lingauss_bpd")),
    **{"likelihood": "8-bit", "reconstruction_bpd": 0.04, "diffusion_bpd": 2.61, "latent_bpd": 0.001},
    **{"vlb_bpd": 2.651, "vlb_bpd_stderr": 0.021, "gaussian_bpd": 3.91, "png_bpd": None, "jxl_bpd": None},
}


def test_card_of_a_model_of_gray_values() -> None:
    record = record_of()
    record["evaluations"] = [EIGHT_BIT]
    use = {"images": 1000, "distinct": 255, "distinct_per_image": 154.0, "rounded": 0.0}
    record["data"] = {**record["data"], "level_use": use}
    card = model_card.model_card(record)
    text = first_screen(card)
    assert "1,234 test images of 617 patients that were not trained on, it describes an image exactly" in text
    assert "with 2.65 bits per pixel and channel (± 0.02), smaller is better; stored as they are, they take 8." in text
    assert "on the same images: a Gaussian without a network 3.91." in text
    assert row(card, "**negative bound (total)**") == ["**negative bound (total)**", "bits/dim", "2.6510"]
    assert "| PNG" not in card and "comparable with the bits/dim of other 8-bit models" in card
    for foreign in ("floor", "Bernoulli", "PSNR", "PCA-64", "mean image", "independent given the latent"):
        assert foreign not in card, foreign
    record["evaluations"] = [EIGHT_BIT, {**EIGHT_BIT, "draws": 16, "png_bpd": 3.29, "jxl_bpd": 2.57}]
    card = model_card.model_card(record)
    assert row(card, "PNG, a file per image")[2:] == ["–", "3.2900"]
    assert "PNG files 3.29, JPEG XL files 2.57." in first_screen(card)


def test_card_has_the_notes_of_the_training() -> None:
    text = section(model_card.model_card(record_of()), "Training")
    assert "- Note: the warm-up of 250 steps is longer than the run" in text


def test_a_broken_result_file_does_not_cost_the_card(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said(capfd, "evaluate", run, "--split", "val", "--draws", "2", "--json")
    (name,) = (p.name for p in (run / "results").glob("*.json"))
    (run / "results" / "._x.json").write_bytes(b"\x00\x05\x16\x07 of another system")
    (run / "results" / "cut.json").write_text('{"vlb_bpd": 0.')
    (run / "results" / "list.json").write_text("[1, 2]")
    (run / "results" / "folder.json").mkdir()
    (run / "audits").mkdir()
    (run / "audits" / "bytes.json").write_bytes(b"\xff\xfe")
    (run / "audits" / "none.json").write_text("{}")
    model_card.renew_card(run)
    card = (run / "MODEL_CARD.md").read_text(encoding="utf-8")
    left_out = "results/cut.json, results/folder.json, results/list.json, audits/bytes.json, audits/none.json"
    assert f"Left out, as they could not be read: {left_out}." in card
    assert "| val, raw weights, labels given, step 12 |" in card and "._x" not in card
    assert (run / "results" / name).exists()


def test_a_name_that_is_no_utf_8_is_shown_as_its_code(tmp_path: Path) -> None:
    record = record_of("folder")
    record["data"]["origin"] = "folder 'kn\udcffes'"
    record["config"]["data"]["data_dir"] = "there/kn\udcffes"
    model_card.write_card(tmp_path / "card.md", record)
    assert "folder 'kn\\\\udcffes'" in (tmp_path / "card.md").read_text(encoding="utf-8")


def test_card_says_whether_training_is_finished() -> None:
    record = record_of()
    assert "Training steps: 2,000\n" in model_card.model_card(record)
    record["training"]["steps_done"] = 700
    assert "Training steps: 700 of 2,000: **not finished**" in model_card.model_card(record)


def test_card_says_what_the_model_is_conditional_on() -> None:
    record = record_of()
    assert "conditional on the class (No Finding, Pneumonia)" in model_card.model_card(record)
    record["config"]["conditional"] = False
    assert "unconditional" in model_card.model_card(record)


def every_key(record: Any, path: tuple = ()) -> list[tuple]:
    """The path of every key of a nested record."""
    if isinstance(record, dict):
        return [p for k, v in record.items() for p in ((*path, k), *every_key(v, (*path, k)))]
    if isinstance(record, list):
        return [p for i, v in enumerate(record) for p in every_key(v, (*path, i))]
    return []


def test_card_needs_no_key_of_the_record() -> None:
    full = record_of()
    for path in every_key(full):
        for absent in (True, False):
            record = copy.deepcopy(full)
            part = record
            for step in path[:-1]:
                part = part[step]
            if absent:
                del part[path[-1]]
            else:
                part[path[-1]] = None
            card = model_card.model_card(record)
            assert "Not for clinical use" in card and "None" not in card.split("```")[0] + card.split("```")[-1], path


def test_card_of_an_empty_record() -> None:
    card = model_card.model_card({})
    assert "data are not recorded" in card and "settings are not recorded" in card and "not been evaluated" in card


def test_text_of_the_record_cannot_break_the_card() -> None:
    record = record_of()
    record["data"]["name"] = "a|b"
    record["data"]["counts"] = {"tr|ain": {"images": 1, "patients": 1}}
    record["data"]["notes"] = [
        "one\n\n## Results\n\nexcellent",
        "<script>alert(1)</script>",
        "*x* `y` [z](http://z) _a_ b_c",
    ]
    card = model_card.model_card(record)
    assert len(re.findall(r"^## Results$", card, re.M)) == 1
    assert "| tr\\|ain | 1 | 1 |" in card
    assert "\\<script>" in card and "\\*x\\* \\`y\\` \\[z](http://z) \\_a\\_ b_c" in card


def test_numbers_that_are_not_finite_are_dashes() -> None:
    record = record_of()
    record["evaluations"][0] |= {"vlb_bpd_stderr": float("nan"), "psnr_db": float("inf"), "ssim": None}
    card = model_card.model_card(record)
    for title in ("its standard error", "PSNR of the reconstruction", "SSIM of the reconstruction"):
        assert row(card, title)[2] == "–"


def test_write_card(tmp_path) -> None:
    path = tmp_path / "MODEL_CARD.md"
    model_card.write_card(path, record_of())
    assert path.read_text(encoding="utf-8") == model_card.model_card(record_of())
    with pytest.raises(MissingFileError, match="nowhere"):
        model_card.write_card(tmp_path / "nowhere" / "card.md", {})
    assert list(tmp_path.iterdir()) == [path]
