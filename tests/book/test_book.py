"""The chapters as they are stored: fresh, complete, and in the form that readers are promised."""

import dataclasses
import importlib
import importlib.util
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import nbformat
import numpy as np
import pytest
import scipy.optimize
import yaml

ROOT = Path(__file__).parents[2]
BOOK = ROOT / "book"
sys.path.insert(0, str(BOOK / "_tools"))

import links  # noqa: E402
import notebooks  # noqa: E402
import record  # noqa: E402

from medvdm.data import DataConfig, load  # noqa: E402
from medvdm.runs import config as config_  # noqa: E402

CHAPTERS = notebooks.chapters()
PARTS = yaml.safe_load((ROOT / "_toc.yml").read_text("utf8"))["parts"]
NUMBERED = [c["file"].removeprefix("book/") for part in PARTS if part.get("numbered") for c in part["chapters"]]
RECORDS = sorted((BOOK / "results").glob("*.json"))


def text(name):
    return (BOOK / "text" / f"{name}.md").read_text("utf8")


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_stored_outputs_belong_to_the_cells(name):
    assert notebooks.malformed(name) == []


@pytest.mark.slow  # whoever edits the library runs the chapters that depend on it first; `make test` does that
@pytest.mark.parametrize("name", CHAPTERS)
def test_the_stored_outputs_belong_to_the_library_and_the_records(name):
    assert notebooks.outdated(name) == []


def test_every_page_is_in_the_table_of_contents():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text("utf8"))
    chapters = [c for part in toc["parts"] for c in part["chapters"]]
    listed = [toc["root"], *(c["file"] for chapter in chapters for c in (chapter, *chapter.get("sections", ())))]
    there = [f"book/{p.stem}" for p in BOOK.iterdir() if p.suffix in (".md", ".ipynb")]
    assert sorted(listed) == sorted(there)
    assert set(NUMBERED) < set(CHAPTERS)


@pytest.mark.parametrize("name", NUMBERED)
def test_a_chapter_has_its_question_cost_exercises_and_take_away(name):
    content = text(name)
    for part in ("**The question", "**Cost**", "**Needs**", "## Exercises", "## What to take away", "**Next**"):
        assert content.count(part) == 1, part
    assert re.search(r"running about .*\*\*Needs\*\*: (\[|nothing before it\.)", content)
    exercises = content.split("## Exercises")[1].split("## What to take away")[0]
    solutions = exercises.count("<summary>Solution") + exercises.count("hide-cell")
    numbered = re.findall(r"^(?:\*\*|### )(?:Exercise )?(\d+)", exercises, re.MULTILINE)
    assert numbered == [str(i + 1) for i in range(len(numbered))] and len(numbered) >= 3
    assert solutions >= len(numbered)
    assert re.search(r"^\*\*\d+\. Experiment: ", exercises, re.MULTILINE)  # change a number, and predict first


@pytest.mark.parametrize("name", NUMBERED)
def test_equations_are_numbered_by_chapter_in_order_and_references_exist(name):
    tags = re.findall(r"\\tag\{([\d.]+)\}", text(name))
    number = NUMBERED.index(name) + 1
    assert tags == [f"{number}.{i + 1}" for i in range(len(tags))]
    known = {tag for other in NUMBERED for tag in re.findall(r"\\tag\{([\d.]+)\}", text(other))}
    prose = re.sub(r"```.*?```|\$\$.*?\$\$|\$[^$]+\$|`[^`]+`", "", text(name), flags=re.DOTALL)
    for equation in links.REFERENCE.findall(prose):
        assert equation in known or equation.startswith("S."), f"equation ({equation}) is nowhere"


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_numbered_formula_of_several_lines_is_an_align(name):
    """Sphinx splits a formula between dollars at its line ends, where no number may stand."""
    formulas = re.findall(r"\$\$(.*?)\$\$", text(name), re.DOTALL)
    assert [formula for formula in formulas if r"\tag" in formula and "\\\\" in formula] == []


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_first_code_cell_gets_the_library_on_colab(name):
    nb = nbformat.read(BOOK / f"{name}.ipynb", 4)
    first = next(cell for cell in nb.cells if cell.cell_type == "code")
    url = yaml.safe_load((ROOT / "_config.yml").read_text("utf8"))["repository"]["url"]
    assert url in first.source and "remove-cell" in first.metadata.tags


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_names_the_records_that_it_reads_in_full(name):
    """Else a new record would not make its outputs stale."""
    assert re.findall(r"results/\{|[\"']results[\"'] *[/)]|results/[\"']", text(name)) == []


