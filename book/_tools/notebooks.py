"""Chapters: text notebooks that people edit (book/text/*.md) into executed notebooks that people read (book/*.ipynb).

    python book/_tools/notebooks.py run [NAME ...]   execute chapters and write their notebooks, with outputs
    python book/_tools/notebooks.py prose [NAME ...] take over changes of the prose, where no code has changed
    python book/_tools/notebooks.py check            prove that every stored output belongs to its cells and library
    python book/_tools/notebooks.py due              the notebooks that `make test` runs: not proven fresh, or quick
    python book/_tools/notebooks.py others           the notebooks that only `make test-all` runs

A stored output is fresh if three things are as they were when it was made: the code of the cells, the modules of
``medvdm`` that the chapter loaded, and the recorded results that it read. Comments and docstrings of the library do
not count. Running twice gives the same bytes, so a diff shows what changed.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import io
import os
import re
import subprocess
import sys
import time
import tokenize
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import yaml
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
TEXT = BOOK / "text"
RECORDS = re.compile(r"results/[\w.-]+")

QUICK = ("cost", "floor", "index")  # these take seconds, and `make test` runs them always
AT_A_TIME = 2
CELL_SECONDS = 900  # generous: nbval holds the limit in `make test`
KEPT_METADATA = ("tags", "mystnb")
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
LOADED = "import sys; print(*sorted(m for m in sys.modules if m.split('.')[0] == 'medvdm'))"
PRETRAINED = re.compile(r"medvdm\.pretrained\(\"(\w+)\"\)")  # its record holds the hash of its weights
MOVING = re.compile(r'<div class="moving" data-moving="[a-z]+"><img class="moving-still" src="[^"]+" alt="([^"]*)">')
MOVING_BYTES = 200_000  # of one figure that moves: its picture and its data
SETUP = """\
# On Colab: get the library and the book's records. Elsewhere: nothing to do.
import sys

if "google.colab" in sys.modules:
    !git clone -q --depth 1 {url} medvdm-book
    %cd medvdm-book/book
    %pip install -q ..
"""


# --- What an output depends on ------------------------------------------------------------------------------------


def code_hash(nb: Any) -> str:
    """A hash of the code cells and their tags."""
    parts = [f"{sorted(c.metadata.get('tags', []))}\n{c.source.strip()}" for c in nb.cells if c.cell_type == "code"]
    return _hash("\0".join(parts))


def library_hashes(modules: list[str]) -> dict[str, str]:
    """A hash of the code of each module of the library; a module that is gone has none."""
    out = {}
    for module in modules:
        path = ROOT.joinpath(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        out[module] = _hash(bare_code(path.read_text("utf8"))) if path.exists() else ""
    return out


def record_hashes(nb: Any) -> dict[str, str]:
    """A hash of each recorded result, and of the record of each packed model, that the chapter's code names."""
    code = "\n".join(c.source for c in nb.cells if c.cell_type == "code")
    models = [f"../medvdm/pretrained/{name}/config.json" for name in PRETRAINED.findall(code)]
    names = sorted({*RECORDS.findall(code), *models})
    return {name: _hash((BOOK / name).read_bytes()) if (BOOK / name).is_file() else "" for name in names}


def belongings(nb: Any, modules: list[str]) -> dict[str, Any]:
    """All three, as the notebook stores them."""
    return {"code": code_hash(nb), "library": library_hashes(modules), "records": record_hashes(nb)}


