"""Figures: grids and strips of images, loss curves and schedules. The only module that imports matplotlib.

Every function returns a :class:`matplotlib.figure.Figure` of its own: nothing is shown, no global state is changed
(no pyplot, no ``rcParams``), and a notebook displays the figure as the value of a cell. Save it with
``figure.savefig``. The background is opaque white, so that figures also read on dark pages; a notebook shows them as
SVG. Colours are those of Okabe and Ito, and lines differ in their dashes as well.

Images are drawn on one gray scale, black 0 to white 1, never stretched to their own range.
"""

from __future__ import annotations

import base64
import functools
import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as _Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import Formatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from medvdm.errors import InputError
from medvdm.images import as_images, default_columns, tile
from medvdm.theory import gaussian

#: Okabe and Ito's colours that are dark enough on white, in the order in which they are used.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
DPI = 100

_GRAY = "#555555"
_MOST_SVG = 400_000  # characters, without the pictures within
_WIDTH = 8.0  # inches that a figure takes at most, about
_STYLE = {
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same figure everywhere
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.edgecolor": _GRAY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "xtick.color": _GRAY,
    "ytick.color": _GRAY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "medvdm",  # the same names within the file each time
}


class Figure(_Figure):
    """A matplotlib figure that a notebook can display without pyplot, and that is saved as it was drawn."""

    def savefig(self, *args: Any, **more: Any) -> None:
        """As matplotlib's, but opaque and in our fonts whatever the user's ``rcParams`` say."""
        with _style():
            super().savefig(*args, **more)

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, str]:
        """As SVG, sharp at any size, with pictures in their own pixels; as PNG if there is too much to draw."""
        buffer = io.StringIO()
        images = [image for axes in self.axes for image in axes.images]
        before = [image.get_interpolation() for image in images]
        for image in images:
            image.set_interpolation("none")  # not resampled: whoever shows the figure does that
        try:
            self.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        finally:
            for image, interpolation in zip(images, before, strict=True):
                image.set_interpolation(interpolation)
        svg = buffer.getvalue()
        if len(re.sub(r"base64,[^\"]+", "", svg)) <= _MOST_SVG:
            return {"image/svg+xml": svg}
        return {"image/png": base64.b64encode(self.png(2 * DPI)).decode()}

    def png(self, dpi: int = DPI) -> bytes:
        """The figure as a PNG file."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=dpi)
        return buffer.getvalue()


def _style() -> Any:
    """Matplotlib's defaults and ours on top, whatever the user has set; undone at the end of the block."""
    return matplotlib.style.context(["default", _STYLE])


# --- Images ------------------------------------------------------------------------------------------------------


def image_grid(
    images: np.ndarray,
    *,
    synthetic: bool,
    columns: int | None = None,
    titles: Sequence[str] | None = None,
    title: str | None = None,
) -> _Figure:
    """Images in rows and columns.

    Args:
        images: (n, h, w) or (n, h, w, c) with c 1 or 3; uint8, or float in [0, 1].
        synthetic: whether a model has drawn the images. If so, the figure says 'synthetic'; there is no default, so
            that nobody forgets.
        columns: images per row; about a square by default.
        titles: n texts, one above each image.
        title: a line above all.

    Raises:
        InputError, InputTypeError: images that cannot be shown, columns below 1, or not n titles.
    """
    images = as_images(images, picture=True)
    n = len(images)
    if columns is not None and columns < 1:
        raise InputError(f"columns: {columns}; expected at least 1")
    if titles is not None and len(titles) != n:
        raise InputError(f"titles: {len(titles)}; expected {n}, one per image")
    return _sheet(images, min(columns or default_columns(n), n), synthetic, above=titles, title=title)


