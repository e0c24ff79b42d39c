"""The blocks of code of the repository's Markdown files, and the commands among them."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "examples/**/*.md")
    for path in ROOT.glob(pattern)
)
#: Languages of blocks that are run, by test_python_blocks.py and test_shell_blocks.py.
RUN = ("python", "sh")
#: And of those that are not, with the reason.
NOT_RUN = {
    "text": "a list, a formula or a drawing",
    "bibtex": "a citation",
    "json": "part of a file that is written by the package, and compared there",
    "cmake": "python_tests/export builds programs with it",
    "cpp": "python_tests/export builds programs with it",
    "{eval-rst}": "Sphinx reads it: test_site.py builds the site",
}


class Block(NamedTuple):
    """A block of code: its page, the number of its first line, its language ("" without) and its text."""

    page: str
    line: int
    language: str
    text: str


class Command(NamedTuple):
    """A command of a shell block, which is run, or of the text between blocks."""

    page: str
    line: int
    words: tuple[str, ...]
    in_block: bool

    def __str__(self) -> str:
        return shlex.join(self.words)

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def _tokens(page: str) -> list:
    return MarkdownIt("commonmark").parse((ROOT / page).read_text(encoding="utf-8"))


def blocks(page: str) -> list[Block]:
    """The blocks of a page, fenced or indented, in order."""
    found = []
    for token in _tokens(page):
        if token.type in ("fence", "code_block"):
            line = token.map[0] + (2 if token.type == "fence" else 1)
            found.append(Block(page, line, token.info.strip(), token.content))
    return found


def commands(page: str) -> list[Command]:
    """The commands of a page's shell blocks, and those of ours that its text names, such as `make test`."""
    found = []
    for block in blocks(page):
        if block.language == "sh":
            found += [Command(page, line, words, True) for line, words in split(block.text, block.line)]
    for token in _tokens(page):
        for code in (child.content for child in token.children or () if child.type == "code_inline"):
            if re.match(r"(evit|make) [a-z]", code):
                found += [Command(page, token.map[0] + 1, words, False) for _, words in split(code, 1)]
    return found


def split(text: str, first_line: int) -> list[tuple[int, tuple[str, ...]]]:
    """Split shell text into its commands, as words, with the lines at which they begin."""
    found = []
    lines = iter(enumerate(text.splitlines(), start=first_line))
    for number, line in lines:
        while line.endswith("\\"):
            line = line[:-1] + next(lines)[1]
        for part in line.split(" && "):
            words = tuple(shlex.split(part, comments=True))
            if words:
                found.append((number, words))
    return found
