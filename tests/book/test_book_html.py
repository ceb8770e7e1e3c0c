"""The book as a reader meets it: built without a warning, checked, and opened in a real browser without a network."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "book" / "_tools"))

import check_html  # noqa: E402

pytestmark = pytest.mark.slow

THEME_NOISE = ("Got invalid theme mode", "favicon.ico")  # of the theme, not ours


@pytest.fixture(scope="session")
def html(tmp_path_factory) -> Path:
    """The pages that `make` has just built (MEDVDM_HTML), or the book built in a new folder."""
    if built := os.environ.get("MEDVDM_HTML"):
        return Path(built)
    out = tmp_path_factory.mktemp("book")
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(ROOT), "-W", "-n", "--keep-going"]
    env = os.environ | {"PYTHONWARNINGS": "default"}
    done = subprocess.run([*command, "--path-output", str(out)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, "\n".join(
        line for line in (done.stdout + done.stderr).splitlines() if "WARNING" in line or "ERROR" in line
    )
    return out / "_build" / "html"


@pytest.fixture(scope="session")
def site(html, serve):
    """The address of the pages on a loopback server."""

    return serve(html)


@pytest.fixture
def page(browser, site):
    """A page that may speak to the loopback server only, and that remembers what went wrong."""
    context = browser.new_context()
    page = context.new_page()
    page.wrong = []
    page.route(
        "**/*",
        lambda route: (
            route.continue_()
            if route.request.url.startswith((site, "data:", "blob:"))
            else (page.wrong.append(f"asked for {route.request.url}"), route.abort())
        ),
    )
    page.on("console", lambda m: page.wrong.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    yield page
    context.close()


def settle(page):
    """Wait until the mathematics is set."""
    page.wait_for_function("!window.MathJax || (window.MathJax.startup && window.MathJax.startup.promise)")
    page.evaluate("window.MathJax && MathJax.startup.promise.then(() => 0)")


def complaints(page):
    return [text for text in page.wrong if not any(noise in text for noise in THEME_NOISE)]


def test_the_checker_finds_what_it_is_for(tmp_path):
    (tmp_path / "a.html").write_text(
        '<article id="top"><a href="b.html">b</a><a href="#nowhere">c</a><img src="p.png"><p>{cite}`x`</p></article>'
        '<script src="https://cdn.example/x.js"></script>',
        "utf8",
    )
    (tmp_path / "p.png").write_bytes(bytes(check_html.MAX_BYTES))
    found = " ".join(check_html.problems(tmp_path))
    for word in (
        "dead link b.html",
        "no anchor #nowhere",
        "without alt text",
        "fetches https://cdn",
        "source text",
        "bytes",
    ):
        assert word in found


def test_every_page_follows_the_last_and_shows_its_mathematics(html, site, page):
    """From the first page by 'next' to the last: no error, no raw TeX, nothing wider than a phone."""
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(f"{site}/book/index.html")
    seen = []
    while True:
        settle(page)
        seen.append(page.url.removeprefix(f"{site}/"))
        assert complaints(page) == [], seen[-1]
        bad = page.evaluate("[...document.querySelectorAll('mjx-merror')].map(e => e.textContent)")
        assert bad == [], seen[-1]
        raw = page.evaluate(
            "[...document.querySelectorAll('article .math')].filter(e => !e.querySelector('mjx-container'))"
            ".map(e => e.textContent.trim().slice(0, 60))"
        )
        assert raw == [], seen[-1]
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, seen[-1]
        following = page.query_selector("a.right-next")
        if following is None:
            break
        page.goto(following.evaluate("e => e.href"))
    pages = {str(p.relative_to(html)) for p in (html / "book").glob("*.html")}
    assert set(seen) == pages and len(seen) == len(pages)


SHARES = """() => {
    const height = (e) => e.getBoundingClientRect().height;
    const inView = (e) => !e.closest("details:not([open])");
    const code = [...document.querySelectorAll("article div.cell_input")].filter(inView);
    return code.reduce((sum, e) => sum + height(e), 0) / height(document.querySelector("article"));
}"""


@pytest.mark.parametrize("part", ["Theory", "Build", "Results", "Pixels", "Apply"])
def test_code_in_view_takes_its_share_of_a_page_and_no_more(site, browser, part):
    """A quarter of the height, in the chapters that build the model about a third."""
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text("utf8"))["parts"]
    (files,) = [[c["file"] for c in p["chapters"]] for p in parts if p["caption"] == part]
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    shares = {}
    for file in files:
        page.goto(f"{site}/{file}.html")
        settle(page)
        shares[file] = round(page.evaluate(SHARES), 2)
    context.close()
    most = {file: 0.35 if part == "Build" or "pixel_network" in file else 0.25 for file in files}
    assert {file: share for file, share in shares.items() if share > most[file]} == {}


def test_a_check_is_one_line_that_opens_to_its_code(site, page):
    page.goto(f"{site}/book/forward.html")
    checks = page.query_selector_all("details.check")
    assert len(checks) >= 3
    for check in checks:
        closed = check.bounding_box()["height"]
        assert check.query_selector("summary").inner_text().startswith("checked ")
        check.query_selector("summary").click()
        assert check.bounding_box()["height"] > closed + 20


def test_a_term_shows_its_definition_to_the_pointer_and_to_the_keyboard(site, page):
    page.goto(f"{site}/book/bound.html")
    term = page.query_selector("article a.term")
    term.hover()
    assert len(page.inner_text(".definition")) > 20
    page.mouse.move(0, 0)
    assert page.query_selector(".definition") is None
    term.focus()
    assert len(page.inner_text(".definition")) > 20
    page.keyboard.press("Escape")
    assert page.query_selector(".definition") is None


def test_an_equation_knows_where_it_is_used_and_the_way_back(site, page):
    page.goto(f"{site}/book/bound.html")
    user = page.query_selector(".used-in a")
    page.goto(user.evaluate("e => e.href"))
    back = page.query_selector("article a.equation-link[href*='bound.html#eq-4-']")
    page.goto(back.evaluate("e => e.href"))
    assert page.evaluate("document.querySelector(location.hash).textContent.includes('=')")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_figures_take_the_colours_of_the_theme_and_text_its_contrast(site, browser, theme):
    context = browser.new_context(color_scheme=theme, viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto(f"{site}/book/forward.html")
    settle(page)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = page.evaluate("getComputedStyle(document.querySelector('article p')).color")
    luminance = [sum(map(float, c[c.index("(") + 1 : -1].split(",")[:3])) / 765 for c in (ground, ink)]
    assert abs(luminance[0] - luminance[1]) > 0.5
    assert (luminance[0] < 0.5) == (theme == "dark")
    figures = page.query_selector_all("article svg.figure")
    assert figures and page.query_selector_all("article .cell_output img:not(.moving-still)") == []
    assert all(f.evaluate("e => getComputedStyle(e).color") == ink and f.get_attribute("aria-label") for f in figures)
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    context.close()


def test_a_search_for_snr_finds_the_chapter_on_schedules(site, page):
    page.goto(f"{site}/search.html?q=SNR")
    page.wait_for_selector("#search-results li a", timeout=20_000)
    page.wait_for_timeout(1000)
    links = page.eval_on_selector_all("#search-results li a", "e => e.map(a => a.getAttribute('href'))")
    assert any("schedules.html" in link for link in links[:5]), links[:10]
    assert complaints(page) == []


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_figures_that_move_come_to_life_on_their_pages(html, site, browser, theme, width):
    """Each is built from its data, is no wider than the screen, and hides its still picture, which print shows."""
    context = browser.new_context(color_scheme=theme, viewport={"width": width, "height": 844}, reduced_motion="reduce")
    page = context.new_page()
    pages = [p for p in (html / "book").glob("*.html") if 'data-moving="' in p.read_text("utf8")]
    assert pages
    for path in pages:
        page.goto(f"{site}/book/{path.name}")
        page.wait_for_function("[...document.querySelectorAll('.moving')].every(e => e.matches('.moving-on'))")
        wide = "[...document.querySelectorAll('.moving-live')].map(e => e.getBoundingClientRect().right)"
        assert max(page.evaluate(wide)) <= width, path.name
        assert not page.locator(".moving-still").first.is_visible()
        ink, ground = page.evaluate(
            "[getComputedStyle(document.querySelector('.moving-title')).color,"
            " getComputedStyle(document.body).backgroundColor]"
        )
        luminance = [sum(map(float, c[c.index("(") + 1 : -1].split(",")[:3])) / 765 for c in (ink, ground)]
        assert abs(luminance[0] - luminance[1]) > 0.5, path.name
    page.emulate_media(media="print")
    assert page.locator(".moving-still").first.is_visible()
    context.close()


# --- The model of the start page -----------------------------------------------------------------------------------


def test_the_model_in_the_browser_says_what_jax_says(site, page):
    import jax.numpy as jnp
    import numpy as np

    import medvdm

    model = medvdm.pretrained("phantom").model
    z = np.random.default_rng(0).standard_normal((1, 64, 64, 1), np.float32)
    gammas = [5.0, 1.0, -3.0, -8.0, -12.5]
    expected = [np.asarray(model.x_hat(jnp.asarray(z), jnp.full(1, g), model.embed(None))).ravel() for g in gammas]
    page.goto(f"{site}/book/index.html")
    page.add_script_tag(url=f"{site}/_static/model/unet.js")
    found = page.evaluate(
        """async ([z, gammas]) => {
            const model = await medvdmModel.load("../_static/model");
            return gammas.map((gamma) => Array.from(medvdmModel.expected(model, Float32Array.from(z), gamma)));
        }""",
        [z.ravel().tolist(), gammas],
    )
    np.testing.assert_allclose(found, expected, atol=1e-3)


#: The same noise at every visit: an X-ray of its own has anything where the test looks.
SEEDED = "let drawn = 1; Math.random = () => (drawn = (drawn * 16807) % 2147483647) / 2147483647;"


def test_the_start_page_draws_an_x_ray(site, page):
    page.add_init_script(SEEDED)
    page.goto(f"{site}/book/index.html")
    page.click(".draw-button")
    page.wait_for_selector(".draw-button:enabled", timeout=120_000)
    assert page.inner_text(".draw-button") == "Draw another" and "Synthetic" in page.inner_text(".draw-said")
    pixels = page.evaluate(
        "Array.from(document.querySelector('.draw .moving-picture:last-child canvas').getContext('2d')"
        ".getImageData(0, 0, 64, 64).data).filter((_, i) => i % 4 === 0)"
    )
    picture = np.reshape(pixels, (64, 64)).astype(float)
    spine, lungs = picture[20:36, 30:34].mean(), [picture[20:36, 14:20].mean(), picture[20:36, 44:50].mean()]
    assert picture.min() < 60 < 140 < picture.max() and spine > max(lungs) + 20
    assert complaints(page) == []
