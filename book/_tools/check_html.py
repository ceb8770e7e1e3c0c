"""Check the built pages: python book/_tools/check_html.py [_build/html]

Finds what Sphinx does not: dead links and anchors, pictures without alt text, anything that a browser would fetch from
another host, roles that stayed source text, and pages that are too heavy.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup, Tag

MAX_BYTES = 1_500_000  # of a page with its pictures
FETCHED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}
NOT_FETCHED = {"canonical", "alternate", "author", "license", "next", "prev", "search", "index"}
RAW = re.compile(r"\{[a-z]+(?::[a-z]+)?\}`|\|\s*(?:-{3}|\u2014)|\\\\begin\{|\]\([\w-]+\.(?:md|ipynb)")


def problems(root: Path) -> list[str]:
    """What is wrong with the pages under a folder, one line each."""
    root = root.resolve()
    pages = [p for p in sorted(root.rglob("*.html")) if "_static" not in p.relative_to(root).parts]
    if not pages:
        return [f"{root}: no HTML pages"]
    return [f"{page.relative_to(root)}: {bad}" for page in pages for bad in _page_problems(page, root)]


def _page_problems(page: Path, root: Path) -> list[str]:
    soup, bad = _soup(page), []
    weight = page.stat().st_size
    for tag in soup.find_all(["a", *FETCHED]):
        url = tag.get(FETCHED.get(tag.name, "href"))
        if not url or url.startswith(("data:", "mailto:", "javascript:")):
            continue
        parts = urlsplit(url)
        if parts.scheme or parts.netloc:
            if tag.name in FETCHED and not NOT_FETCHED & set(tag.get("rel") or ()):
                bad.append(f"fetches {url}")
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        if target.is_dir():
            target /= "index.html"
        if not target.is_file():
            bad.append(f"dead link {url}")
        elif parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in _anchors(target):
            bad.append(f"no anchor {url}")
        elif tag.name == "img":
            weight += target.stat().st_size
    article = soup.find("article") or soup
    bad += [f"picture without alt text: {img['src'][:60]}" for img in article.find_all("img") if not _has_alt(img)]
    for code in article.find_all(["pre", "code", "script"]):
        code.extract()
    bad += [f"source text on the page: {match}" for match in RAW.findall(article.get_text())]
    if weight > MAX_BYTES:
        bad.append(f"{weight:,} bytes with its pictures; expected at most {MAX_BYTES:,}")
    return bad


def _has_alt(img: Tag) -> bool:
    alt = (img.get("alt") or "").strip()
    return len(alt) > 8 and not re.search(r"\.(png|svg|jpe?g)$", alt)


def _soup(page: Path) -> BeautifulSoup:
    return BeautifulSoup(page.read_text("utf8"), "html.parser")


@cache
def _anchors(page: Path) -> frozenset[str]:
    return frozenset(re.findall(r'\s(?:id|name)="([^"]+)"', page.read_text("utf8")))


if __name__ == "__main__":
    found = problems(Path(sys.argv[1] if len(sys.argv) > 1 else "_build/html"))
    print("\n".join(found) or "pages ok")
    sys.exit(bool(found))
