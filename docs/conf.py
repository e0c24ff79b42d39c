"""The site: `make docs` builds it into build/site with Sphinx, from the Markdown files of the repository.

The source folder is the repository's root, so that a relative link, such as ../CONTRIBUTING.md, means the
same on the site and to whoever reads the files where they lie.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sphinx.util.nodes import make_refnode  # noqa: E402

import evit_ext  # noqa: E402

# The pages in the order of the sidebar; all that is on the site stands here. What is not there is left out.
NAVIGATION: dict[str, list[str]] = {
    "Use": [
        "docs/start",
        "docs/use",
        "docs/rules",
        "docs/other-code",
        "docs/vision-towers",
        "docs/supported-models",
        "docs/hub",
        "docs/questions",
    ],
    "Train": ["docs/training", "docs/scaling"],
    "Deploy": ["docs/export", "docs/cpp", "examples/cpp/README", "docs/visualize"],
    "How it works": ["docs/kernels", "docs/cuda-kernels"],
    "Figures": [
        "docs/study",
        "docs/benchmarks",
        "benchmarks/results/end-to-end-cpu",
        "benchmarks/results/engines-cpu",
        "benchmarks/results/onnx-runtime-cpu",
        "benchmarks/results/growth-cpu",
        "benchmarks/results/operators-cpu",
        "benchmarks/results/training-scaling-cpu",
        "benchmarks/results/rules-cpu",
        "benchmarks/results/real-weights-cpu",
        "benchmarks/results/fine-tuning-cpu",
        "benchmarks/results/attention-choice-cpu",
        "benchmarks/results/single-image-cpu",
        "benchmarks/results/vision-towers-cpu",
        "benchmarks/results/seam-cpu",
    ],
    "Python reference": [
        "docs/api/evit_ext",
        "docs/api/models",
        "docs/api/tokens",
        "docs/api/ops",
        "docs/api/training",
        "docs/api/towers",
        "docs/api/export",
        "docs/api/visualize",
        "docs/api/benchmark",
        "docs/api/data",
    ],
    "Project": ["CONTRIBUTING", "SECURITY", "CHANGELOG"],
}

project = "evit_ext"
author = "the authors of evit_ext"
version = release = evit_ext.__version__
root_doc = "docs/index"
source_suffix = {".md": "markdown"}
_pages = [page for pages in NAVIGATION.values() for page in pages if (ROOT / f"{page}.md").is_file()]
include_patterns = [f"{page}.md" for page in (root_doc, *_pages)]
# Looking for them is quick only where environments and builds are not searched.
_folders = {page.partition("/")[0] for page in _pages if "/" in page}
exclude_patterns = [name for name in os.listdir(ROOT) if (ROOT / name).is_dir() and name not in _folders]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_heading_anchors = 3
smartquotes = False  # -- is an option here, not a dash

# Docstrings: Google's sections, `name` for code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_use_rtype = False
napoleon_preprocess_types = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 90

# Strict: what is referred to must be there. Other packages are elsewhere, and no network is used to look.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(abc|collections|contextlib|numpy|os|pathlib|timm|torch|typing)\..*|Tensor"),
    ("py:class", r"(dict|tuple)\[.*|.*~typing.*"),  # parts of annotations
    ("py:class", r"evit_ext\..*\.(Model|Self)"),  # type variables
    ("py:class", r"evit_ext\.data\.listing\.Listing"),  # what Run hands on from checks, and nobody else makes
    ("py:class", r"evit_ext\._util\.overriding\.Override"),  # a base class
]

html_theme = "furo"
html_title = "evit_ext"
html_static_path = ["static"]
html_favicon = "static/icon.svg"
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"top_of_page_buttons": []}


def _add_navigation(app: Any, page: str, source: list[str]) -> None:
    """Append the sidebar to the front page: in the file itself it would be a block of no use to a reader."""
    if page != root_doc:
        return
    for caption, pages in NAVIGATION.items():
        names = "\n".join(f"/{name}" for name in pages if name in _pages)
        source[0] += f"\n\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{names}\n```\n"


def _find_by_last_name(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Resolve a reference by its last part, as objects are documented where they are public."""
    if node.get("refdomain") != "py":
        return None
    objects = env.get_domain("py").objects.items()
    name = node["reftarget"].rpartition(".")[2]
    objects = [(full, entry) for full, entry in objects if not entry.aliased]
    found = [entry for full, entry in objects if full.rpartition(".")[2] == name]
    if len(found) != 1:
        return None
    return make_refnode(app.builder, node["refdoc"], found[0].docname, found[0].node_id, content)


def _skip(app: Any, kind: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of NamedTuples ("Alias for field number 0"): the class says more."""
    return True if type(member).__name__ == "_tuplegetter" else None


def _as_written(app: Any, kind: str, name: str, member: Any, options: Any, lines: list[str]) -> None:
    """Keep napoleon from taking words before a colon for a type; leave out the help of dict and tuple."""
    if kind == "data" and lines and "\n".join(lines).strip() == inspect.getdoc(type(member)):
        lines.clear()
    if kind in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # an empty comment
    for number in range(len(lines) - 1, -1, -1):
        if re.match(r"(Returns|Yields):$", lines[number].strip()):
            indentation = " " * (len(lines[number]) - len(lines[number].lstrip()) + 4)
            lines[number + 1 : number + 1] = [f"{indentation}..", ""]


def _lead_to_front_page(app: Any, error: Exception | None) -> None:
    """Write the site's index.html, as the front page lies in docs/, where it lies in the repository."""
    if error is None and app.builder.name == "html":
        (Path(app.outdir) / "index.html").write_text(
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>evit_ext</title>'
            f'<meta http-equiv="refresh" content="0; url={root_doc}.html">'
            f'<a href="{root_doc}.html">evit_ext</a></html>\n'
        )


def setup(app: Any) -> None:
    app.connect("source-read", _add_navigation)
    app.connect("missing-reference", _find_by_last_name)
    app.connect("autodoc-skip-member", _skip)
    app.connect("autodoc-process-docstring", _as_written, priority=100)  # before napoleon
    app.connect("build-finished", _lead_to_front_page)
