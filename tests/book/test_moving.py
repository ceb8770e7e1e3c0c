"""The figures that a reader moves: each as a cell makes it, in a browser, against the library's numbers."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from medvdm import plotting
from medvdm.models import likelihoods
from medvdm.notebook import interactive
from medvdm.theory import gaussian, linear_gaussian

pytestmark = pytest.mark.slow

STATIC = Path(__file__).parents[2] / "book" / "_static"
RNG = np.random.default_rng(0)
GRAYS = np.uint8(RNG.integers(0, 256, (3, 16, 16)))
GAMMAS = np.linspace(-8.0, 6.0, 141)
KNOTS = np.array([0, 0.2, 0.4, 0.6, 0.75, 0.87, 0.95, 1])
D = 8
ERROR = D * 0.49 / (0.49 + np.exp(GAMMAS))  # of the exact denoiser of N(0, 0.49 I)
LOSS = D * 0.5 * (np.log1p(0.49 * np.exp(8.0)) - np.log1p(0.49 * np.exp(-6.0)))  # equation (5.7)


def best(t):
    """The schedule of least variance, equation (5.10)."""
    ends = np.log1p(0.49 * np.exp(8.0)), np.log1p(0.49 * np.exp(-6.0))
    return -np.log(np.expm1((1 - t) * ends[0] + t * ends[1]) / 0.49)


DATA = {
    "noise": {"image": GRAYS[:1], "noise": GRAYS[1:2], "levels": 30, "gamma": [-8, 8], "start": 0},
    "posterior": {"gamma": [-6.0, 6.0], "x": 0.8, "z": -0.5, "t": 0.7, "s": 0.6},
    "schedule": {
        "gammas": GAMMAS,
        "m": ERROR,
        "q": (1 + 2 / D) * ERROR**2,
        "times": KNOTS,
        "shapes": {"linear": -8 + 14 * KNOTS, "best": best(KNOTS)},
        "start": "linear",
        "draws": np.stack([RNG.random(50), RNG.chisquare(D, 50) / D], axis=1),
        "least": np.sqrt(2 / D) * LOSS,
        "widest": 60.0,
        "ticks": [-8, -4, 0, 4],
        "losses": [0, 50, 100, 150],
        "top": 160,
    },
    "blur": {
        "image": GRAYS[:1],
        "widths": [0, 1, 2, 3],
        "distortion": [0, 0.1, 0.15, 0.17],
        "clip": linear_gaussian.CLIP,
        "start": 1,
        "ticks": [0, 1, 2, 3],
        "levels": [0, 0.1, 0.2],
        "top": 0.25,
    },
    "plane": {
        "image": GRAYS[:1],
        "pictures": GRAYS[[0, 1, 2, 0]],
        "components": [1, 4],
        "noises": [0.2, 0.8],
        "points": [[20.0, 60.0], [5.0, 90.0], [80.0, 20.0], [30.0, 40.0]],
        "curve": [[4.0, 90.0], [90.0, 18.0]],
        "start": [0, 0],
        "ticks": [[1, 10, 100], [20, 50, 100]],
    },
    "reverse": {
        "states": GRAYS[[0, 1, 1, 2, 2, 0]],
        "chains": 2,
        "times": [1.0, 0.5, 0.0],
        "title": "From noise",
        "hint": "Synthetic.",
    },
    "bits": {
        "image": GRAYS[:1],
        "noise": GRAYS[1:2],
        "levels": 30,
        "guesses": GRAYS,
        "at": [0, 2, 4],
        "gammas": [-4.0, -2.0, 0.0, 2.0, 4.0],
        "bits": [0.7, 0.5, 0.3, 0.1, 0.0],
        "start": 2,
        "ticks": [-4, 0, 4],
    },
}


def test_every_script_has_data_here():
    assert {path.stem for path in (STATIC / "moving").glob("*.js")} == set(DATA)


@pytest.fixture(scope="module")
def site(tmp_path_factory, serve):
    """A page with all of them, and the scripts, on a loopback server."""
    root = tmp_path_factory.mktemp("moving")
    (root / "_static").symlink_to(STATIC)
    still, _ = plotting.subplots(height=1.0, width=3.0)
    shown = [interactive(kind, data, still, alt=f"The figure {kind}").markup for kind, data in DATA.items()]
    head = '<link rel="stylesheet" href="_static/moving.css"><script defer src="_static/moving.js"></script>'
    (root / "page.html").write_text(f"<!doctype html><meta charset=utf-8>{head}{'<hr>'.join(shown)}", "utf8")
    return serve(root)


@pytest.fixture
def page(browser, site):
    """The page with every figure brought to life, in a browser whose reader wants no motion; no error at the end."""
    context = browser.new_context(reduced_motion="reduce", viewport={"width": 900, "height": 900})
    page = context.new_page()
    wrong = []
    page.on(
        "console", lambda m: wrong.append(m.text) if m.type == "error" and "favicon" not in m.location["url"] else None
    )
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith((site, "data:")) else wrong.append(f"asked for {r.url}"))
    page.goto(f"{site}/page.html")
    page.wait_for_function(f"document.querySelectorAll('.moving-on').length === {len(DATA)}")
    yield page
    assert wrong == []
    context.close()


def state(page, kind):
    return page.evaluate(f"document.querySelector('[data-moving={kind}]').state")


def move(page, kind, value, number=0):
    """Set a slider as a reader's hand does."""
    range_ = page.locator(f"[data-moving={kind}] input[type=range]").nth(number)
    range_.evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})); }", value)