def bare_code(source: str) -> str:
    """Python source without comments, docstrings and empty lines: the same text on every version of Python."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _hash(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:12]


# --- Making notebooks ---------------------------------------------------------------------------------------------


def read_text(path: Path) -> Any:
    """A text notebook with the setup cell in front of its first code cell."""
    nb = jupytext.read(path)
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf8"))
    setup = nbformat.v4.new_code_cell(SETUP.format(url=config["repository"]["url"]).rstrip())
    setup.metadata["tags"] = ["remove-cell"]
    first = next((i for i, c in enumerate(nb.cells) if c.cell_type == "code"), None)
    if first is not None:
        nb.cells.insert(first, setup)
    return nb


def tidy(path: Path) -> None:
    """Format the code cells of a text notebook in place, as `ruff format` formats notebooks."""
    text = path.read_text("utf8")
    for cell in jupytext.reads(text, fmt="md:myst").cells:
        if cell.cell_type == "code":
            neat = _ruff(
                _ruff(cell.source, "check", "--select", "I", "--fix", "--quiet"),
                "format",
            )
            text = text.replace(cell.source, neat.rstrip("\n"), 1)
    path.write_text(text, "utf8")


def _ruff(code: str, *command: str) -> str:
    ruff = [
        sys.executable,
        "-m",
        "ruff",
        *command,
        "--stdin-filename",
        str(BOOK / "cell.py"),
        "-",
    ]
    return subprocess.run(ruff, input=code, capture_output=True, text=True, check=True).stdout


def run(path: Path) -> float:
    """Execute a chapter, write its notebook, and return the seconds that it took.

    Raises:
        CellExecutionError: a cell failed; nothing is written.
    """
    tidy(path)
    nb = read_text(path)
    nb.metadata["kernelspec"] = KERNEL
    client = NotebookClient(
        nb,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(BOOK)}},
    )
    start = time.perf_counter()
    with client.setup_kernel():
        for index, cell in enumerate(nb.cells):
            client.execute_cell(cell, index)
        seconds = time.perf_counter() - start
        probe = nbformat.v4.new_code_cell(LOADED)
        nb.cells.append(probe)
        client.execute_cell(probe, len(nb.cells) - 1)
        nb.cells.pop()
    modules = probe.outputs[0].text.split() if probe.outputs else []
    for number, cell in enumerate((c for c in nb.cells if c.cell_type == "code"), 1):
        cell.outputs = _clean(cell.outputs, number)  # once: to reduce a picture's colours again would change it
    write(nb, path.stem, belongings(nb, modules))
    return seconds


def prose(path: Path) -> None:
    """Take over the words, captions and alt texts of a text notebook; code and outputs stay as they are stored.

    Raises:
        ValueError: the code is not that of the stored notebook, or there is none.
    """
    stored = BOOK / f"{path.stem}.ipynb"
    nb, old = read_text(path), nbformat.read(stored, 4) if stored.exists() else nbformat.v4.new_notebook()
    if code_hash(nb) != old.metadata.get("medvdm", {}).get("code"):
        raise ValueError(f"{path.stem}: its code has changed; run: make notebooks NAMES={path.stem}")
    outputs = [cell.outputs for cell in old.cells if cell.cell_type == "code"]
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = outputs.pop(0)
    write(nb, path.stem, old.metadata["medvdm"])  # what the outputs belong to is what it was


def write(nb: Any, name: str, belongs_to: dict[str, Any]) -> None:
    """Write the notebook, and what its outputs belong to, in a form that depends on nothing but its content."""
    count, seen = 0, {}
    for cell in nb.cells:
        cell["id"] = _cell_id(name, cell, seen)
        cell.metadata = {k: v for k, v in cell.metadata.items() if k in KEPT_METADATA}
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
    nb.metadata = nbformat.from_dict(
        {
            "kernelspec": KERNEL,
            "language_info": {"name": "python"},
            "medvdm": belongs_to,
        }
    )
    nb.nbformat, nb.nbformat_minor = 4, 5
    nbformat.write(nb, BOOK / f"{name}.ipynb")


def _cell_id(name: str, cell: Any, seen: dict[str, int]) -> str:
    """Unique over the book, and unmoved when another cell is inserted."""
    key = f"{name}\0{cell.cell_type}\0{cell.source}"
    seen[key] = seen.get(key, 0) + 1
    return _hash(f"{key}\0{seen[key]}")


def _clean(outputs: list[Any], count: int) -> list[Any]:
    """Without stderr, streams joined, figures small; addresses of objects gone."""
    kept: list[Any] = []
    for output in outputs:
        if output.output_type == "stream":
            if output.name == "stderr":
                continue
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
                continue
        if "execution_count" in output:
            output.execution_count = count
        data = output.get("data", {})
        if "metadata" in output:
            output.metadata = {}
        if "image/png" in data:
            data["image/png"] = _small_png(data["image/png"])
        if "image/svg+xml" in data:
            data["image/svg+xml"] = _small_svg(data["image/svg+xml"])
        if _is_figure(data):
            data.pop("text/plain", None)
        kept.append(output)
    return kept


def _is_figure(data: dict[str, Any]) -> bool:
    return "image/png" in data or "image/svg+xml" in data


def _small_png(encoded: str) -> str:
    """At most 256 colours: exact for gray images, and a third of the size for curves."""
    image = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGBA")
    clear = image.getextrema()[3][0] < 255
    kind = "LA" if clear else "L"
    if image.convert(kind).convert("RGBA").tobytes() == image.tobytes():
        image = image.convert(kind)
    else:  # of the methods of quantisation, one keeps what is transparent
        method = Image.Quantize.FASTOCTREE if clear else Image.Quantize.MEDIANCUT
        image = image.convert("RGBA" if clear else "RGB").quantize(256, method, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _small_svg(svg: str) -> str:
    """Coordinates to a hundredth of a point, one line per element, and small pictures within."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    pictures = r"(data:image/png;base64,)([A-Za-z0-9+/=\s]+)"
    svg = re.sub(pictures, lambda m: m[1] + _small_png("".join(m[2].split())), svg)
    rounded = re.compile(r"-?\d+\.\d{3,}")
    coordinates = r'(?<= d=")[^"]*|(?<= [xy]=")[^"]*|(?<=translate\()[^)]*'
    svg = re.sub(coordinates, lambda m: rounded.sub(_hundredths, " ".join(m[0].split())), svg)
    return re.sub(r"\n\s*", "\n", svg)


