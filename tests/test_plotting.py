"""Figures: they show the numbers they are given, on fixed scales, and leave matplotlib's global state alone."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from medvdm import plotting
from medvdm.errors import InputError, InputTypeError
from medvdm.theory import gaussian
from medvdm.theory.schedules import FixedLinear


@pytest.fixture
def images() -> np.ndarray:
    """Five images of 8 x 6 between 0.2 and 0.7: stretching them to their own range would be seen."""
    return np.random.default_rng(0).uniform(0.2, 0.7, (5, 8, 6, 1)).astype(np.float32)


def texts(figure) -> str:
    return "\n".join(t.get_text() for t in figure.texts)


def draw(figure) -> None:
    """Lay the figure out and draw it; a figure's own canvas does neither before it is saved."""
    FigureCanvasAgg(figure).draw()


def pixels(figure, **more) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", **more)
    return np.asarray(Image.open(buffer))


def records(n: int = 200) -> list[dict[str, float]]:
    values = np.random.default_rng(1).uniform(0.9, 1.1, n)
    return [
        {
            "step": i + 1,
            "reconstruction_bpd": 0.6 * v,
            "diffusion_bpd": 10.0 ** (-1 - 2 * i / n) * v,
            "latent_bpd": 5e-5 * v,
            "vlb_bpd": 0.7 * v,
        }
        for i, v in enumerate(values)
    ]


def panel(figure, title: str):
    return next(a for a in figure.axes if a.get_title(loc="left").startswith(title))


# --- Images ------------------------------------------------------------------------------------------------------


def test_grid_shows_every_image_at_its_place_on_a_fixed_scale(images) -> None:
    figure = plotting.image_grid(images, synthetic=False, columns=3)
    (shown,) = figure.axes[0].images
    assert (shown.norm.vmin, shown.norm.vmax) == (0.0, 1.0)
    sheet = shown.get_array()
    gap = (sheet.shape[1] - 3 * 6) // 2
    assert sheet.shape == (2 * 8 + gap, 3 * 6 + 2 * gap)
    for i, image in enumerate(images):
        top, left = (i // 3) * (8 + gap), (i % 3) * (6 + gap)
        np.testing.assert_array_equal(sheet[top : top + 8, left : left + 6], image[..., 0])
    assert sheet.mask[8 + gap :, 2 * (6 + gap) :].all()  # where no image is the figure's ground shows


def test_one_image_without_black_or_white_is_not_stretched(images) -> None:
    (shown,) = plotting.image_grid(images[:1], synthetic=False).axes[0].images
    assert (shown.norm.vmin, shown.norm.vmax) == (0.0, 1.0)


def test_pixels_on_the_page_are_the_gray_levels() -> None:
    image = np.array([[[0.0, 0.25], [0.5, 1.0]]], np.float32)
    page = pixels(plotting.image_grid(image, synthetic=False))[..., :3]
    size = page.shape[0]
    quarters = [page[size // 4 * a, page.shape[1] // 4 * b] for a in (1, 3) for b in (1, 3)]
    for colour, gray in zip(quarters, image.ravel(), strict=True):
        assert np.abs(colour.astype(float) - 255 * gray).max() <= 1.5


@pytest.mark.parametrize("titles", [None, ["a", "b", "c", "d", "e"]])
def test_grid_says_synthetic_if_and_only_if_it_is(images, titles) -> None:
    assert "synthetic" in texts(plotting.image_grid(images, synthetic=True, titles=titles))
    assert "synthetic" not in texts(plotting.image_grid(images, synthetic=False, titles=titles))


def test_who_draws_a_grid_must_say_whether_it_is_synthetic(images) -> None:
    with pytest.raises(TypeError, match="synthetic"):
        plotting.image_grid(images)
    with pytest.raises(TypeError, match="synthetic"):
        plotting.strip(images[None], [0.0])


def test_titles_stand_above_their_images(images) -> None:
    figure = plotting.image_grid(images, synthetic=False, columns=2, titles=["a", "b", "c", "d", "e"], title="All")
    places = {t.get_text(): t.get_position() for t in figure.texts}
    assert set(places) == {"a", "b", "c", "d", "e", "All"}
    assert places["a"][0] < places["b"][0] and places["a"][1] == places["b"][1] > places["c"][1] > places["e"][1]
    assert places["All"][1] > places["a"][1]
    for text, axes in zip("ace", figure.axes, strict=True):  # one picture a row of titled images, under its titles
        assert 0 < places[text][1] - axes.get_position().y1 < 0.05


def test_long_titles_do_not_run_into_each_other(images) -> None:
    names = ["colorectal adenocarcinoma epithelium"] * 10
    figure = plotting.image_grid(np.repeat(images, 2, axis=0), synthetic=False, columns=10, titles=names)
    draw(figure)
    boxes = sorted((t.get_window_extent() for t in figure.texts), key=lambda b: b.x0)
    assert len(boxes) == 10
    assert all(a.x1 <= b.x0 for a, b in zip(boxes, boxes[1:], strict=False))


def test_rgb_and_missing_channel_axis(images) -> None:
    rgb = np.random.default_rng(0).uniform(size=(2, 5, 5, 3)).astype(np.float32)
    sheet = plotting.image_grid(rgb, synthetic=False).axes[0].images[0].get_array().data
    np.testing.assert_array_equal(sheet[:5, :5], rgb[0])
    a = plotting.image_grid(images, synthetic=True)
    b = plotting.image_grid(images[..., 0], synthetic=True)
    np.testing.assert_array_equal(pixels(a), pixels(b))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda x: x.astype(np.int64), InputTypeError, "int64"),
        (lambda x: x * 2, InputError, r"expected \[0, 1\]"),
        (lambda x: np.where(x > 0.5, np.nan, x), InputError, r"expected \[0, 1\]"),
        (lambda x: x[:0], InputError, "none of them 0"),
        (lambda x: x[0, 0], InputError, "shape"),
        (lambda x: np.repeat(x, 2, axis=-1), InputError, "C = 1 or 3"),
    ],
)
def test_grid_refuses(images, change, error, match) -> None:
    with pytest.raises(error, match=match):
        plotting.image_grid(change(images), synthetic=True)