def shown(page, kind, name):
    return page.locator(f"[data-moving={kind}] .moving-number-{name} dd").inner_text()


def test_the_slider_of_gamma_shows_alpha_sigma_and_snr(page):
    for gamma in (-8.0, -2.5, 0.0, 3.0, 8.0):
        move(page, "noise", gamma)
        found = state(page, "noise")
        for name in ("alpha", "sigma", "snr"):
            expected = float(getattr(gaussian, name)(jnp.float32(gamma)))
            assert found[name] == pytest.approx(expected, rel=1e-6), (name, gamma)
    assert shown(page, "noise", "alpha") == f"{found['alpha']:.4f}"
    # The third picture is the sum, on the scale from -1 to 1.
    move(page, "noise", -1.0)
    x, eps = GRAYS[0] / 127.5 - 1, (GRAYS[1] - 128.0) / 30
    z = float(gaussian.alpha(jnp.float32(-1.0))) * x + float(gaussian.sigma(jnp.float32(-1.0))) * eps
    pixels = (
        page.locator("[data-moving=noise] canvas")
        .nth(2)
        .evaluate("e => Array.from(e.getContext('2d').getImageData(0, 0, 16, 16).data.filter((_, i) => i % 4 === 0))")
    )
    np.testing.assert_allclose(pixels, np.clip(127.5 * (z + 1), 0, 255).ravel(), atol=0.51)


def test_the_weights_of_the_posterior_are_those_of_the_library(page):
    for s, t, z in ((0.1, 0.3, 1.0), (0.5, 0.51, -1.5), (0.0, 1.0, 0.4), (0.6, 0.9, 2.0)):
        page.evaluate(f"document.querySelector('[data-moving=posterior]').set({{t: {t}, z: {z}}})")
        move(page, "posterior", s, 1)
        found = state(page, "posterior")
        gammas = jnp.float32(-6 + 12 * s), jnp.float32(-6 + 12 * t)
        whole = gaussian.posterior(jnp.float32(0.8), jnp.float32(z), *gammas)
        of_z, of_x = (float(gaussian.posterior(a, 1 - a, *gammas).mean) for a in (jnp.float32(0), jnp.float32(1)))
        assert found["mean"] == pytest.approx(float(whole.mean), abs=2e-6)
        assert found["deviation"] == pytest.approx(float(jnp.sqrt(whole.variance)), rel=1e-5)
        assert (found["ofZ"], found["ofX"]) == pytest.approx((of_z, of_x), rel=1e-5)
    move(page, "posterior", 0.2)  # t pushes s
    assert state(page, "posterior")["s"] < 0.2


