"""Paths as users write them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from medvdm.errors import InputError
from medvdm.paths import local_path


def test_the_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/run", "out") == tmp_path / "run"
    assert local_path(Path("~/run"), "out") == tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    really = local_path("./~/run", "out")  # a folder that is really called so
    assert really == tmp_path / "~" / "run" and local_path(really, "out") == really


@pytest.mark.parametrize("path", [".", "a", "/a/b/", "a b", "ü/日本", "a:b", "-x", "c:/run", "../a", "a~", "caf\udce9"])
def test_paths_stay_what_they_are(path: str) -> None:
    assert local_path(path, "out") == Path(path)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("", "out: ''; expected a path"),
        ("gs://bucket/run", "'gs://bucket/run' is a URL"),
        (Path("s3://bucket/run"), "'s3:/bucket/run' is a URL"),
        ("file:///tmp/run", "is a URL"),
        ("hf+x.y://run", "is a URL"),
        ("~nobody-is-called-so/run", "no such user"),
        ("a\nb", r"'a\nb'; expected a path without control characters"),
        ("a\x00b", r"'a\x00b'"),
    ],
)
def test_what_is_no_path_is_refused_in_one_line(path: str | Path, found: str) -> None:
    with pytest.raises(InputError, match=re.escape(found)) as caught:
        local_path(path, "out")
    assert str(caught.value).startswith("out: ") and "\n" not in str(caught.value)