def test_grid_refuses_titles_and_columns_that_do_not_fit(images) -> None:
    with pytest.raises(InputError, match="titles: 2; expected 5"):
        plotting.image_grid(images, synthetic=True, titles=["a", "b"])
    with pytest.raises(InputError, match="columns: 0"):
        plotting.image_grid(images, synthetic=True, columns=0)


def test_strip_has_states_from_left_to_right_and_images_from_top_to_bottom() -> None:
    states = (np.arange(6, dtype=np.float32) / 10).reshape(3, 2, 1, 1, 1) * np.ones((3, 2, 4, 4, 1), np.float32)
    figure = plotting.strip(states, [1.0, 0.5, 0.0], synthetic=True, gammas=[5.0, -0.01, -6.0], row_titles=["u", "v"])
    sheet = figure.axes[0].images[0].get_array().data
    gap = (sheet.shape[1] - 12) // 2
    shown = sheet[:: 4 + gap, :: 4 + gap]
    np.testing.assert_allclose(shown, [[0.0, 0.2, 0.4], [0.1, 0.3, 0.5]], atol=1e-7)
    places = {t.get_text(): t.get_position() for t in figure.texts}
    left, middle, right = (
        places[f"t = {t}\nγ = {g}"][0] for t, g in (("1.00", "5.0"), ("0.50", "0.0"), ("0.00", "−6.0"))
    )
    assert left < middle < right
    assert places["u"][1] > places["v"][1]
    assert "synthetic" in texts(figure)


@pytest.mark.parametrize(
    ("times", "shown"),
    [([0.0, 0.5], ["0.00", "0.50"]), ([0.125, 1.0], ["0.125", "1.000"]), ([0.001, 0.002], ["0.001", "0.002"])],
)
def test_times_are_told_apart(times, shown) -> None:
    figure = plotting.strip(np.zeros((2, 1, 4, 4)), times, synthetic=False)
    assert [t.get_text() for t in figure.texts] == [f"t = {s}" for s in shown]


def test_long_strips_name_the_time_once() -> None:
    figure = plotting.strip(np.zeros((16, 1, 4, 4)), np.linspace(1, 0, 16), synthetic=False)
    shown = [t.get_text() for t in figure.texts]
    assert shown.count("t") == 1 and shown[0] == "1.00" and not any("=" in s for s in shown)


