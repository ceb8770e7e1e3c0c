"""What people read: every number of a result in its place, what is good said, nothing wider than a terminal."""

from __future__ import annotations

from typing import Any

import pytest

from medvdm.cli.tables import AUDIT_ROWS, audit_table, evaluation_table, privacy_table

EVALUATION: dict[str, Any] = {
    **{"run": "first", "step": 300, "weights": "raw", "labels": "true", "data": "phantom", "split": "test"},
    "likelihood": "bernoulli",
    **{"num_images": 123, "num_patients": 61, "draws": 8, "reconstruction_bpd": 0.86123, "diffusion_bpd": 0.004211},
    **{"latent_bpd": 0.000057, "vlb_bpd": 0.8655, "vlb_bpd_stderr": 0.0021, "floor_bpd": 0.8523, "excess_bpd": 0.0132},
    **{"rate_bits_per_image": 44.04, "psnr_db": 21.987, "ssim": 0.7654, "lingauss_bpd": 0.8711, "pca64_bpd": 0.8601},
    **{"mean_image_bpd": 0.9012, "over_lingauss_bpd": -0.0056, "over_lingauss_bpd_stderr": 0.0007},
}
SET = {
    **{"ms_ssim": 0.551, "ms_ssim_stderr": 0.021, "gray_distance": 0.01291},
    **{"power_low": 1.01, "power_middle": 0.18, "power_high": 0.264},
    **{"c2st_coarse": 0.58, "c2st_pca": 0.987, "c2st_spectrum": 1.0},
    **{"c2st_coarse_stderr": 0.03, "c2st_pca_stderr": 0.004, "c2st_spectrum_stderr": 0.0},
    **{"nearest_pixel": 0.1179, "nearest_pixel_least": 0.0743, "nearest_pca": 0.1098},
}
AUDIT: dict[str, Any] = {
    **{"run": "first", "step": 300, "weights": "ema", "split": "test", "steps_sampled": 250, "num_images": 70},
    **{"label": [], "guidance": 0.0, "samples": SET, "decoded": SET, "linear_gaussian": SET, "real": SET},
}


def row(table: str, title: str) -> str:
    (found,) = [line.strip() for line in table.splitlines() if line.strip().startswith(title)]
    return " ".join(found.removeprefix(title).split())


def test_evaluation() -> None:
    table = evaluation_table(EVALUATION)
    assert row(table, "total: the bound") == "0.8655 bits/dim +- 0.0021"
    assert row(table, "diffusion") == "0.004211 bits/dim" and row(table, "latent (prior)") == "0.000057 bits/dim"
    assert row(table, "rate") == "44.0 bits/image" and row(table, "PSNR of the reconstruction") == "21.99 dB"
    assert row(table, "linear-Gaussian VDM") == "0.8711 bits/dim excess 0.0188"
    assert row(table, "bound minus that") == "-0.0056 bits/dim +- 0.0007; below 0: better"
    assert row(table, "phantom, split 'test':") == "123 images of 61 patients, 8 draws of noise"
    assert "Good is low in bits, high in dB and SSIM." in table and "+-: standard error, by patient." in table
    assert max(map(len, table.splitlines())) <= 86


def test_what_was_not_fitted_has_no_unit() -> None:
    lacking = dict.fromkeys(("lingauss_bpd", "pca64_bpd", "over_lingauss_bpd", "over_lingauss_bpd_stderr"))
    table = evaluation_table({**EVALUATION, **lacking})
    assert row(table, "linear-Gaussian VDM") == row(table, "PCA-64 (no rate charged)") == "not fitted (too few images)"
    assert "bound minus that" not in table


