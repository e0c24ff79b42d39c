"""The site that `make docs` builds: strict, whole, and without a request to anywhere."""

from __future__ import annotations

import functools
import http.server
import importlib
import importlib.util
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest
from browser import Browser, find_browser
from documents import ROOT

PACKAGES = ("", ".models", ".ops", ".towers", ".training", ".export", ".visualize", ".benchmark", ".data")
#: Where a page names something that a browser fetches by itself.
FETCHED = {("script", "src"), ("img", "src"), ("link", "href"), ("source", "src"), ("iframe", "src")}

NEEDED = ("sphinx", "furo", "myst_parser", "sphinx_copybutton")
needs_sphinx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED),
    reason="the extra docs is not installed",
)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Page(HTMLParser):
    """What a page fetches, where it leads, and the anchors that it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if (tag, name) in FETCHED:
                self.fetched.append(value or "")
            elif tag == "a" and name == "href":
                self.links.append(value or "")
            elif name == "id":
                self.anchors.add(value or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as by `make docs`."""
    folder = tmp_path_factory.mktemp("docs")
    command = re.search(
        r"^docs: env\n\t\$\(BIN\)/python (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    assert command is not None
    arguments = command[1].replace("build/", f"{folder}/").split()
    run = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


@needs_sphinx
def test_links_lead_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    assert (site / "docs" / "use.html") in pages and (site / "CONTRIBUTING.html") in pages
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                broken.append(f"{path.relative_to(site)}: {link}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                broken.append(f"{path.relative_to(site)}: {link}: no such anchor")
    assert not broken, "\n".join(broken)


@needs_sphinx
def test_nothing_is_fetched_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    outside = [
        f"{path.name}: {url}" for path, page in pages.items() for url in page.fetched if urlsplit(url).netloc
    ]
    assert not outside
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), (
            sheet
        )


@needs_sphinx
@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_reference(pages: dict[Path, Page], package: str) -> None:
    anchors = set().union(*(page.anchors for page in pages.values()))
    name = f"evit_ext{package}"
    public = importlib.import_module(name).__all__
    # Modules have an anchor of their own.
    missing = [entry for entry in public if not {f"{name}.{entry}", f"module-{name}.{entry}"} & anchors]
    assert public and not missing


@needs_sphinx
def test_every_page_is_in_the_navigation() -> None:
    configuration = load(ROOT / "docs" / "conf.py")
    there = {path.relative_to(ROOT).with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    there |= {
        path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.glob("benchmarks/results/*.md")
    }
    shown = {page for pages in configuration.NAVIGATION.values() for page in pages} | {configuration.root_doc}
    assert there <= shown, f"docs/conf.py does not name {', '.join(sorted(there - shown))}"


def test_drawings_are_those_that_are_drawn() -> None:
    drawings = load(ROOT / "docs" / "images" / "draw.py").DRAWINGS
    for name, draw in drawings.items():
        file = ROOT / "docs" / "images" / f"{name}.svg"
        assert file.read_text(encoding="utf-8") == draw().svg(), f"{file}: run docs/images/draw.py"
    assert {path.stem for path in (ROOT / "docs" / "images").glob("*.svg")} == set(drawings)


def test_drawn_keys_are_those_of_the_kernels() -> None:
    """The keys of the drawing order as scores do, NaN left out."""
    order_key = load(ROOT / "docs" / "images" / "draw.py").order_key
    scores = [-float("inf"), -2.0, -0.5, 0.0, 1e-30, 0.3, 0.31, float("inf")]
    assert sorted(scores, key=order_key) == scores and order_key(-0.0) == order_key(0.0)


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """The address under which the site is served on this machine."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@needs_sphinx
@pytest.mark.skipif(find_browser() is None, reason="there is no Chromium or Chrome in the PATH")
def test_search_and_pages_need_no_network(site: Path, address: str) -> None:
    with Browser(site / "index.html") as browser:
        browser.wait("document.querySelector('h1') !== null")  # of the front page, to which index.html leads
        browser.js(f"location.href = '{address}/search.html?q=radix+selection'")
        browser.wait("document.querySelectorAll('#search-results li p').length > 0")
        assert "kernels.html" in browser.js("document.querySelector('#search-results').innerHTML")
        assert [problem for problem in browser.problems if address not in problem] == []
