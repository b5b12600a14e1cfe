"""Links between documents, and references from the code to them, lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)(?P<path>[^)#]*)(?:#(?P<anchor>[^)]*))?\)")
MENTION = re.compile(r"docs/(?P<name>\w+\.md)(?: (?P<section>\d(?:\.\d)?)\b)?")
SOURCES = [path for folder in ("src", "tests", "bench") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_of_a_document_leads_somewhere(document: Path) -> None:
    for link in LINK.finditer(document.read_text(encoding="utf-8")):
        target = (document.parent / link["path"]) if link["path"] else document
        assert target.exists(), link[0]
        if link["anchor"]:
            assert link["anchor"] in {anchor_of(heading) for heading in headings(target)}, link[0]


def test_every_mention_in_the_code_leads_to_a_document_and_its_section() -> None:
    for source in SOURCES:
        for mention in MENTION.finditer(source.read_text(encoding="utf-8")):
            document = ROOT / "docs" / mention["name"]
            assert document.exists(), f"{source}: {mention[0]}"
            if mention["section"]:
                numbers = {heading.split()[0].rstrip(".") for heading in headings(document)}
                assert mention["section"] in numbers, f"{source}: {mention[0]}"


def headings(document: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)


def anchor_of(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