def test_strip_refuses() -> None:
    states = np.zeros((3, 2, 4, 4, 1))
    with pytest.raises(InputError, match=r"times: shape \(2,\); expected \(3,\)"):
        plotting.strip(states, [0.0, 1.0], synthetic=False)
    with pytest.raises(InputError, match="gammas"):
        plotting.strip(states, [0.0, 0.5, 1.0], gammas=[1.0], synthetic=False)
    with pytest.raises(InputError, match="row_titles: 3; expected 2"):
        plotting.strip(states, [0.0, 0.5, 1.0], row_titles=["a", "b", "c"], synthetic=False)
    with pytest.raises(InputError, match="states: shape"):
        plotting.strip(states[0, 0], [0.0], synthetic=False)
    with pytest.raises(InputError, match=r"states: values.*expected \[0, 1\]"):
        plotting.strip(states - 1, [0.0, 0.5, 1.0], synthetic=False)


def test_forward_strip_is_the_marginal_of_the_forward_process() -> None:
    x = np.full((1, 100, 100, 1), 0.6, np.float32)  # 0.2 on the scale [-1, 1]
    schedule = FixedLinear(-20.0, 0.0)
    times = np.array([0.0, 0.8, 1.0])
    sheet = plotting.forward_strip(x, schedule, times, seed=3).axes[0].images[0].get_array().data
    gap = (sheet.shape[1] - 300) // 2
    for i, t in enumerate(times):
        z = 2.0 * sheet[:, i * (100 + gap) : i * (100 + gap) + 100] - 1.0
        alpha, sigma = (float(f(schedule(jnp.asarray(t)))) for f in (gaussian.alpha, gaussian.sigma))
        assert np.abs(z).max() <= 1.0 + 1e-6
        # Clipping to [-1, 1] is monotonic, so it keeps the quantiles that lie inside. 10,000 pixels: the error of
        # these quantiles has a standard deviation of at most 0.014 sigma.
        for level, q in ((0.25, -0.6745), (0.5, 0.0), (0.75, 0.6745)):
            assert abs(np.quantile(z, level) - (alpha * 0.2 + sigma * q)) < 0.06 * sigma + 1e-5, (t, level)


def test_forward_strip_depends_on_the_seed_and_nothing_else(images) -> None:
    def shown(seed: int) -> np.ndarray:
        return plotting.forward_strip(images, FixedLinear(-6.0, 5.0), seed=seed).axes[0].images[0].get_array().data

    np.testing.assert_array_equal(shown(1), shown(1))
    assert np.nanmax(np.abs(shown(1) - shown(2))) > 0.5


@pytest.mark.parametrize("times", [[], [-0.1, 0.5], [0.5, 1.2], [0.0, np.nan]])
def test_forward_strip_refuses_times(images, times) -> None:
    with pytest.raises(InputError, match="times"):
        plotting.forward_strip(images, FixedLinear(-6.0, 5.0), times)


# --- Curves ------------------------------------------------------------------------------------------------------


def test_loss_curves_show_every_step_of_every_term_and_its_mean() -> None:
    rows = records()
    figure = plotting.loss_curves(rows, floor_bpd=0.55, window=5)
    for title, name in {
        "Reconstruction": "reconstruction_bpd",
        "Diffusion": "diffusion_bpd",
        "Latent": "latent_bpd",
        "Total": "vlb_bpd",
    }.items():
        raw, smooth = panel(figure, title).lines[:2]
        np.testing.assert_array_equal(raw.get_xdata(), [r["step"] for r in rows])
        np.testing.assert_array_equal(raw.get_ydata(), [r[name] for r in rows])
        np.testing.assert_allclose(smooth.get_ydata()[10], np.mean([r[name] for r in rows[8:13]]))


def test_loss_curves_scale_each_term_for_itself() -> None:
    figure = plotting.loss_curves(records())
    scales = {a.get_title(loc="left"): a.get_yscale() for a in figure.axes}
    assert scales == {
        "Reconstruction": "linear",
        "Diffusion, log scale": "log",
        "Latent (prior)": "linear",
        "Total: negative bound": "linear",
    }
    assert panel(figure, "Latent").get_ylim()[1] < 1e-4  # not squeezed to a line on the scale of the others


def test_a_term_that_touches_zero_is_not_on_a_log_scale() -> None:
    rows = [{**r, "diffusion_bpd": 0.0 if r["step"] == 7 else r["diffusion_bpd"]} for r in records()]
    axes = panel(plotting.loss_curves(rows, window=1), "Diffusion")
    assert axes.get_yscale() == "linear" and axes.lines[0].get_ydata()[6] == 0.0