@pytest.mark.parametrize("page", ["README.md", "book/text/index.md", "book/reading.md", "book/cli.md"])
def test_the_address_is_that_of_the_settings(page):
    """It is set in _config.yml; Colab's address ends with it too."""
    url = yaml.safe_load((ROOT / "_config.yml").read_text("utf8"))["repository"]["url"]
    places = [url, url.replace("https://github.com", "https://colab.research.google.com/github")]
    name = url.rsplit("/", 2)[1]
    text_ = (ROOT / page).read_text("utf8")
    found = re.findall(rf"https?://[\w./-]*{name}/[\w.-]+", text_)
    assert found and all(any(address.startswith(place) for place in places) for address in found)


def test_chapters_have_outputs_that_nbval_compares():
    assert set(notebooks.QUICK) < set(CHAPTERS)
    for name in NUMBERED:
        nb = nbformat.read(BOOK / f"{name}.ipynb", 4)
        assert any("nbval-check-output" in c.metadata.get("tags", []) for c in nb.cells), name


def test_the_api_describes_every_module_once_and_its_references_exist():
    page = "\n".join(path.read_text("utf8") for path in BOOK.glob("api*.md"))
    described = re.findall(r"^\.\. automodule:: (\S+)$", page, re.MULTILINE)
    library = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for p in (ROOT / "medvdm").rglob("*.py")
        if p.name != "__main__.py" and (p.name != "__init__.py" or p.parent.name == "data")
    }
    assert len(described) == len(set(described)) and set(described) == library
    for path in [*BOOK.glob("*.md"), *(BOOK / "text").glob("*.md")]:
        for target in re.findall(r"\{py:\w+\}`~?([\w.]+)`", path.read_text("utf8")):
            home, name = target.rsplit(".", 1)
            assert hasattr(importlib.import_module(home), name), f"{path.name}: {target}"
            assert home == "medvdm.data" or getattr(importlib.import_module(home), name).__module__ == home, target


# --- The tool --------------------------------------------------------------------------------------------------------


