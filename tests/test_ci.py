"""What `make test` may skip, only what has passed on the very same tree; and what `make` installs."""

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

SCRIPT = Path(__file__).parents[1] / ".ci" / "once.py"


@pytest.fixture
def once(tmp_path, monkeypatch):
    """``once.py`` at work in another repository; a call returns the exit code, and says whether the command ran."""
    spec = importlib.util.spec_from_file_location("once", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text(".pytest_cache\nran\n", "utf8")
    (tmp_path / "a.py").write_text("1", "utf8")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "PASSED", tmp_path / ".pytest_cache" / "passed")
    monkeypatch.delenv("FRESH", raising=False)
    monkeypatch.setenv("MEDVDM_ONCE", "1")

    def call(code="", *options):
        ran = tmp_path / "ran"
        ran.unlink(missing_ok=True)
        script = f"open('ran', 'w').close()\n{code}"
        monkeypatch.setattr(sys, "argv", ["once.py", "library", *options, "--", sys.executable, "-c", script])
        return module.main(), ran.exists()

    return call


def test_what_passed_is_not_run_again_on_the_same_tree(once, capfd):
    assert once() == (0, True)
    assert once() == (0, False)
    assert "Unchanged since library passed" in capfd.readouterr().out


@pytest.mark.parametrize("change", ["edit", "add", "remove", "setting", "fresh"])
def test_whatever_the_outcome_may_depend_on_runs_it_again(once, tmp_path, monkeypatch, change):
    assert once() == (0, True)
    if change == "edit":
        (tmp_path / "a.py").write_text("2", "utf8")
    elif change == "add":
        (tmp_path / "b.py").write_text("1", "utf8")
    elif change == "remove":
        (tmp_path / "a.py").unlink()
    elif change == "setting":
        monkeypatch.setenv("MEDVDM_ONCE", "2")
    else:
        monkeypatch.setenv("FRESH", "1")
    assert once() == (0, True)


def test_a_failure_and_an_edit_on_the_way_are_not_remembered(once):
    assert once("raise SystemExit(3)") == (3, True)
    assert once("open('a.py', 'a').write('2')") == (0, True)
    assert once() == (0, True)
    assert once("raise SystemExit(3)") == (0, False)  # passed before on this tree


def test_a_product_that_is_gone_is_made_again(once, tmp_path):
    assert once("", "--needs", str(tmp_path / "a.py")) == (0, True)
    assert once("", "--needs", str(tmp_path / "a.py")) == (0, False)
    assert once("", "--needs", str(tmp_path / "page.html")) == (0, True)


def test_without_git_nothing_is_skipped(once, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    assert once() == (0, True)
    assert once() == (0, True)


def test_the_tested_versions_install_on_the_least_python():
    """Systems ship Python 3.11 of any patch level (Debian 12: 3.11.2), and packages can ask for a later one."""
    lines = (SCRIPT.parent / "constraints.txt").read_text("utf8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    asks = {}
    for name, version in pinned.items():
        found = importlib.metadata.distribution(name)  # installed, since make installs what it pins
        assert found.version == version, name
        asks[name] = found.metadata["Requires-Python"] or ""
    assert [name for name, wanted in asks.items() if "3.11.0" not in SpecifierSet(wanted)] == []