EIGHT_BIT: dict[str, Any] = {
    **{"run": "first", "step": 300, "weights": "ema", "labels": "none", "data": "nih", "split": "test"},
    **{"likelihood": "8-bit", "num_images": 123, "num_patients": 61, "draws": 8, "notes": ["few bits " * 20]},
    **{"reconstruction_bpd": 0.04, "diffusion_bpd": 2.61, "latent_bpd": 0.001, "vlb_bpd": 2.651},
    **{"vlb_bpd_stderr": 0.021, "gaussian_bpd": 3.91, "over_gaussian_bpd": -1.259, "over_gaussian_bpd_stderr": 0.011},
    **dict.fromkeys(f"{n}{k}" for n in ("png", "webp", "jpegls", "jxl") for k in ("_bpd", "_sheet_bpd")),
    **dict.fromkeys(("floor_bpd", "excess_bpd", "psnr_db", "ssim", "over_jxl_bpd", "over_jxl_bpd_stderr")),
    **dict.fromkeys(("mean_image_bpd", "pca64_bpd", "lingauss_bpd", "over_lingauss_bpd", "over_lingauss_bpd_stderr")),
}


def test_evaluation_of_gray_values() -> None:
    """What makes no sense for them is not there, nor is what was not asked for."""
    table = evaluation_table(EIGHT_BIT)
    assert row(table, "total: the bound") == "2.6510 bits/dim +- 0.0210"
    assert row(table, "diffusion") == "2.610000 bits/dim"
    assert row(table, "Gaussian of the images") == "3.9100 bits/dim"
    assert row(table, "bound minus that") == "-1.2590 bits/dim +- 0.0110; below 0: better"
    for foreign in ("floor", "excess", "rate", "PSNR", "SSIM", "PCA", "mean image", "not fitted", "PNG", "codecs"):
        assert foreign not in table, foreign
    assert "True bits per dimension" in table and "what a lossless code by this model would take" in table
    assert "  note: few bits few bits" in table and max(map(len, table.splitlines())) <= 87
    without = evaluation_table({**EIGHT_BIT, "gaussian_bpd": None, "over_gaussian_bpd": None})
    assert "Gaussian" not in without and "without a network" not in without


def test_evaluation_of_gray_values_beside_codecs() -> None:
    asked = {"png_bpd": 3.29, "webp_bpd": 2.8, "jpegls_bpd": 2.7, "jxl_bpd": 2.57}
    asked |= {f"{name}_stderr": 0.01 for name in asked} | {"over_jxl_bpd": 0.081, "over_jxl_bpd_stderr": None}
    table = evaluation_table(EIGHT_BIT | asked)
    assert row(table, "PNG") == "3.2900 bits/dim +- 0.0100" and row(table, "JPEG-LS") == "2.7000 bits/dim +- 0.0100"
    lines = table.splitlines()
    after = lines[next(i for i, line in enumerate(lines) if "JPEG XL" in line) + 1]
    assert "bound minus that" in after and "0.0810 bits/dim  +- unknown (one patient); below 0: better" in after
    assert "all images in one file" not in table
    table = evaluation_table(EIGHT_BIT | asked | {"jxl_sheet_bpd": 4.93})
    assert "  JPEG XL                          4.9300 bits/dim" in table.split("all images in one file:")[1]


def test_the_error_of_one_patient_is_unknown() -> None:
    table = evaluation_table({**EVALUATION, "vlb_bpd_stderr": None, "labels": "null"})
    assert row(table, "total: the bound") == "0.8655 bits/dim +- unknown (one patient)" and "no labels (null)" in table


@pytest.mark.parametrize("missing", [(), ("linear_gaussian",), ("linear_gaussian", "real")])
def test_audit(missing: tuple[str, ...]) -> None:
    """A column for every set that there is, each number with its error, and how to read it."""
    result = {name: value for name, value in AUDIT.items() if name not in missing}
    result["samples"] = dict(SET)
    result["samples"]["c2st_pca"], result["samples"]["power_high"] = 0.75, 0.5
    table = audit_table(result)
    titles = {"samples": "samples", "decoded": "decoded", "linear_gaussian": "lin.-Gauss.", "real": "real"}
    heads = [title for name, title in titles.items() if name not in missing]
    assert table.splitlines()[2].split() == heads
    others = len(heads) - 1
    assert row(table, "AUC, 64 PCA scores").split() == ["0.75+-0.00", *["0.99+-0.00"] * others]
    assert row(table, "power, fine scales").split() == ["0.50", *["0.26"] * others]
    assert row(table, "MS-SSIM of pairs (likeness)").split() == ["0.55+-0.02"] * len(heads)
    assert row(table, "distance of gray histograms").split() == ["0.0129"] * len(heads)
    assert all(any(line.strip().startswith(title.strip()) for line in table.splitlines()) for title, *_ in AUDIT_ROWS)
    for words in ("power 1", "AUC 0.5", "as in the column real", "copies of training images", "70 images"):
        assert words in table
    assert ("real: the other held-out split, what chance does" in table) == ("real" not in missing)
    assert ("no column real: the other split is too small" in table) == ("real" in missing)
    assert max(map(len, table.splitlines())) <= 86