def _hundredths(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


# --- Checking -----------------------------------------------------------------------------------------------------


def problems(name: str) -> list[str]:
    """What is wrong with a chapter's stored notebook; nothing if it is fresh and fit to be read."""
    return malformed(name) or outdated(name)


def outdated(name: str) -> list[str]:
    """The modules of the library and the records that have changed since the stored outputs were made."""
    notebook = BOOK / f"{name}.ipynb"
    nb = nbformat.read(notebook, 4)
    stored = nb.metadata.get("medvdm", {})
    library, records = stored.get("library", {}), stored.get("records", {})
    changed = [m for m, now in library_hashes(list(library)).items() if now != library[m]]
    changed += [r for r, now in record_hashes(nb).items() if now != records.get(r)]
    redo = f"run: make notebooks NAMES={name}"
    return [f"{notebook.name}: outputs are older than {', '.join(changed)}; {redo}"] if changed else []


def malformed(name: str) -> list[str]:
    """What is wrong with a chapter's stored notebook, whether or not the library has changed since."""
    notebook, text = BOOK / f"{name}.ipynb", TEXT / f"{name}.md"
    if not text.exists():
        return [f"{notebook.name}: has no source {text.relative_to(ROOT)}"]
    redo = f"run: make notebooks NAMES={name}"
    if not notebook.exists():
        return [f"{text.relative_to(ROOT)}: was never executed; {redo}"]
    nb, source = nbformat.read(notebook, 4), read_text(text)
    nbformat.validate(nb)
    bad = []
    if [_content(c) for c in nb.cells] != [_content(c) for c in source.cells]:
        bad.append(f"differs from {text.relative_to(ROOT)}; {redo}")
    stored = nb.metadata.get("medvdm", {})
    if stored.get("code") != code_hash(nb):
        bad.append(f"outputs belong to other cells; {redo}")
    executed = 0
    for cell in nb.cells:
        if cell.cell_type == "code":
            executed += 1
            bad += [f"cell {executed}: {problem}" for problem in _cell_problems(cell, executed)]
    if notebook.stat().st_size > 1_500_000:
        bad.append(f"{notebook.stat().st_size:,} bytes; expected at most 1,500,000")
    return [f"{notebook.name}: {problem}" for problem in bad]


def _cell_problems(cell: Any, number: int) -> list[str]:
    bad = []
    tags, figure = cell.metadata.get("tags", []), cell.metadata.get("mystnb", {})
    if cell.execution_count != number:
        bad.append("was not executed in order, so nbval would not check it")
    if "nbval-check-output" in tags and not cell.outputs:
        bad.append("is to be checked but has no output")
    printed = "".join(o.get("text", "") for o in cell.outputs if o.output_type == "stream")
    if "check" in tags and not re.fullmatch(r"checked: .+\n", printed):
        bad.append("is tagged check; expected one printed line, 'checked: ...'")
    if len(cell.outputs) > 1 and any(_is_figure(o.get("data", {})) or _moving(o) for o in cell.outputs):
        bad.append("prints and draws; expected one output in a cell with a figure")
    for output in cell.outputs:
        if output.output_type == "error" and "raises-exception" not in tags:
            bad.append("holds an error")
        if _is_figure(output.get("data", {})):
            if not figure.get("image", {}).get("alt"):
                bad.append("has a figure without alt text")
            if not figure.get("figure", {}).get("caption"):
                bad.append("has a figure without a caption")
        if _moving(output):
            markup = output.data["text/html"]
            found = MOVING.match(markup)
            if found is None or len(found[1].strip()) < 10:
                bad.append("has a figure that moves without a picture, or without alt text")
            if not figure.get("figure", {}).get("caption"):
                bad.append("has a figure that moves without a caption")
            if len(markup) > MOVING_BYTES:
                bad.append(f"has a figure that moves of {len(markup):,} bytes; expected at most {MOVING_BYTES:,}")
            kind = re.search(r'data-moving="([^"]*)"', markup)
            if kind is None or not (BOOK / "_static" / "moving" / f"{kind[1]}.js").exists():
                bad.append("has a figure that moves and no script in book/_static/moving")
    return bad


def _moving(output: Any) -> bool:
    """Whether an output is a figure that moves, as medvdm.notebook.interactive makes it."""
    return 'class="moving"' in output.get("data", {}).get("text/html", "")


def _content(cell: Any) -> tuple[Any, ...]:
    metadata = {k: v for k, v in cell.metadata.items() if k in KEPT_METADATA}
    return cell.cell_type, cell.source.strip(), metadata


def chapters() -> list[str]:
    """The names of all chapters, from their sources and their notebooks."""
    return sorted({p.stem for p in TEXT.glob("*.md")} | {p.stem for p in BOOK.glob("*.ipynb")})


def due() -> list[str]:
    """The chapters whose stored outputs are not proven fresh, and the quick ones."""
    return [name for name in chapters() if name in QUICK or problems(name)]


def attempt(name: str) -> tuple[float, str]:
    """Execute a chapter: its seconds, and what failed."""
    try:
        return run(TEXT / f"{name}.md"), ""
    except (CellExecutionError, CellTimeoutError) as problem:
        return 0.0, str(problem)


def stated_seconds(name: str) -> int:
    """The seconds that a chapter's page says it takes; 0 where it says nothing."""
    said = re.search(r"running about (\d+|a minute)", (TEXT / f"{name}.md").read_text("utf8"))
    return 0 if said is None else 60 if said[1] == "a minute" else int(said[1])


def run_all(names: list[str]) -> int:
    """Execute chapters, two at a time and long ones first, and print the seconds of each beside those on its page."""
    start, total = time.perf_counter(), 0.0
    names = sorted(names, key=stated_seconds, reverse=True)
    with ProcessPoolExecutor(AT_A_TIME) as pool:
        for name, (seconds, failed) in zip(names, pool.map(attempt, names), strict=True):
            if failed:
                print(f"{name}: failed\n{failed}", file=sys.stderr)
                pool.shutdown(cancel_futures=True)
                return 1
            total += seconds
            print(f"{name}: {seconds:.0f} s, stated {stated_seconds(name)} s", flush=True)
    print(f"{len(names)} chapters: {total:.0f} s, {time.perf_counter() - start:.0f} s at {AT_A_TIME} at a time")
    return 0


def main(arguments: list[str]) -> int:
    if arguments[:1] in (["run"], ["prose"]):
        os.environ.pop("MEDVDM_DATA_DIR", None)  # a stored output never holds an image of a data set
        names = arguments[1:] or chapters()
        unknown = sorted(set(names) - set(chapters()))
        if unknown:
            print(f"error: {', '.join(unknown)}: no such chapter; there are {', '.join(chapters())}", file=sys.stderr)
            return 2
        if arguments[0] == "run":
            return run_all(names)
        for name in names:
            try:
                prose(TEXT / f"{name}.md")
            except ValueError as problem:
                print(f"{name}: failed\n{problem}", file=sys.stderr)
                return 1
        return 0
    if arguments == ["check"]:
        bad = [problem for name in chapters() for problem in problems(name)]
        print("\n".join(bad) or f"{len(chapters())} chapters are fresh")
        return int(bool(bad))
    if arguments in (["due"], ["others"]):
        chosen = set(due()) if arguments == ["due"] else set(chapters()) - set(due())
        print(*(f"book/{name}.ipynb" for name in sorted(chosen) if (BOOK / f"{name}.ipynb").exists()))
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
