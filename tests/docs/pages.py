"""The documentation as data: its pages, their fenced blocks, links and tables."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)(?P<marks>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
_HEADING = re.compile(r"^#{1,6} +(.*)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A fenced block; `line` is where its code begins, `mark` what stands after the language."""

    page: str
    line: int
    language: str
    mark: str
    code: str


def pages() -> list[Path]:
    """Every Markdown file that readers get."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page, in order, those inside of comments too."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page=page.relative_to(ROOT).as_posix(),
            line=text.count("\n", 0, match.start("code")) + 1,
            language=match["language"],
            mark=match["marks"].strip(),
            code=_dedent(match["code"], match["indent"]),
        )
        for match in _FENCE.finditer(text)
        if match["language"] in languages
    ]


def links(page: Path) -> Iterator[str]:
    """Where a page points to, outside of its code."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for match in _LINK.finditer(text):
        yield match[1] or match[2]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return {_slug(title) for title in _HEADING.findall(text)}


def first_cells(page: Path) -> list[str]:
    """The code words in the first column of a page's tables."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^\| `([^`|]+)` +\|", text, re.MULTILINE)


def rows(page: Path) -> dict[str, list[str]]:
    """The rows of a page's tables by the code word in their first column."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^\| `([^`|]+)` +\|(.*)\|$", text, re.MULTILINE)
    return {name: [cell.strip() for cell in rest.split(" | ")] for name, rest in found}


def _dedent(code: str, indent: str) -> str:
    return re.sub(f"^{indent}", "", code, flags=re.MULTILINE)


def _slug(title: str) -> str:
    kept = re.sub(r"[^\w\- ]", "", re.sub(r"`|\*|\[|\]\([^)]*\)", "", title).lower())
    return kept.strip().replace(" ", "-")
