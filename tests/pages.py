"""The Markdown pages of the repository as the tests of the documentation read them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GUIDES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.relative_to(ROOT / 'docs').as_posix()}"
                                                 for path in (ROOT / "docs").rglob("*.md"))]  # fmt: skip
PAGES = [*GUIDES, "CHANGELOG.md", "pyro_blora/README.md",
         *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").rglob("*.md"))]  # fmt: skip
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page: str) -> str:
    """A page without its code blocks."""
    return _FENCED.sub("", read(page))


def blocks(page: str, language: str) -> list[str]:
    """The fenced code blocks of a page in one language."""
    return [text for found, text in _FENCED.findall(read(page)) if found == language]


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as a forge makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}