def strip(
    states: np.ndarray,
    times: Sequence[float] | np.ndarray,
    *,
    synthetic: bool,
    gammas: Sequence[float] | np.ndarray | None = None,
    row_titles: Sequence[str] | None = None,
    title: str | None = None,
) -> _Figure:
    """States of the forward or the reverse process from left to right, one row per image.

    Args:
        states: (k, n, h, w) or (k, n, h, w, c) with c 1 or 3, as :attr:`medvdm.models.generate.Generated.states`.
        times: (k,) the time t of each state, from 0 to 1; they stand above the columns.
        synthetic: whether a model has drawn the images, see :func:`image_grid`.
        gammas: (k,) gamma = -log SNR of each state in nats, for a second line above the columns.
        row_titles: n texts to the left of the rows.
        title: a line above all.

    Raises:
        InputError, InputTypeError: states that cannot be shown, or numbers of times, gammas or titles that do not fit.
    """
    states, times = np.asarray(states), np.asarray(times, np.float64)
    if states.ndim not in (4, 5) or 0 in states.shape:
        raise InputError(f"states: shape {states.shape}; expected (k, n, h, w) or (k, n, h, w, c), none of them 0")
    k, n = states.shape[:2]
    if times.shape != (k,):
        raise InputError(f"times: shape {times.shape}; expected {(k,)}, one a state")
    if row_titles is not None and len(row_titles) != n:
        raise InputError(f"row_titles: {len(row_titles)}; expected {n}, one per row")
    lines = {"t": _decimals(times)}
    if gammas is not None:
        gammas = np.asarray(gammas, np.float64)
        if gammas.shape != (k,):
            raise InputError(f"gammas: shape {gammas.shape}; expected {(k,)}, one a state")
        lines["\u03b3"] = [_minus(f"{gamma:z.1f}") for gamma in gammas]  # z: never "-0.0"
    narrow = k > 12  # the symbols stand once, at the left, where there is no room for them above every column
    above = [
        "\n".join(v if narrow else f"{name} = {v}" for name, v in zip(lines, column, strict=True))
        for column in zip(*lines.values(), strict=True)
    ]
    return _sheet(
        as_images(np.swapaxes(states, 0, 1).reshape(n * k, *states.shape[2:]), "states", picture=True),
        k,
        synthetic,
        above=above,
        above_name="\n".join(lines) if narrow else "",
        left=row_titles,
        title=title,
    )


def forward_strip(
    x: np.ndarray,
    schedule: Callable[[Any], Any],
    times: Sequence[float] | np.ndarray = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    *,
    seed: int = 0,
    synthetic: bool = False,
    row_titles: Sequence[str] | None = None,
    title: str | None = None,
) -> _Figure:
    r"""Images diffused in pixel space, :math:`z_t = \alpha_t x + \sigma_t \epsilon`, with x scaled to [-1, 1].

    Each column is a draw from :math:`q(z_t \mid x)`; all columns of a row share their :math:`\epsilon`, so what changes
    along the row is the schedule's doing. :math:`z_t` is shown on the scale of x: black is -1 or less, white 1 or more.

    This is a picture of the process for a text. The model itself diffuses a latent, not the pixels.

    Args:
        x: (n, h, w) or (n, h, w, c) with c 1 or 3; uint8, or float in [0, 1].
        schedule: gamma(t) in nats, such as :class:`medvdm.theory.schedules.FixedLinear`.
        times: (k,) from 0 to 1.
        seed: of the noise.
        synthetic: whether a model has drawn x.
        row_titles, title: see :func:`strip`.

    Raises:
        InputError, InputTypeError: images that cannot be shown, times outside [0, 1], or no time.
    """
    x = as_images(x, "x", picture=True)
    times = np.asarray(times, np.float32)
    if times.ndim != 1 or not times.size or not (times.min() >= 0.0 and times.max() <= 1.0):
        raise InputError(f"times: {np.array2string(times, threshold=8)}; expected one or more from 0 to 1")
    gammas = np.asarray(schedule(jnp.asarray(times)))
    eps = jax.random.normal(jax.random.key(seed), x.shape)
    scaled = 2.0 * jnp.asarray(x) - 1.0
    z = np.stack([gaussian.diffuse(scaled, eps, jnp.asarray(gamma)) for gamma in gammas])
    shown = np.clip((z + 1.0) / 2.0, 0.0, 1.0)
    return strip(shown, times, synthetic=synthetic, gammas=gammas, row_titles=row_titles, title=title)


def _decimals(values: np.ndarray) -> list[str]:
    """Numbers with two decimals, or three where two would round 0.125 or merge neighbours."""
    digits = 2
    if np.abs(values - np.round(values, 2)).max() > 0.004 or len(set(np.round(values, 2))) < len(set(values.tolist())):
        digits = 3
    return [f"{v:.{digits}f}" for v in values]


def _minus(text: str) -> str:
    """With a minus sign instead of a hyphen."""
    return text.replace("-", "\u2212")


