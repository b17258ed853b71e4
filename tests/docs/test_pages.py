"""The pages themselves: links that resolve, length, figures that are in the reports, messages that are in the code."""

import ast
import re

import pytest

from tests.docs.pages import PAGES, ROOT, anchors, links, prose, sentences

README = ROOT / "README.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_can_be_skimmed(page):
    counts = [len(sentence.split()) for sentence in sentences(page)]
    assert sum(counts) / len(counts) <= 20


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
    assert len(sentences(README)) > 20 and "`" in prose(README)  # the counter sees the text


def test_every_page_is_linked_from_the_readme():
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= {link.partition("#")[0] for link in links(README)}


def test_figures_are_those_of_the_reports():
    """Every number of the README's tables of costs is printed in a report of `benchmarks/`."""
    reports = "".join((ROOT / f"benchmarks/{name}/{name}.md").read_text() for name in ("attention_loss", "training"))
    printed = set(re.findall(r"\d[\d,.]*\d(?:%| s| MB)?|\d", reports))
    tables = re.findall(r"^\| (?:time|peak|saved|model of) .+$", README.read_text(encoding="utf-8"), re.M)
    assert len(tables) == 5
    for row in tables:
        cells = row.split("|")[2:]
        assert not [n for cell in cells for n in re.findall(r"\d[\d,.]*\d%?", cell) if n not in " ".join(printed)], row


def _texts_of_the_code() -> str:
    """Return every string of the code, with … where a value is filled in."""
    found = []
    for folder in ("swim_fast", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
    return "\n".join(found)


def test_messages_of_troubleshooting_are_in_the_code():
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    assert len(messages) > 40
    texts = _texts_of_the_code()
    assert not [message for message in messages if message not in texts]
