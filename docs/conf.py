"""Builds `docs/` as a site: `make docs`. What only the site needs is here, so that pages stay plain Markdown."""

import re
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

import hbat

project = "hbat"
html_title = f"hbat {hbat.__version__}"
html_theme = "furo"
html_css_files = ["site.css"]
html_static_path = ["static"]
html_show_copyright = False
html_theme_options = {
    "source_repository": "https://github.com/hbat-trl/hbat",
    "source_branch": "main",
    "source_directory": "docs/",
}
html_math_renderer = "mathml"  # no script and no network: browsers draw it
exclude_patterns = ["_build", "results"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
nitpick_ignore_regex = [("py:class", r"(?!hbat\.\w+$).*")]  # types of other libraries, and of private modules


def _navigation(_app: Sphinx, name: str, source: list[str]) -> None:
    """Turn the tables of the index into the navigation: a hidden toctree for each."""
    if name != "index":
        return
    for caption, table in re.findall(r"^## (.*?)\n\n(\|.*?)\n\n", source[0], re.DOTALL | re.MULTILINE):
        pages = "\n".join(re.findall(r"^\| \[.*?\]\((.*?)\.md\)", table, re.MULTILINE))
        source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{pages}\n```\n"


def _formulas(_app: Sphinx, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Let docstrings write formulas as the pages do, between dollars."""
    lines[:] = re.sub(r"\$(.+?)\$", r":math:`\1`", "\n".join(lines), flags=re.DOTALL).split("\n")


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Connect the above to Sphinx."""
    app.connect("source-read", _navigation)
    app.connect("autodoc-process-docstring", _formulas)
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
