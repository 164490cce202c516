"""Draws the rooms of the package and their direction, from the layers that import-linter checks, as docs/rooms.svg.

    python tools/draw_rooms.py            writes the picture
    python tools/draw_rooms.py --check    exits with 1 if the picture does not show the layers of pyproject.toml

The standard library is enough, so it runs before anything is installed.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "qwen2_fp16_fix"
PICTURE = ROOT / "docs" / "rooms.svg"

WIDTH, LEFT, EDGE = 880, 96, 16  # of the picture at least, of the arrow's column, around everything
BAND, GAP, BOX = 52, 12, 34  # heights: a layer, between two layers, a room
LETTER, PADDING = 8.2, 22  # widths: a letter of the monospaced face, what a box adds to its name

# The picture brings its own background, so it can be read on any page; a reader in the dark gets a dark one.
STYLE = """
  .page { fill: #ffffff } .band { fill: #f1f4f8 } .room { fill: #ffffff; stroke: #7b8a9c }
  .model { fill: #fdf3e3; stroke: #b7791f } text { fill: #1b2733; text-anchor: middle } .said { fill: #55626f }
  .name { font: 13.5px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
  .said { font: 12.5px system-ui, sans-serif } .arrow { stroke: #55626f; fill: none; stroke-width: 1.6 }
  @media (prefers-color-scheme: dark) {
    .page { fill: #12161b } .band { fill: #1b222a } .room { fill: #26303b; stroke: #6d7d90 }
    .model { fill: #3a2d16; stroke: #d69e2e } text { fill: #e6ebf1 } .said { fill: #a9b4c0 } .arrow { stroke: #a9b4c0 }
  }"""


def layers_of(settings: dict[str, Any]) -> list[list[str]]:
    """The rooms of each layer, the uppermost first, from the first contract of type layers in pyproject.toml.

    A layer is a string, in which "|" or ":" stands between rooms. Brackets mark a room that may be missing. Raises
    SystemExit where there is no such contract.
    """
    contracts = settings.get("tool", {}).get("importlinter", {}).get("contracts", [])
    found = next((contract["layers"] for contract in contracts if contract["type"] == "layers"), None)
    if not found:
        raise SystemExit("pyproject.toml has no import-linter contract of type layers: nothing to draw.")
    return [[room_of(part) for part in re.split(r"[|:]", layer)] for layer in found]


def room_of(part: str) -> str:
    """The name of a room as a contract writes it, without the package's."""
    return part.strip().strip("()").strip().removeprefix(f"{PACKAGE}.")


def shown_as(room: str) -> str:
    """What a box says: a room that is a folder ends in a slash, a single file has its suffix."""
    return f"{room}.py" if (ROOT / PACKAGE / f"{room}.py").is_file() else f"{room}/"


def draw(layers: Sequence[Sequence[str]]) -> str:
    """The picture as SVG."""
    shown = [[shown_as(room) for room in rooms] for rooms in layers]
    height = 2 * EDGE + len(layers) * (BAND + GAP) - GAP
    width = max(WIDTH, *(round(LEFT + EDGE + sum(map(box_width, names)) + GAP * (len(names) + 1)) for names in shown))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-labelledby="t d">',
        f'<title id="t">The rooms of {PACKAGE}</title>',
        f'<desc id="d">Upper rooms may import lower ones. {escape(sentence(layers))}</desc>',
        f"<style>{STYLE}\n</style>",
        f'<rect class="page" width="{width}" height="{height}" rx="10"/>',
        *arrow(height),
    ]
    for number, names in enumerate(shown):
        parts += band(EDGE + number * (BAND + GAP), width - LEFT - EDGE, names, number == len(shown) - 1)
    return "\n".join([*parts, "</svg>", ""])


def sentence(layers: Sequence[Sequence[str]]) -> str:
    """The same in words, for who cannot see it."""
    return "From top to bottom: " + "; ".join(", ".join(rooms) for rooms in layers) + "."


def arrow(height: int) -> list[str]:
    """The arrow at the left, from the top to the bottom."""
    middle, end = LEFT / 2 + 4, height - EDGE - 6
    return [
        f'<path class="arrow" d="M{middle} {EDGE + 6} V{end} m-5 -8 l5 8 l5 -8"/>',
        f'<text class="said" transform="translate({middle - 14} {height / 2}) rotate(-90)">may import</text>',
    ]


def box_width(name: str) -> float:
    """How wide a box around a name is."""
    return len(name) * LETTER + PADDING


def band(top: float, space: float, names: Sequence[str], is_last: bool) -> list[str]:
    """A layer of the width `space`: its rooms side by side in the middle. The last one is what runs inside a model."""
    x = LEFT + (space - sum(map(box_width, names)) - GAP * (len(names) - 1)) / 2
    y = top + (BAND - BOX) / 2
    parts = [f'<rect class="band" x="{LEFT}" y="{top}" width="{space}" height="{BAND}" rx="8"/>']
    for name in names:
        width = box_width(name)
        parts += [
            f'<rect class="{"model" if is_last else "room"}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
            f'height="{BOX}" rx="6"/>',
            f'<text class="name" x="{x + width / 2:.1f}" y="{y + BOX / 2 + 5:.1f}">{escape(name)}</text>',
        ]
        x += width + GAP
    return parts


def main(arguments: Sequence[str] | None = None) -> int:
    """0 with the picture written or found up to date, 1 where `--check` finds another one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and compare")
    parser.add_argument("--settings", type=Path, default=ROOT / "pyproject.toml", help="where the contract is")
    options = parser.parse_args(arguments)
    picture = draw(layers_of(tomllib.loads(options.settings.read_text(encoding="utf-8"))))
    if not options.check:
        PICTURE.write_text(picture, encoding="utf-8")
    elif not PICTURE.is_file() or PICTURE.read_text(encoding="utf-8") != picture:
        print(f"{PICTURE.relative_to(ROOT)} does not show the layers: run `make docs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