def redirect(patch, folder):
    """Let the tool work in another repository."""
    for name, place in {"ROOT": "", "BOOK": "book", "TEXT": "book/text"}.items():
        patch.setattr(notebooks, name, folder / place)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A repository with a book of one chapter of one cell, executed."""
    root = tmp_path_factory.mktemp("executed")
    for folder in ("book/text", "book/results", "medvdm"):
        (root / folder).mkdir(parents=True)
    (root / "_config.yml").write_text((ROOT / "_config.yml").read_text("utf8"), "utf8")
    (root / "medvdm" / "errors.py").write_text('"""Doc."""\nA = 1\n', "utf8")
    (root / "book" / "results" / "r.json").write_text("1", "utf8")
    head = (notebooks.TEXT / "forward.md").read_text("utf8").split("# ")[0]
    (root / "book" / "text" / "one.md").write_text(
        head + "# One\n\n```{code-cell} ipython3\nprint(open('results/r.json').read())\n```\n", "utf8"
    )
    with pytest.MonkeyPatch.context() as patch:
        redirect(patch, root)
        notebooks.run(root / "book" / "text" / "one.md")
        nb = nbformat.read(root / "book" / "one.ipynb", 4)
        nb.metadata.medvdm["library"] = notebooks.library_hashes(["medvdm.errors"])
        nbformat.write(nb, root / "book" / "one.ipynb")
    return root


@pytest.fixture
def chapter(executed, tmp_path, monkeypatch):
    """A copy of that repository, to edit."""
    root = Path(shutil.copytree(executed, tmp_path / "repository"))
    redirect(monkeypatch, root)
    assert notebooks.problems("one") == []
    return root


def edit(path, old, new):
    path.write_text(path.read_text("utf8").replace(old, new), "utf8")


def test_running_twice_gives_the_same_bytes(chapter):
    before = (chapter / "book" / "one.ipynb").read_bytes()
    nb = nbformat.read(chapter / "book" / "one.ipynb", 4)
    notebooks.write(nb, "one", notebooks.belongings(nb, ["medvdm.errors"]))
    assert (chapter / "book" / "one.ipynb").read_bytes() == before


def test_a_comment_or_docstring_of_the_library_leaves_outputs_fresh(chapter):
    edit(chapter / "medvdm" / "errors.py", '"""Doc."""\nA = 1\n', '"""Another."""\n\nA = 1  # one\n')
    assert notebooks.problems("one") == []


@pytest.mark.parametrize(
    ("file", "old", "new", "word"),
    [
        ("medvdm/errors.py", "A = 1", "A = 2", "older than medvdm.errors"),
        ("book/results/r.json", "1", "2", "older than results/r.json"),
        ("book/text/one.md", "print(", "print(2, ", "differs from book/text/one.md"),
        ("book/text/one.md", "# One", "# Two", "differs from book/text/one.md"),
        ("book/one.ipynb", '"execution_count": 2', '"execution_count": null', "not executed in order"),
    ],
)
def test_every_way_to_be_stale_is_found(chapter, file, old, new, word):
    assert notebooks.due() == []
    edit(chapter / file, old, new)
    assert any(word in problem for problem in notebooks.problems("one"))
    assert notebooks.due() == ["one"]


def test_prose_is_taken_over_without_executing_and_code_is_not(chapter):
    path = chapter / "book" / "text" / "one.md"
    edit(path, "# One", "# Two")
    notebooks.prose(path)
    assert notebooks.problems("one") == []
    assert nbformat.read(chapter / "book" / "one.ipynb", 4).cells[-1].outputs[0].text == "1\n"
    edit(chapter / "book" / "results" / "r.json", "1", "2")
    notebooks.prose(path)
    assert "older than results/r.json" in notebooks.problems("one")[0]  # prose makes nothing fresh
    edit(path, "print(", "print(2, ")
    with pytest.raises(ValueError, match="its code has changed"):
        notebooks.prose(path)


def test_a_figure_needs_alt_text_and_a_caption(chapter):
    nb = nbformat.read(chapter / "book" / "one.ipynb", 4)
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    nb.cells[-1].outputs = [nbformat.v4.new_output("display_data", {"image/png": pixel})]
    nbformat.write(nb, chapter / "book" / "one.ipynb")
    found = " ".join(notebooks.problems("one"))
    assert "without alt text" in found and "without a caption" in found


def test_a_figure_that_moves_needs_a_picture_a_caption_and_a_script(chapter):
    nb = nbformat.read(chapter / "book" / "one.ipynb", 4)
    (chapter / "book" / "_static" / "moving").mkdir(parents=True)
    (chapter / "book" / "_static" / "moving" / "noise.js").write_text("")

    def found(kind="noise", alt="A line that falls", more=""):
        still = f'<img class="moving-still" src="data:," alt="{alt}">'
        html = f'<div class="moving" data-moving="{kind}">{still}<script>{{}}{more}</script></div>'
        nb.cells[-1].outputs = [nbformat.v4.new_output("execute_result", {"text/html": html}, execution_count=2)]
        nbformat.write(nb, chapter / "book" / "one.ipynb")
        return " ".join(notebooks.problems("one"))

    assert "moves without a caption" in found()
    head = "ipython3\n---\nmystnb:\n  figure: {caption: A line}\n---\n"
    edit(chapter / "book" / "text" / "one.md", "ipython3\nprint", f"{head}print")
    nb.cells[-1].metadata["mystnb"] = {"figure": {"caption": "A line"}}
    assert found() == ""
    assert "without alt text" in found(alt="")
    assert "no script" in found(kind="other")
    assert "bytes" in found(more="x" * notebooks.MOVING_BYTES)


def test_a_missing_source_or_notebook_is_named(chapter):
    (chapter / "book" / "one.ipynb").unlink()
    assert "was never executed" in notebooks.problems("one")[0]


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "passes"), [("2\n", True), ("3\n", False)])
def test_nbval_fails_where_a_checked_output_differs(tmp_path, stored, passes):
    cell = nbformat.v4.new_code_cell("print(1 + 1)", metadata={"tags": ["nbval-check-output"]}, execution_count=1)
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=stored)]
    nb = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": notebooks.KERNEL})
    nbformat.write(nb, tmp_path / "one.ipynb")
    flags = next(line for line in (ROOT / "Makefile").read_text("utf8").splitlines() if line.startswith("NBVAL"))
    command = [sys.executable, "-m", "pytest", "-q", *flags.split(":=")[1].split(), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode == 0) == passes, done.stdout


# --- With real images ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_data_chapter_shows_real_images_where_a_folder_is_given(real_data, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("MEDVDM_DATA_DIR", str(real_data))
    nb = notebooks.read_text(BOOK / "text" / "data.md")
    nb.cells.append(nbformat.v4.new_code_cell("print(images.name)"))
    NotebookClient(nb, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(BOOK)}}).execute()
    assert nb.cells[-1].outputs[0].text.strip() == "nih"


# --- Records of long runs --------------------------------------------------------------------------------------------


def entry_of(path):
    return json.loads(path.read_text("utf8"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_a_record_follows_the_schema_and_its_command_still_parses(path):
    entry = entry_of(path)
    jsonschema.validate(entry, record.SCHEMA)
    assert entry["name"] == path.stem
    config = config_.from_json(entry["config"], where=path.name)
    assert config.training.seed == entry["seed"]
    if entry["kind"] == "run":
        folder = "DIR" if "--data-dir" in entry["command"] else None
        told = record.parse_train(entry["command"])
        assert told.data == dataclasses.replace(config.data, data_dir=folder)
        assert told.training == config.training and told.conditional == config.conditional
        of_data = {"image_shape": config.model.image_shape, "classes": config.model.classes}
        assert dataclasses.replace(told.model, **of_data) == config.model
        assert record.train_command(dataclasses.replace(config, data=told.data)) == entry["command"]
        steps = [m["step"] for m in entry["metrics"]]
        assert steps == sorted(set(steps)) and steps[0] == 1 and steps[-1] == config.training.steps
    else:
        words = shlex.split(entry["command"])
        script = importlib.util.spec_from_file_location("script", ROOT / words[1])
        module = importlib.util.module_from_spec(script)
        script.loader.exec_module(module)
        module.parser().parse_args(words[2:])
    assert not re.search(r"/(home|work|tmp|Users)/", path.read_text("utf8"))


@pytest.mark.slow
@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_twenty_steps_on_the_phantom_give_the_losses_of_the_record(path):
    entry = entry_of(path)
    again = record.phantom_curve(config_.from_json(entry["config"], where=path.name))
    assert {**again, "vlb_bpd": None} == {**entry["phantom"], "vlb_bpd": None}
    # Another processor or optimisation level changes the last digits, and 20 steps at warm-up amplify them little.
    np.testing.assert_allclose(again["vlb_bpd"], entry["phantom"]["vlb_bpd"], rtol=1e-3)


FOLDERS = {"nih": "nih-chestxray8-256", "pneumoniamnist": "medmnist/pneumoniamnist.npz"}  # of the real data


@pytest.mark.parametrize("source", ["phantom", *FOLDERS])
def test_the_data_of_the_records_are_the_data_of_today(source, request):
    entries = [entry for entry in map(entry_of, RECORDS) if entry.get("data", {}).get("name") == source]
    by_settings: dict[DataConfig, set[str]] = {}  # the fingerprints of records that read the data in the same way
    for entry in entries:
        settings = config_.from_json(entry["config"], where=entry["name"]).data
        by_settings.setdefault(settings, set()).add(entry["data"]["fingerprint"])
    for settings, fingerprints in by_settings.items():
        folder = source != "phantom" and str(request.getfixturevalue("real_data") / FOLDERS[source])
        assert fingerprints == {load(dataclasses.replace(settings, data_dir=folder or None)).fingerprint()}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"seconds": 0}, "seconds"),
        ({"schema": 1}, "schema"),
        ({"command": "rm -rf"}, "command"),
        ({"phantom": {"image_size": 32, "batch_size": 1, "vlb_bpd": [1.0] * 19}}, "vlb_bpd"),
        ({"data_dir": "here"}, "data_dir"),
    ],
)
def test_the_schema_refuses(change, word):
    entry = {**entry_of(BOOK / "results" / "demo-phantom.json"), **change}
    with pytest.raises(jsonschema.ValidationError, match=word):
        jsonschema.validate(entry, record.SCHEMA)


def test_a_command_of_an_unknown_option_no_longer_parses():
    from medvdm.errors import InputError

    with pytest.raises(InputError, match="--latents"):
        record.parse_train("medvdm train --preset demo --latents 3 --out RUN")


# --- Numbers on plain pages, which no cell prints --------------------------------------------------------------------


def test_the_arithmetic_on_the_page_about_the_paper():
    page = (BOOK / "paper.md").read_text("utf8")
    nats = 0.0008 * 65_536 * math.log(2)
    errors = {f"{2 * nats / (64 * weight):.2f}" for weight in (0.9, 5 * math.expm1(0.9 / 5), 6)}
    latent = 5.740068e-5 * 65_536
    sigma2 = 1 / (1 + math.exp(-1))
    least = 32 * (sigma2 - 1 - math.log(sigma2))
    mean_square = (latent * math.log(2) - least) / 32 / (1 - sigma2)
    said = {*errors, f"{nats:.1f}", f"{0.0008 * 65_536:.1f}", f"= {0.0008 * 65_536 + latent:.0f}"}
    said |= {f"{latent:.2f}", f"{latent * math.log(2):.2f} nats", f"{least:.2f}", f"{2 * nats / 64:.2f}"}
    said |= {f"encodings of {mean_square:.2f}"}
    room = {end: 32 * math.log2(1 + mean_square * math.exp(-end)) for end in (0.1, -5.0)}  # (14.1)
    said |= {f"most {room[0.1]:.1f} bits for the printed range, and at most {room[-5.0]:.0f} for"}
    zero = 0.9 * 64 / 2  # nats of a network that always answers zero, on the printed range
    said |= {f"{zero:.1f} nats, or {zero / math.log(2) / 65_536:.5f} bits"}
    by_rounding = [
        [2 * b * 65_536 * math.log(2) / 64 / w for b in (0.00075, 0.00085)] for w in (0.9, 5 * math.expm1(0.18))
    ]
    said |= {f"between {low:.2f} and {high:.2f}" for low, high in by_rounding}
    said |= {f"2 \\cdot 36.3 / 64 = {2 * nats / 64:.2f}$ nats"}

    def prior(gamma):  # nats of 64 encodings that are all zero
        sigma2 = 1 / (1 + math.exp(-gamma))
        return 32 * (sigma2 - 1 - math.log(sigma2))

    least_gamma = scipy.optimize.brentq(lambda gamma: prior(gamma) - latent * math.log(2), -1, 1)
    said |= {f"{prior(-0.1):.2f} nats", f"{prior(-0.1) / math.log(2) / 65_536 * 1e4:.1f} \\cdot 10^{{-4}}$ bits"}
    said |= {f"$\\gamma_1$ is at least {least_gamma:.2f}", f"\\alpha_1^2 = {1 - sigma2:.2f}$"}
    said |= {f"noise variance of {1 / (1 + math.exp(-0.1)):.2f}"}
    assert [number for number in said if number not in page] == []