def test_a_dragged_schedule_keeps_its_area_while_the_spread_changes(page):
    handles = page.locator("[data-moving=schedule] .moving-handle")
    handles.first.scroll_into_view_if_needed()
    spreads = []
    for number, by in ((0, 60), (1, -70), (4, 90), (2, 40), (0, -50)):
        box = handles.nth(number).locator(".moving-knob").bounding_box()
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(*middle)
        page.mouse.down()
        page.mouse.move(middle[0] + 5, middle[1] + by, steps=4)
        page.mouse.up()
        found = state(page, "schedule")
        assert found["area"] == pytest.approx(LOSS, rel=1e-3)
        assert np.all(np.diff(found["knots"]) > 0)
        assert found["deviation"] > DATA["schedule"]["least"] * (1 - 1e-3)
        spreads.append(found["deviation"])
    assert len({round(spread, 1) for spread in spreads}) == len(spreads)
    assert shown(page, "schedule", "area") == f"{LOSS:.2f}"
    # The arrow keys, and the shapes. A straight line is what the knots make of it: its spread has a closed form.
    handles.nth(3).focus()
    before = state(page, "schedule")["knots"][4]
    page.keyboard.press("ArrowUp")
    assert state(page, "schedule")["knots"][4] > before
    page.get_by_role("button", name="linear").click()
    fine = np.linspace(-8, 6, 200_001)
    square = np.trapezoid((0.49 / (0.49 + np.exp(fine))) ** 2, fine)
    linear = np.sqrt(0.25 * 14 * D * (D + 2) * square - LOSS**2)
    assert state(page, "schedule")["deviation"] == pytest.approx(linear, rel=2e-3)
    page.get_by_role("button", name="best").click()
    assert state(page, "schedule")["deviation"] < 1.1 * DATA["schedule"]["least"]


def test_the_distortion_of_a_blur_is_that_of_the_library(page):
    x = GRAYS[0] / 255
    floor = float(likelihoods.bernoulli_floor(jnp.asarray(x[None, ..., None]))[0]) / x.size / np.log(2)
    for width in (0, 0.5, 1, 2.25, 3):
        move(page, "blur", width)
        found = state(page, "blur")
        blurred = gaussian_filter(x, width, mode="nearest") if width else x
        cost = linear_gaussian.cross_entropy(x.reshape(1, -1), blurred.reshape(1, -1))[0] / x.size / np.log(2)
        assert found["floor"] == pytest.approx(floor, abs=1e-6)
        assert found["distortion"] == pytest.approx(max(0.0, cost - floor), abs=1e-5), width


def test_the_plane_shows_the_point_under_the_pointer(page):
    dots = page.locator("[data-moving=plane] .moving-quietdot")
    page.locator("[data-moving=plane] svg").scroll_into_view_if_needed()
    for number, (rate, distortion) in enumerate(DATA["plane"]["points"]):
        box = dots.nth(number).bounding_box()
        page.mouse.move(box["x"] + 4, box["y"] + 3)
        found = state(page, "plane")
        assert (found["rate"], found["distortion"]) == (rate, distortion)
    first = page.locator("[data-moving=plane] canvas").nth(1)
    assert first.evaluate("e => e.getContext('2d').getImageData(0, 0, 1, 1).data[0]") == GRAYS[0, 0, 0]
    page.locator("[data-moving=plane] input").first.focus()
    page.keyboard.press("ArrowLeft")
    assert state(page, "plane")["components"] == 1
    assert shown(page, "plane", "excess") == "95"


def test_the_loop_waits_for_the_button_where_motion_is_unwanted(page, browser, site):
    assert not state(page, "reverse")["playing"]
    assert state(page, "reverse")["t"] == 0.0  # the finished pictures
    page.locator("[data-moving=reverse] button").click()
    page.wait_for_function("document.querySelector('[data-moving=reverse]').state.frame === 1")
    page.locator("[data-moving=reverse] button").click()
    assert not state(page, "reverse")["playing"]
    move(page, "reverse", 0)
    assert state(page, "reverse")["t"] == 1.0
    with browser.new_context() as context:
        other = context.new_page()
        other.goto(f"{site}/page.html")
        other.locator("[data-moving=reverse] button").scroll_into_view_if_needed()
        other.wait_for_function("document.querySelector('[data-moving=reverse]').state.playing")


def test_the_bits_spent_are_the_area_under_the_curve(page):
    for level, spent in enumerate((0.0, 1.2, 2.0, 2.4, 2.5)):
        move(page, "bits", level)
        assert state(page, "bits")["spent"] == pytest.approx(spent, abs=1e-6)
    assert shown(page, "bits", "share") == "100 %"


def test_sliders_have_labels_and_no_figure_is_wider_than_a_telephone(page):
    names = page.eval_on_selector_all(".moving input", "e => e.map(i => i.labels[0]?.textContent || '')")
    assert names and all(names)
    page.set_viewport_size({"width": 360, "height": 800})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_without_scripts_the_pictures_stay(browser, site):
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(f"{site}/page.html")
        assert all(page.locator(".moving-still").nth(i).is_visible() for i in range(len(DATA)))