def test_floor_is_drawn_where_it_means_something() -> None:
    figure = plotting.loss_curves(records(), floor_bpd=0.5)
    for title, there in {"Reconstruction": True, "Total": True, "Diffusion": False, "Latent": False}.items():
        axes = panel(figure, title)
        lines = [line for line in axes.lines if list(line.get_ydata()) == [0.5, 0.5]]
        assert bool(lines) == there, title
        assert any("floor 0.5000" in t.get_text() for t in axes.texts) == there, title
        if there:
            assert axes.get_ylim()[0] < 0.5


def test_resumed_and_damaged_records() -> None:
    rows = [
        {"step": 3, "vlb_bpd": 0.5},
        {"step": 1, "vlb_bpd": 1.0},
        {"step": 2, "vlb_bpd": float("nan")},
        {"step": 3, "vlb_bpd": 0.7, "reconstruction_bpd": None},
        {"note": "not a step"},
    ]
    figure = plotting.loss_curves(rows)
    line = panel(figure, "Total").lines[0]
    assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == [(1, 1.0), (3, 0.7)]
    assert [t.get_text() for t in panel(figure, "Reconstruction").texts] == ["not recorded"]
    draw(figure)


def test_one_record_is_a_point() -> None:
    figure = plotting.loss_curves(records(1))
    assert panel(figure, "Total").lines[0].get_marker() == "o"
    draw(figure)
    labels = [t.get_text() for t in panel(figure, "Total").get_xticklabels() if t.get_text()]
    assert len(labels) == len(set(labels))


def test_loss_curves_refuse() -> None:
    for rows in ([], [{"step": 1}], [{"vlb_bpd": 1.0}], [{"step": 1, "vlb_bpd": float("inf")}]):
        with pytest.raises(InputError, match="records"):
            plotting.loss_curves(rows)
    with pytest.raises(InputError, match="window: 0"):
        plotting.loss_curves(records(), window=0)


@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_moving_average_is_the_mean_over_the_window_that_is_there(window: int) -> None:
    values = np.random.default_rng(0).normal(size=17)
    found = plotting.moving_average(values, window)
    for i in range(17):
        part = values[max(0, i - (window - 1) // 2) : i + window // 2 + 1]
        assert found[i] == pytest.approx(part.mean())


def test_axis_numbers_share_decimals_and_power() -> None:
    plain = plotting._Plain()
    assert plain.format_ticks([0.6, 0.65, 0.7]) == ["0.60", "0.65", "0.70"]
    assert plain.format_ticks([-1.0, 0.0, 1.0]) == ["−1", "0", "1"]
    assert plain.format_ticks([2.5e-4, 3e-4]) == [r"$2.5\times10^{-4}$", r"$3.0\times10^{-4}$"]
    log = plotting._Plain(log=True)
    assert log.format_ticks([1e-5, 5e-5, 0.002, 10.0]) == ["$10^{-5}$", r"$5\times10^{-5}$", "0.002", "10"]


def test_schedule_curves_are_the_formulas() -> None:
    low, high = -6.0, 5.0
    figure = plotting.schedule_curves({"one": FixedLinear(low, high), "two": FixedLinear(0.1, 1.0)}, points=11)
    t = np.linspace(0, 1, 11)
    gamma = low + (high - low) * t
    expected = {
        "γ": gamma,
        "Signal": np.sqrt(1 / (1 + np.exp(gamma))),
        "Noise": np.sqrt(1 / (1 + np.exp(-gamma))),
        "SNR": np.exp(-gamma),
    }
    for title, curve in expected.items():
        first, second = panel(figure, title).lines
        np.testing.assert_allclose(first.get_xdata(), t, atol=1e-6)
        np.testing.assert_allclose(first.get_ydata(), curve, rtol=1e-4)
        assert first.get_color() != second.get_color() and first.get_linestyle() != second.get_linestyle()
    assert panel(figure, "SNR").get_yscale() == "log"
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["one", "two"]
    assert panel(figure, "γ").get_ylabel() == "nats" and panel(figure, "SNR").get_xlabel() == "time t"


def test_schedule_curves_refuse() -> None:
    with pytest.raises(InputError, match="schedules: none"):
        plotting.schedule_curves({})
    with pytest.raises(InputError, match="points: 1"):
        plotting.schedule_curves({"a": FixedLinear(-6.0, 5.0)}, points=1)


# --- Manners -----------------------------------------------------------------------------------------------------


def all_figures(images: np.ndarray) -> list:
    return [
        plotting.image_grid(images, synthetic=True),
        plotting.forward_strip(images, FixedLinear(-6.0, 5.0)),
        plotting.loss_curves(records(), floor_bpd=0.5),
        plotting.schedule_curves({"a": FixedLinear(-6.0, 5.0)}),
    ]


def test_looks_the_same_and_opaque_white_whatever_the_user_has_set(images) -> None:
    plain = [pixels(f) for f in all_figures(images)]
    mine = {
        "figure.facecolor": "black",
        "savefig.facecolor": "black",
        "savefig.transparent": True,
        "text.color": "white",
        "axes.facecolor": "red",
        "font.size": 20,
        "savefig.dpi": 30,
    }
    with matplotlib.rc_context(mine):
        before = dict(matplotlib.rcParams)
        styled = [pixels(f) for f in all_figures(images)]
        assert dict(matplotlib.rcParams) == before
    for a, b in zip(plain, styled, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a[..., 3] == 255).all() and (a[[0, -1]][..., :3] == 255).all()


def test_no_text_is_cut_off(images) -> None:
    strip = plotting.strip(
        images[None], [0.5], synthetic=True, row_titles=["No Finding", "Pneumonia", "a", "b", "c"], title="Title"
    )
    for figure in (*all_figures(images), strip, plotting.image_grid(images[:1, :2, :2], synthetic=True)):
        draw(figure)
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert box.x0 >= -0.005 and box.y0 >= -0.005 and box.x1 <= width + 0.005 and box.y1 <= height + 0.005


def test_a_notebook_can_display_the_figure(images) -> None:
    figure = plotting.image_grid(images, synthetic=True)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(figure.png()))), pixels(figure))
    (drawn,) = figure._repr_mimebundle_().items()
    assert drawn == ("image/svg+xml", figure._repr_mimebundle_()["image/svg+xml"])  # the same bytes each time