def _sheet(
    images: np.ndarray,
    columns: int,
    synthetic: bool,
    *,
    above: Sequence[str] | None = None,
    above_name: str = "",
    left: Sequence[str] | None = None,
    title: str | None = None,
) -> _Figure:
    """Lay out images (n, h, w, c) by hand, in inches, so that small ones get whole numbers of dots a pixel.

    ``above`` holds a text for each image, or for each column if there are fewer; ``above_name`` stands left of them.
    """
    n, h, w, channels = images.shape
    rows = -(-n // columns)
    side = 8 + (8 * max(map(_dots, left)) + 8 if left else 14 if above_name else 0)
    most = min((_WIDTH * DPI - side) / columns, 256)
    whole = int(most // w)
    cell = whole * w if whole else most  # width of an image in dots
    scale = cell / w
    gap = max(1, round(4 / scale))  # between images, in their pixels
    line = 13  # height of a line of text in dots

    texts, size = (None, 8.0) if above is None else _fitted(above, cell)
    over_columns = texts is not None and len(texts) < n
    lines = 0 if texts is None else max(text.count("\n") + 1 for text in texts)
    text_height = lines * line + 8 if lines else 0
    between = 0 if over_columns else text_height  # between the rows of images
    top = (text_height if over_columns else 0) + (24 if title else 0) + 8
    bottom = 20 if synthetic else 8
    step_x, step_y = (w + gap) * scale, (h + gap) * scale + between
    inner_w, inner_h = columns * step_x - gap * scale, rows * step_y - gap * scale
    width, height = max(inner_w + side + 8, 90), inner_h + top + bottom
    ground = math.nan if channels == 1 else 1.0  # between gray images the figure shows, whatever is behind it

    with _style():
        figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
        interpolation = "nearest" if whole else "antialiased"

        def put(part: np.ndarray, down: float, wide: float, high: float) -> None:
            axes = figure.add_axes((side / width, 1 - (down + high) / height, wide / width, high / height))
            axes.imshow(
                part[..., 0] if channels == 1 else part,
                cmap="gray",
                vmin=0.0,
                vmax=1.0,
                interpolation=interpolation,
                aspect="auto",
            )
            axes.set_axis_off()

        def write(x: float, down: float, text: str, **more: Any) -> None:
            figure.text(x / width, 1 - down / height, text, **more)

        if between:  # a picture a row, with room for the titles
            for row in range(rows):
                part = tile(images[row * columns : (row + 1) * columns], columns, gap, ground)
                put(part, top + row * step_y + between, inner_w, h * scale)
        else:
            put(tile(images, columns, gap, ground), top, inner_w, inner_h)
        for i, text in enumerate(texts or ()):
            x = side + (i % columns) * step_x + cell / 2
            down = top - 4 if over_columns else top + (i // columns) * step_y + between - 4
            write(x, down, text, ha="center", va="bottom", fontsize=size, linespacing=1.15)
        if above_name:
            write(side - 6, top - 4, above_name, ha="right", va="bottom", fontsize=size, linespacing=1.15)
        for row, text in enumerate(left or ()):
            write(side - 6, top + row * step_y + h * scale / 2, text, ha="right", va="center", fontsize=8)
        if title:
            write(side, 8, title, ha="left", va="top", fontsize=10, fontweight="bold")
        if synthetic:
            long = "synthetic: generated by medvdm, not radiographs of patients"
            text = long if width > 340 else "synthetic"
            write(width - 8, height - 5, text, ha="right", va="bottom", fontsize=7, color=_GRAY)
    return figure


def _fitted(texts: Sequence[str], width: float) -> tuple[list[str], float]:
    """Break texts into lines of at most ``width`` dots: at spaces, then with smaller letters, then within words.

    Returns the texts and the size of their letters in points, 5 to 8.
    """
    words = [word for text in texts for word in text.split()]
    dots = max((_dots(word) / len(word) for word in words if len(word) > 3), default=0.75)  # of a letter of one point

    def wrapped(size: float, within_words: bool) -> list[str]:
        most = max(1, int(width / (dots * size) + 1e-6))
        return [
            "\n".join("\n".join(textwrap.wrap(line, most, break_long_words=within_words)) for line in text.split("\n"))
            for text in texts
        ]

    longest = max(len(line) for text in wrapped(8.0, False) for line in text.split("\n"))
    size = min(max(width / (dots * max(longest, 1)), 5.0), 8.0)
    return wrapped(size, True), size


def _dots(text: str) -> float:
    """Width of a text of one point."""
    font = FontProperties(family="DejaVu Sans", size=100)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 100 * DPI / 72


# --- Curves ------------------------------------------------------------------------------------------------------


def subplots(
    rows: int = 1, columns: int = 1, *, height: float = 3.0, width: float = _WIDTH, **options: Any
) -> tuple[_Figure, Any]:
    """A figure and its axes in the style of this module, to draw on: one Axes, or an array of them as matplotlib's.

    Lines take :data:`COLOURS` and :data:`DASHES` in turn, so they differ without colour too.

    Args:
        rows, columns: of axes.
        height, width: of the figure, in inches.
        options: for :meth:`matplotlib.figure.Figure.subplots`, such as ``sharex``.
    """
    with _style():
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        axes = figure.subplots(rows, columns, **options)
        for one in np.ravel(axes):
            one.set_prop_cycle(color=COLOURS[:4], linestyle=DASHES)
            # These two read the user's rcParams when they are called, which is outside of our style.
            one.set_title = functools.partial(one.set_title, loc="left", fontsize=9, fontweight="bold")
            one.legend = functools.partial(one.legend, fontsize=8, frameon=False)
    return figure, axes


_TERMS = {
    "reconstruction_bpd": "Reconstruction",
    "diffusion_bpd": "Diffusion",
    "latent_bpd": "Latent (prior)",
    "vlb_bpd": "Total: negative bound",
}
_WITH_FLOOR = ("reconstruction_bpd", "vlb_bpd")


def loss_curves(
    records: Sequence[Mapping[str, Any]],
    *,
    floor_bpd: float | None = None,
    window: int | None = None,
    title: str | None = None,
) -> _Figure:
    """The three terms of the bound and their total over training, one panel each, in bits per dimension.

    The terms differ by orders of magnitude, so each panel has a scale of its own; it is logarithmic where a term
    covers more than a factor of ten. Steps are drawn faintly, their moving average on top.

    Args:
        records: one per step, as in ``metrics.jsonl``: ``step``, ``reconstruction_bpd``, ``diffusion_bpd``,
            ``latent_bpd``, ``vlb_bpd``. A record without a term, or with one that is not finite, is left out of the
            term's panel; if a step comes twice (a resumed run), the last one counts.
        floor_bpd: the least possible reconstruction term, for a reference line; see
            :func:`medvdm.models.likelihoods.bernoulli_floor`.
        window: steps in the moving average, centred; about 1/40 of the records by default, 1 is none.
        title: a line above all.

    Raises:
        InputError: no record has a term, or window below 1.
    """
    series = {name: _series(records, name) for name in _TERMS}
    if not any(len(steps) for steps, _ in series.values()):
        raise InputError(
            f"records: {len(records)}, none with a 'step' and a finite term; expected lines of metrics.jsonl"
        )
    if window is not None and window < 1:
        raise InputError(f"window: {window}; expected at least 1")
    with _style():
        figure = Figure(figsize=(_WIDTH, 4.8), dpi=DPI, layout="constrained")
        grid = figure.subplots(2, 2, sharex=True)
        for axes, colour, (name, label) in zip(grid.flat, (*COLOURS[:3], "#000000"), _TERMS.items(), strict=True):
            steps, values = series[name]
            axes.set_title(label)
            axes.set_ylabel("bits per dimension")
            if not len(steps):
                axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=_GRAY)
                axes.set_yticks([])
                continue
            _term(axes, steps, values, window or max(1, len(steps) // 40), colour)
            if floor_bpd is not None and name in _WITH_FLOOR:
                axes.axhline(floor_bpd, color=_GRAY, linewidth=1.2, linestyle=(0, (4, 2)))
                axes.annotate(
                    f"floor {floor_bpd:.4f}",
                    (1.0, floor_bpd),
                    xycoords=("axes fraction", "data"),
                    xytext=(0, -3),
                    textcoords="offset points",
                    ha="right",
                    va="top",
                    fontsize=8,
                    color=_GRAY,
                )
                low, high = axes.get_ylim()
                axes.set_ylim(min(low, floor_bpd - 0.12 * (high - floor_bpd)), high)
        for axes in grid[1]:
            axes.set_xlabel("training step")
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    return figure


def _series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps in rising order and the values of a term there."""
    by_step = {r["step"]: r[name] for r in records if "step" in r and r.get(name) is not None}
    finite = {step: value for step, value in by_step.items() if math.isfinite(value)}
    steps = sorted(finite)
    return np.array(steps), np.array([finite[step] for step in steps], np.float64)


def _term(axes: Axes, steps: np.ndarray, values: np.ndarray, window: int, colour: str) -> None:
    smoothed = moving_average(values, window)
    if window > 1:
        axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.35)
    axes.plot(steps, smoothed, color=colour, marker="o" if len(steps) == 1 else None, markersize=4)
    if len(steps) == 1:
        axes.set_xlim(steps[0] - 1, steps[0] + 1)
    if values.min() > 0 and values.max() > 10 * values.min():
        axes.set_yscale("log")
        axes.set_title(f"{axes.get_title(loc='left')}, log scale")
        wide = values.max() > 1000 * values.min()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=8))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(_Plain(log=True))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
        axes.yaxis.set_major_formatter(_Plain())


class _Plain(Formatter):
    """0.60 and 0.65; 2.5 x 10^-4 where numbers are small. On a linear axis all have the same decimals and power."""

    def __init__(self, *, log: bool = False) -> None:
        self.log = log

    def __call__(self, value: float, pos: int | None = None) -> str:
        return self.format_ticks([value])[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        if self.log:
            return [_number(v, _power(v), None) for v in values]
        power = _power(max(map(abs, values), default=0.0))
        step = min(np.diff(values), default=1.0) / 10.0**power
        return [_number(v, power, max(0, math.ceil(-math.log10(step) - 1e-6))) for v in values]


def _power(value: float) -> int:
    """The power of ten to take out of a number: 0 unless it is below 1/1000."""
    return 0 if value == 0 or value >= 1e-3 else math.floor(math.log10(value) + 1e-9)


def _number(value: float, power: int, digits: int | None) -> str:
    factor = value / 10.0**power
    text = _minus(f"{factor:.4g}" if digits is None else f"{factor:.{digits}f}")
    if not power:
        return text
    return f"$10^{{{power}}}$" if text == "1" else rf"${text}\times10^{{{power}}}$"


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average of a (n,) series, (n,); at the ends over the part of the window that is there."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    centre = np.arange(len(values))
    first = np.maximum(centre - (window - 1) // 2, 0)
    last = np.minimum(centre + window // 2 + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def schedule_curves(
    schedules: Mapping[str, Callable[[Any], Any]], *, points: int = 201, title: str | None = None
) -> _Figure:
    r"""gamma, alpha, sigma and the signal-to-noise ratio of noise schedules over time, one panel each.

    Args:
        schedules: by name, functions gamma(t) in nats for an array of times in [0, 1].
        points: times at which each is drawn, evenly spaced.
        title: a line above all.

    Raises:
        InputError: no schedule, or fewer than 2 points.
    """
    if not schedules:
        raise InputError("schedules: none; expected at least one")
    if points < 2:
        raise InputError(f"points: {points}; expected at least 2")
    times = np.linspace(0.0, 1.0, points, dtype=np.float32)
    with _style():
        figure = Figure(figsize=(_WIDTH, 5.2), dpi=DPI, layout="constrained")
        grid = figure.subplots(2, 2, sharex=True)
        panels = (
            ("\u03b3 = \u2212log SNR", "nats", lambda gamma: gamma),
            ("Signal coefficient \u03b1", "dimensionless", gaussian.alpha),
            ("Noise coefficient \u03c3", "dimensionless", gaussian.sigma),
            ("SNR = \u03b1\u00b2 / \u03c3\u00b2, log scale", "dimensionless", gaussian.snr),
        )
        for i, (name, schedule) in enumerate(schedules.items()):
            gamma = jnp.asarray(schedule(jnp.asarray(times)))
            colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
            for axes, (_, _, function) in zip(grid.flat, panels, strict=True):
                axes.plot(times, np.asarray(function(gamma)), color=colour, linestyle=dash, label=name)
        for axes, (label, unit, _) in zip(grid.flat, panels, strict=True):
            axes.set_title(label)
            axes.set_ylabel(unit)
            axes.set_xlim(0, 1)
        for axes in (grid[0, 1], grid[1, 0]):
            axes.set_ylim(-0.03, 1.03)
        grid[1, 1].set_yscale("log")
        grid[1, 1].yaxis.set_minor_formatter(NullFormatter())
        for axes in grid[1]:
            axes.set_xlabel("time t")
        handles, names = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 4), handlelength=3)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    return figure
