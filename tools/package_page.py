"""Makes the package page out of README.md when a wheel or an sdist is built: its links work there, or are none.

On a package index a link to a file beside the README leads nowhere. With the address of the repository, which stands
once, in pyproject.toml, such links become absolute and the project's addresses are complete. Without it they become
plain text.
"""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<path>(?!https?:|#|mailto:)[^)\s]+)\)")
INDEX = "https://pypi.org/project/qwen2-fp16-fix/"


def page(readme: str, repository: str, version: str) -> str:
    """The README as a package index shows it."""

    def replace(link: re.Match[str]) -> str:
        if not repository:
            return "" if link["image"] else link["text"]
        kind = "raw" if link["image"] else "blob"
        return f"{link['image']}[{link['text']}]({repository}/{kind}/v{version}/{link['path']})"

    return re.sub(r"\n{3,}", "\n\n", LINK.sub(replace, readme))


def addresses(repository: str) -> dict[str, str]:
    """`project.urls`. An address that is not ours yet is left out: somebody else could take it."""
    if not repository:
        return {"Homepage": INDEX}
    return {
        "Homepage": repository,
        "Documentation": f"{repository}/blob/HEAD/docs/index.md",
        "Issues": f"{repository}/issues",
        "Changelog": f"{repository}/blob/HEAD/CHANGELOG.md",
    }


class PackagePage(MetadataHookInterface):
    """Called by hatchling. `repository` is set in [tool.hatch.metadata.hooks.custom]."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Fills in `readme` and `urls`."""
        root = Path(self.root)
        version = re.findall(r'"(.+)"', (root / "qwen2_fp16_fix" / "_version.py").read_text("utf-8"))[-1]
        text = page((root / "README.md").read_text("utf-8"), self.config["repository"], version)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = addresses(self.config["repository"])
