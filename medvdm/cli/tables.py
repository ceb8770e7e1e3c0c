"""Results for people: what `evaluate`, `audit` and `benchmark` print without ``--json``."""

from __future__ import annotations

from typing import Any


def benchmark_table(result: dict[str, Any]) -> str:
    """The result for people."""
    shape = "x".join(map(str, result["image_shape"]))
    lines = [
        f"preset {result['preset']}, images {shape}, batch {result['batch_size']}, "
        f"{result['parameters'] / 1e6:.1f} M parameters, on {result['environment']['devices']}",
        f"  training step           {result['step_ms']:9.1f} ms (median of {result['repeats']})",
        f"  plain JAX step          {result['plain_step_ms']:9.1f} ms, the same arithmetic, interleaved",
        f"  ratio                   {result['ratio']:9.3f}    (median of paired ratios)",
        f"  loop / step             {result['loop_over_step']:9.3f}    (input pipeline against a ready batch)",
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


# IMPORTS


def evaluation_table(r: dict[str, Any]) -> str:
    """The result of an evaluation for people."""

    def line(name: str, value: float | None, unit: str, note: str = "", digits: int = 4) -> str:
        shown = "not fitted" if value is None else f"{value:.{digits}f}"
        return f"  {name:<28}{shown:>11} {unit:<10}{note}".rstrip()

    error = "unknown" if r["vlb_bpd_stderr"] is None else f"{r['vlb_bpd_stderr']:.4f}"
    labels = {"true": "true labels", "null": "no labels (null)", "none": "unconditional"}[r["labels"]]
    above = {
        name: None if r[name] is None else f"excess {r[name] - r['floor_bpd']:.4f}"
        for name in ("lingauss_bpd", "pca64_bpd", "mean_image_bpd")
    }
    paired = []
    if r["over_lingauss_bpd"] is not None and r["over_lingauss_bpd_stderr"] is not None:
        note = f"+- {r['over_lingauss_bpd_stderr']:.4f} paired, over patients"
        paired = [line("  bound minus that", r["over_lingauss_bpd"], "bits/dim", note)]
    return "\n".join(
        [
            f"{r['run']} at step {r['step']}, {r['weights']} weights, {labels}",
            f"{r['data']}, split '{r['split']}': {r['num_images']} images of {r['num_patients']} patients",
            line("reconstruction", r["reconstruction_bpd"], "bits/dim"),
            line("diffusion", r["diffusion_bpd"], "bits/dim", digits=6),
            line("latent (prior)", r["latent_bpd"], "bits/dim", digits=6),
            line("total: the bound", r["vlb_bpd"], "bits/dim", f"+- {error} over patients"),
            line("floor of these images", r["floor_bpd"], "bits/dim"),
            line("excess over the floor", r["excess_bpd"], "bits/dim"),
            line("rate", r["rate_bits_per_image"], "bits/image", digits=1),
            line("PSNR of the reconstruction", r["psnr_db"], "dB", digits=2),
            line("SSIM of the reconstruction", r["ssim"], ""),
            "fitted on the run's training images:",
            line("linear-Gaussian VDM", r["lingauss_bpd"], "bits/dim", above["lingauss_bpd"] or ""),
            *paired,
            line("PCA-64 (no rate charged)", r["pca64_bpd"], "bits/dim", above["pca64_bpd"] or ""),
            line("mean image", r["mean_image_bpd"], "bits/dim", above["mean_image_bpd"] or ""),
        ]
    )


def audit_table(r: dict[str, Any]) -> str:
    """The result of an audit for people."""
    heads = {"samples": "samples", "decoded": "decoded", "linear_gaussian": "lin.-Gauss.", "real": "real"}
    columns = {name: head for name, head in heads.items() if name in r}

    def line(name: str, key: str, digits: int = 2) -> str:
        cells = [f"{r[column][key]:.{digits}f}" for column in columns]
        if f"{key}_stderr" in r["samples"]:
            cells = [f"{c} +- {r[column][f'{key}_stderr']:.2f}" for c, column in zip(cells, columns, strict=True)]
        return f"  {name:<34}" + "".join(f"{cell:>14}" for cell in cells)

    of = f", label '{' and '.join(r['label'])}', guidance {r['guidance']:g}" if r["label"] else ""
    return "\n".join(
        [
            f"{r['run']} at step {r['step']}, {r['weights']} weights: samples with T = {r['steps_sampled']}{of}",
            f"each set: {r['num_images']} images; held against as many of the split '{r['split']}'",
            f"  {'':<34}" + "".join(f"{head:>14}" for head in columns.values()),
            line("likeness of pairs (MS-SSIM)", "ms_ssim"),
            line("power, coarse scales (real: 1)", "power_low"),
            line("power, middle scales", "power_middle"),
            line("power, fine scales", "power_high"),
            line("distance of gray histograms", "gray_distance", 4),
            line("classifier's AUC: 8 PCA scores", "c2st_coarse"),
            line("classifier's AUC: 64 PCA scores", "c2st_pca"),
            line("classifier's AUC: power spectrum", "c2st_spectrum"),
            line("nearest training image, pixels", "nearest_pixel", 4),
            line("  the smallest of the set", "nearest_pixel_least", 4),
            line("nearest training image, PCA", "nearest_pca", 4),
            "decoded: the held-out images through encoder and decoder; real: the other held-out split, the yardstick",
        ]
    )
