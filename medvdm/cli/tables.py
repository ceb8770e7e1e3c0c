"""Results for people: what `evaluate`, `audit`, `score`, `verify` and `benchmark` print without ``--json``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def benchmark_table(result: dict[str, Any]) -> str:
    """The result for people."""
    shape = "x".join(map(str, result["image_shape"]))

    def quartiles(name: str, digits: int) -> str:
        low, high = result[f"{name}_quartiles"]
        return f"{low:.{digits}f} to {high:.{digits}f}"

    lines = [
        f"preset {result['preset']}, images {shape}, batch {result['batch_size']}, "
        f"{result['parameters'] / 1e6:.1f} M parameters, on {result['environment']['devices']}",
        f"  {'':<24}{'median':>9}    middle half of the repeats ({result['repeats']} pairs, in turns)",
        f"  training step           {result['step_ms']:9.1f} ms {quartiles('step_ms', 1)}",
        f"  plain JAX step          {result['plain_step_ms']:9.1f} ms {quartiles('plain_step_ms', 1)}; "
        "the same arithmetic",
        f"  step / plain step       {result['ratio']:9.3f}    {quartiles('ratio', 3)}; below 1, the library is faster",
        f"  loop / step             {result['loop_over_step']:9.3f}    {quartiles('loop_over_step', 3)}; "
        "1 where the input pipeline costs nothing",
        f"  peak memory             {result['peak_memory_gib']:9.2f} GiB (both states and their steps)",
    ]
    if "roofline" in result:
        r = result["roofline"]
        lines += [
            f"  roofline                {r['roofline_ms']:9.1f} ms at {r['gigabytes_per_second']:.1f} GB/s and "
            f"{r['gigaflops_per_second']:.0f} GFLOP/s, measured",
            *(
                f"    {p['phase']:<21} {p['milliseconds']:9.1f} ms bound by {p['bound']}: "
                f"{p['gigabytes']:.3g} GB, {p['gigaflops']:.3g} GFLOP"
                for p in r["phases"]
            ),
            f"  XLA's own count         {r['xla_gigabytes']:9.3g} GB, {r['xla_gigaflops']:.3g} GFLOP, "
            f"{r['xla_memory_gib']:.2f} GiB of memory",
            f"  fastest step / roofline {result['over_roofline']:9.2f}",
        ]
    return "\n".join(lines)


def evaluation_table(r: dict[str, Any]) -> str:
    """The result of an evaluation for people."""
    if r["likelihood"] == "8-bit":
        return _eight_bit_table(r)

    def line(name: str, value: float | None, *more: Any, **options: Any) -> str:
        return f"  {name:<28} not fitted (too few images)" if value is None else _line(name, value, *more, **options)

    def baseline(name: str, key: str) -> str:
        return line(name, r[key], note="" if r[key] is None else f"excess {r[key] - r['floor_bpd']:.4f}")

    paired = []
    if r["over_lingauss_bpd"] is not None and r["over_lingauss_bpd_stderr"] is not None:
        note = f"+- {r['over_lingauss_bpd_stderr']:.4f}; below 0: better"
        paired = [line("  bound minus that", r["over_lingauss_bpd"], note=note)]
    return "\n".join(
        [
            *_evaluation_head(r),
            *(f"  note: {note}" for note in r.get("notes", ()) if note.startswith("brought to")),
            *_terms(r),
            line("floor of these images", r["floor_bpd"]),
            line("excess over the floor", r["excess_bpd"]),
            line("rate", r["rate_bits_per_image"], "bits/image", digits=1),
            line("PSNR of the reconstruction", r["psnr_db"], "dB", digits=2),
            line("SSIM of the reconstruction", r["ssim"], ""),
            "without a network, fitted on the run's training images:",
            baseline("linear-Gaussian VDM", "lingauss_bpd"),
            *paired,
            baseline("PCA-64 (no rate charged)", "pca64_bpd"),
            baseline("mean image", "mean_image_bpd"),
            "Good is low in bits, high in dB and SSIM. The floor belongs to the images and no",
            "model gets below it: compare the excess. +-: standard error, by patient.",
        ]
    )


def _eight_bit_table(r: dict[str, Any]) -> str:
    """The result of a model of 8-bit gray values: the bound, and what else describes the same images exactly."""

    def beside(name: str, key: str, over: str | None = None) -> list[str]:
        if r[key] is None:
            return []
        lines = [_line(name, r[key], note=_error(r, key) if f"{key}_stderr" in r else "")]
        if over is not None and r[over] is not None:
            lines.append(_line("  bound minus that", r[over], note=f"{_error(r, over)}; below 0: better"))
        return lines

    codecs = {"png": "PNG", "webp": "WebP", "jpegls": "JPEG-LS", "jxl": "JPEG XL"}
    files = [
        line
        for name, title in codecs.items()
        for line in beside(title, f"{name}_bpd", "over_jxl_bpd" if name == "jxl" else None)
    ]
    sheets = [line for name, title in codecs.items() for line in beside(title, f"{name}_sheet_bpd")]
    gaussian = beside("Gaussian of the images", "gaussian_bpd", "over_gaussian_bpd")
    return "\n".join(
        [
            *_evaluation_head(r),
            *(
                textwrap.fill(f"note: {note}", 86, initial_indent="  ", subsequent_indent="    ")
                for note in r.get("notes", ())
            ),
            *_terms(r),
            *(["without a network, fitted on the run's training images:", *gaussian] if gaussian else []),
            *(["lossless codecs, a file per image:", *files] if files else []),
            *(["lossless codecs, all images in one file:", *sheets] if sheets else []),
            "True bits per dimension of 8-bit gray values: low is good, raw images take 8. The bound",
            "is what a lossless code by this model would take. +-: standard error, by patient.",
        ]
    )


def _evaluation_head(r: dict[str, Any]) -> list[str]:
    labels = {"true": "true labels", "null": "no labels (null)", "none": "unconditional"}[r["labels"]]
    return [
        f"{r['run']} at step {r['step']}, {r['weights']} weights, {labels}",
        f"{r['data']}, split '{r['split']}': {r['num_images']} images of {r['num_patients']} patients, "
        f"{r['draws']} draws of noise",
    ]


def _terms(r: dict[str, Any]) -> list[str]:
    return [
        _line("reconstruction", r["reconstruction_bpd"]),
        _line("diffusion", r["diffusion_bpd"], digits=6),
        _line("latent (prior)", r["latent_bpd"], digits=6),
        _line("total: the bound", r["vlb_bpd"], note=_error(r, "vlb_bpd")),
    ]


def _line(name: str, value: float, unit: str = "bits/dim", note: str = "", digits: int = 4) -> str:
    return f"  {name:<28}{value:>11.{digits}f} {unit:<10}{note}".rstrip()


def _error(r: dict[str, Any], key: str) -> str:
    stderr = r[f"{key}_stderr"]
    return "+- unknown (one patient)" if stderr is None else f"+- {stderr:.4f}"


#: Rows of an audit: title, key, digits.
AUDIT_ROWS = (
    ("MS-SSIM of pairs (likeness)", "ms_ssim", 2),
    ("power, coarse scales", "power_low", 2),
    ("power, middle scales", "power_middle", 2),
    ("power, fine scales", "power_high", 2),
    ("distance of gray histograms", "gray_distance", 4),
    ("AUC, 8 PCA scores", "c2st_coarse", 2),
    ("AUC, 64 PCA scores", "c2st_pca", 2),
    ("AUC, power spectrum", "c2st_spectrum", 2),
    ("nearest training, pixels", "nearest_pixel", 4),
    ("  the smallest of the set", "nearest_pixel_least", 4),
    ("nearest training, PCA", "nearest_pca", 4),
)
_AUDIT_SETS = {
    "decoded": "decoded: held-out images through encoder and decoder, the best samples can be",
    "linear_gaussian": "lin.-Gauss.: samples without a network",
}
AUDIT_COLUMNS = {"samples": "samples", "decoded": "decoded", "linear_gaussian": "lin.-Gauss.", "real": "real"}


def audit_table(r: dict[str, Any]) -> str:
    """The result of an audit for people."""
    from medvdm.evaluation.audit import LEAST_IMAGES  # what starts the command line loads no numpy

    columns = {name: head for name, head in AUDIT_COLUMNS.items() if name in r}

    def cell(column: str, key: str, digits: int) -> str:
        error = r[column].get(f"{key}_stderr")
        return f"{r[column][key]:.{digits}f}" + ("" if error is None else f"+-{error:.2f}")

    rows = [("", *columns.values())]
    rows += [(title, *(cell(column, key, digits) for column in columns)) for title, key, digits in AUDIT_ROWS]
    few = (
        [f"Fewer than {LEAST_IMAGES} images in a set: none of these numbers means much."]
        if r["num_images"] < LEAST_IMAGES
        else []
    )
    real = "real: the other held-out split, what chance does"
    if "real" not in r:
        real = "no column real: the other split is too small"
    of = f", label '{' and '.join(r['label'])}', guidance {r['guidance']:g}" if r["label"] else ""
    return "\n".join(
        [
            f"{r['run']} at step {r['step']}, {r['weights']} weights: samples with T = {r['steps_sampled']}{of}",
            f"each set: {r['num_images']} images; held against as many of the split '{r['split']}'",
            *(f"  {name:<29}{''.join(f'{text:>12}' for text in cells)}" for name, *cells in rows),
            *few,
            "Good is: power 1; AUC 0.5 (a classifier cannot tell the set from real images; at",
            "1 it always can); all else as in the column real. Likeness above it: too alike.",
            "Fine power below 1: blurred. Nearest far below it: copies of training images.",
            textwrap.fill(f"{'; '.join([real, *(text for name, text in _AUDIT_SETS.items() if name in r)])}.", 86),
        ]
    )


def privacy_table(r: dict[str, Any]) -> str:
    """The result of a privacy audit for people: numbers first, then what they say in words."""
    low, high = r["false_alarm_interval"]
    lines = [
        f"{r['num_samples']:,} samples against {r['num_train']:,} training images; "
        f"threshold from {r['num_held_out']:,} held-out ones",
        _share("copies found", r["num_copies"] / r["num_samples"], f"{r['num_copies']:,}"),
        _share("false alarms, held out", r["false_alarm_rate"], f"95 %: {100 * low:.1f} to {100 * high:.1f} %"),
        *([] if r["visits"] is None else [_share("second visits found", r["visits"])]),
        *(
            f"    {one['sample']}: {one['training_image']}, lead {one['score']:.2f} above {one['threshold']:.2f}"
            for one in r["copies"][:10]
        ),
        *([f"    and {len(r['copies']) - 10:,} more (--json lists all)"] if len(r["copies"]) > 10 else []),
        "controls, share called copies",
        *(
            _share(name, one["found"], f"must {one['must']}{'' if one['behaved'] else ': IS NOT'}")
            for name, one in r["controls"].items()
        ),
        *_attacks(r),
        *_exposures(r["canaries"]),
        *_components(r["published"]),
        *(textwrap.fill(f"note: {note}", 86, subsequent_indent="  ") for note in r["notes"]),
        *(textwrap.fill(line, 86, initial_indent="- ", subsequent_indent="  ") for line in r["verdict"]),
    ]
    return "\n".join(lines)


def _share(name: str, share: float, note: str = "") -> str:
    return f"  {name:<28}{100 * share:>7.1f} %   {note}".rstrip()


def _area(name: str, attack: dict[str, Any]) -> str:
    low, high = attack["auc_interval"]
    return f"  {name:<28}{attack['auc']:>7.2f}     95 %: {low:.2f} to {high:.2f}"


def _attacks(r: dict[str, Any]) -> list[str]:
    """Membership by the headline attack: of images, and of persons by images of another day."""
    from medvdm.evaluation.privacy.verdict import headlines

    titles = {"membership": "training images, AUC", "person": "persons by another day, AUC"}
    lines = []
    for name, one in headlines(r).items():
        tpr = one["tpr_at_1pct_fpr"]
        lines.append(_area(titles[name], one) + ("" if tpr is None else f"; at 1 % false alarms: {100 * tpr:.1f} %"))
    return ["membership, for whoever has the weights", *lines] if lines else []


def _exposures(canaries: dict[str, Any] | None) -> list[str]:
    if not canaries:
        return []
    chance, most = canaries["exposure_chance"], canaries["exposure_most"]
    rows = [
        f"  planted {row['copies']:>4} times          {row['exposure']:>7.1f}     AUC {row['auc']:.2f}"
        for row in canaries["by_copies"]
    ]
    return [f"canaries, bits exposed (chance {chance:.1f}, at most {most:.1f})", *rows]


def _components(published: dict[str, Any] | None) -> list[str]:
    """What components that are published with a model tell of training images."""
    lines = [_area(f"{name}, AUC", one["attack"]) for name, one in (published or {}).items()]
    return ["training images by published components", *lines] if lines else []


_SCORED = {"bits": "bits", "over_gaussian": "over Gauss."}


def score_table(r: dict[str, Any]) -> str:
    """The scores of images for people."""
    held_out, medians = r["held_out"], r["held_out"]["medians"]
    n = held_out["images"]
    titles = {name: _SCORED.get(name, name.replace("_", " ")) for name in medians}
    width = max(12, *(len(Path(image["file"]).name) for image in r["images"]))

    def row(first: str, cells: Iterable[str]) -> str:
        return f"  {first:<{width}}" + "".join(f"{cell:>17}" for cell in cells)

    lines = [
        f"{r['run']} at step {r['step']}, {r['weights']} weights, {r['draws']} draws of noise; bits per dimension",
        f"held against {n} validation images of {held_out['patients']} patients. Beside each value: how many of these",
        "have less, and how many are as far from the median.",
        row("", titles.values()),
        row("median", (f"{value:.3f}{'':<8}" for value in medians.values())),
    ]
    for image in r["images"]:
        cells = (f"{one['value']:.3f}{one['fewer']:>4}{one['as_far']:>4}" for one in image["statistics"].values())
        lines.append(row(Path(image["file"]).name, cells))
        found = ", ".join("bits, high" if name == "bits_high" else titles[name] for name in image["unusual"])
        lines.append(f"    +- {image['bits_per_dim_stderr']:.4f}; unusual in: {found or 'nothing'}")
        notes = [*image["notes"], *([] if image["map"] is None else [f"map: {image['map']}"])]
        lines += [textwrap.fill(note, 86, initial_indent="    ", subsequent_indent="      ") for note in notes]
    lines += [f"note: {note}" for note in r["notes"]]
    lines.append(
        textwrap.fill(
            f"Unusual: at most {r['share']:.3g} of images like the validation images are so, for each test by itself. "
            "The test 'bits, high' alone passes what is easy to describe, such as black. It is no diagnosis.",
            86,
        )
    )
    return "\n".join(lines)


_ANSWERS = {
    "yes": "synthetic",
    "partly": "partly synthetic: a model has changed it",
    "not said": "does not say that it is synthetic",
}
_SHOWN = ("run", "version", "data", "data_fingerprint", "step", "weights", "seed", "label")


def marks_table(found: Sequence[dict[str, Any]], caution: str) -> str:
    """The marks of files for people. Files can say anything, so what they say is cut and cleaned."""
    lines = []
    for one in found:
        answer = _ANSWERS[one["synthetic"]] if one["marks"] else "no mark found, which proves nothing"
        lines.append(f"{one['file']}: {answer}")
        known = {name: one["provenance"].get(name) for name in _SHOWN}
        known = {n: " and ".join(map(str, v)) if isinstance(v, list) else v for n, v in known.items()}
        origin = ", ".join(f"{n.replace('_', ' ')} {v}" for n, v in known.items() if v not in (None, ""))
        for title, text in (("says", one["statement"]), ("from", origin), ("marks", "; ".join(one["marks"]))):
            clean = "".join(c if c.isprintable() else " " for c in text)[:400]
            indent = f"  {title:<6} "
            lines += textwrap.wrap(clean, 86, initial_indent=indent, subsequent_indent=" " * len(indent))
    return "\n".join([*lines, *textwrap.wrap(caution, 86)])
