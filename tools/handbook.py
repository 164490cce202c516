"""A hook of mkdocs: takes the READMEs, which lie above docs/, into the handbook.

Links between them and docs/ are written so that they work in a checkout; here they are turned into links of the site.
"""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
READMES = {"README.md": "overview.md", "README.zh-CN.md": "overview.zh.md"}


def on_files(files: Any, config: Any) -> Any:
    """Adds the READMEs to the pages."""
    for name, page in READMES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites the links that leave docs/ or come from above it."""
    if page.file.src_uri in READMES.values():
        markdown = markdown.replace("](docs/", "](")
        for name, target in READMES.items():
            markdown = markdown.replace(f"]({name}", f"]({target}")
    for name, target in READMES.items():
        markdown = markdown.replace(f"](../{name}", f"]({target}")
    return markdown