@pytest.mark.parametrize(("num", "few"), [(9, True), (10, False)])
def test_an_audit_of_few_images_says_so(num: int, few: bool) -> None:
    assert ("Fewer than 10 images in a set" in audit_table({**AUDIT, "num_images": num})) == few


def test_audit_of_labels_says_which() -> None:
    table = audit_table({**AUDIT, "label": ["Mass", "a, b"], "guidance": 1.5})
    assert "T = 250, label 'Mass and a, b', guidance 1.5" in table


ATTACK: dict[str, Any] = {"auc": 0.71, "auc_interval": [0.65, 0.77], "tpr_at_1pct_fpr": 0.123}
PRIVACY: dict[str, Any] = {
    **{"num_samples": 200, "num_train": 1000, "num_held_out": 150, "num_copies": 12},
    **{"false_alarm_rate": 0.02, "false_alarm_interval": [0.004, 0.057], "visits": 0.031},
    "copies": [
        {"sample": f"s{i}", "training_image": f"t{i}.png", "score": 3.5 - i / 10, "threshold": 1.25} for i in range(12)
    ],
    "controls": {
        "kernel density": {"found": 0.4, "must": "be found", "behaved": False},
        "held-out images": {"found": 0.0, "must": "be clean", "behaved": True},
    },
    "membership": {"member_vs_held_out": {"all_levels": ATTACK}, "other_day_vs_held_out": None},
    "canaries": {
        **{"exposure_chance": 1.43, "exposure_most": 6.66},
        "by_copies": [{"copies": 1, "exposure": 1.5, "auc": 0.52}, {"copies": 100, "exposure": 6.2, "auc": 0.98}],
    },
    "published": {"baselines.npz": {"attack": ATTACK}},
    **{"notes": ["few samples " * 12], "verdict": ["a sentence of many words " * 8, "This is no certificate."]},
}


def test_privacy() -> None:
    table = privacy_table(PRIVACY)
    assert row(table, "200 samples against") == "1,000 training images; threshold from 150 held-out ones"
    assert row(table, "copies found") == "6.0 % 12"
    assert row(table, "false alarms, held out") == "2.0 % 95 %: 0.4 to 5.7 %"
    assert row(table, "second visits found") == "3.1 %"
    assert row(table, "s0:") == "t0.png, lead 3.50 above 1.25" and "s10:" not in table and "and 2 more" in table
    assert row(table, "kernel density") == "40.0 % must be found: IS NOT"
    assert row(table, "held-out images") == "0.0 % must be clean"
    found = "0.71 95 %: 0.65 to 0.77"
    assert row(table, "training images, AUC") == f"{found}; at 1 % false alarms: 12.3 %"
    assert row(table, "planted  100 times") == "6.2 AUC 0.98"
    assert row(table, "baselines.npz, AUC") == found
    assert table.splitlines()[-1] == "- This is no certificate."
    assert max(map(len, table.splitlines())) <= 100


def test_privacy_of_folders_has_no_rows_of_a_run() -> None:
    lacking = dict.fromkeys(("membership", "canaries", "published", "visits"))
    table = privacy_table({**PRIVACY, **lacking, "copies": [], "num_copies": 0})
    assert row(table, "copies found") == "0.0 % 0"
    for words in ("AUC", "canaries", "second visits", "membership", "components"):
        assert words not in table