def test_a_picture_in_a_figure_is_stored_with_its_own_pixels(images) -> None:
    figure, axes = plotting.subplots()
    shown = axes.imshow(images[0, ..., 0], cmap="gray", vmin=0.0, vmax=1.0)
    before = shown.get_interpolation()
    svg = figure._repr_mimebundle_()["image/svg+xml"]
    stored = "".join(re.search(r"data:image/png;base64,([^\"]+)", svg)[1].split())
    inside = np.asarray(Image.open(io.BytesIO(base64.b64decode(stored))).convert("L"))
    assert inside.shape == images.shape[1:3] and shown.get_interpolation() == before
    np.testing.assert_allclose(inside, 255 * images[0, ..., 0], atol=2.0)  # one of 256 grays


def test_a_figure_with_too_much_to_draw_is_a_picture() -> None:
    figure, axes = plotting.subplots()
    axes.scatter(*np.random.default_rng(0).normal(size=(2, 20_000)))
    (kind,) = figure._repr_mimebundle_()
    assert kind == "image/png"


def test_pyplot_is_not_used_and_only_plotting_needs_matplotlib() -> None:
    code = (
        "import sys, medvdm, medvdm.runs.provenance, medvdm.models.vdm, medvdm.data\n"
        "assert not any(m.split('.')[0] in ('matplotlib', 'PIL') for m in sys.modules)\n"
        "import numpy as np, medvdm.plotting\n"
        "medvdm.plotting.image_grid(np.zeros((1, 4, 4)), synthetic=True).png()\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_subplots_have_lines_that_differ_without_colour() -> None:
    figure, axes = plotting.subplots(1, 2, height=2.0, sharey=True)
    lines = [axes[0].plot([0, 1], [k, k])[0] for k in range(4)]
    assert len({line.get_linestyle() if line.is_dashed() is False else str(line._dash_pattern) for line in lines}) == 4
    assert [line.get_color() for line in lines] == list(plotting.COLOURS[:4])
    assert tuple(figure.get_size_inches()) == (8.0, 2.0) and figure.png().startswith(b"\x89PNG")
    one = plotting.subplots()[1]
    one.plot([0, 1], label="line")
    one.set(title="Set later")
    assert not one.spines["top"].get_visible() and not one.legend().get_frame_on()
    assert one.get_title(loc="left") == "Set later" and one._left_title.get_fontweight() == "bold"
