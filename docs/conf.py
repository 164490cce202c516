"""How Sphinx builds the handbook: docs/ in English and docs/zh/ in Chinese, each a site with a search of its own."""

import logging
import re
import sys
from pathlib import Path
from typing import Any

from sphinx.search.zh import SearchChinese

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))  # the API page imports this checkout
CHINESE = tags.has("zh")  # type: ignore[name-defined]  # noqa: F821  # a name that Sphinx puts here

#: The pages in the order in which one reads them.
ENGLISH = {
    "Start": ["self", "remedies"],
    "Use": ["enable", "checks", "training", "evaluation", "embeddings", "hub", "api"],
    "Understand": ["why", "fixed", "key-centring", "range-proof", "performance"],
    "Operate": ["supported", "pinning", "troubleshooting"],
    "Contribute": ["architecture", "contributing"],
}
CHINESE_ORDER = {"开始": ["self"], "使用": ["enable", "checks"], "原理": ["fixed"], "运维": ["troubleshooting"]}
ORDER = CHINESE_ORDER if CHINESE else ENGLISH

project = "qwen2-fp16-fix"
author = "The qwen2-fp16-fix contributors"
copyright = f"{author}. Licence: Apache-2.0"
language = "zh_CN" if CHINESE else "en"
html_title = "qwen2-fp16-fix 手册" if CHINESE else "qwen2-fp16-fix handbook"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = [] if CHINESE else ["zh", "notebooks"]
SearchChinese.language_name = "English"  # Sphinx 9.0 brings the English stemmer along and asks for a Chinese one
logging.getLogger("jieba").setLevel(logging.WARNING)  # cuts Chinese into words for the search; says how long it took
default_role = "code"  # single backticks in docstrings are code

myst_heading_anchors = 3
myst_url_schemes = {"http": None, "https": None, "mailto": None, "site": "{{path}}"}

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False

html_theme = "furo"
html_static_path = ["_static"]
templates_path = ["_templates"]
html_css_files = ["handbook.css"]
html_copy_source = False
html_show_search_summary = False  # would fetch pages, which a browser refuses to do from disk
html_show_sphinx = False
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/language.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}
REPOSITORY = re.findall(r'^repository = "(.*?)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
if any(REPOSITORY):
    html_theme_options = {"source_repository": REPOSITORY[0], "source_branch": "main", "source_directory": "docs/"}


def add_navigation(app: Any, name: str, source: list[str]) -> None:
    """Puts the order of the pages at the end of the start page, where a reader of the file need not see it."""
    if name == "index":
        for caption, pages in ORDER.items():
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```\n"


def link_between_languages(app: Any, name: str, source: list[str]) -> None:
    """Makes links to pages of the other language, which is another site, links to its HTML files."""
    folder = r"\.\./" if CHINESE else "zh/"
    source[0] = re.sub(rf"\]\(({folder}[\w-]+)\.md(#[^)]*)?\)", r"](<site:\1.html\2>)", source[0])


def name_the_other_language(app: Any, name: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """Gives the sidebar the same page in the other language, or its start page."""
    other = DOCS if CHINESE else DOCS / "zh"
    page = name if (other / f"{name}.md").is_file() else "index"
    context["other_language"] = f"{'../' if CHINESE else 'zh/'}{page}.html"


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", add_navigation)
    app.connect("source-read", link_between_languages)
    app.connect("html-page-context", name_the_other_language)
