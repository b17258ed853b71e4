"""README.md and docs/*.md as the tests see them: code blocks, commands, links, sentences."""

import re
import shlex
import string
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(r"(?:<!-- needs: (?P<needs>[^\n]+?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block. `needs` is what its marker `<!-- needs: … -->` names: it is not executed here."""

    page: str
    line: int
    language: str
    text: str
    needs: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*languages: str, pages: list[Path] = PAGES) -> list[Block]:
    """Return the blocks of some languages, page by page."""
    found = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for match in _BLOCK.finditer(text):
            if match["language"] in languages:
                line = text.count("\n", 0, match.start("text")) + 1
                found.append(Block(str(page.relative_to(ROOT)), line, match["language"], match["text"], match["needs"]))
    return found


def commands(block: Block) -> list[list[str]]:
    """Return the words of each command of a shell block, with its variables filled in."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    found, variables = [], {"DATA": "data.train=[{path: nl_refer.jsonl}]"}  # some blocks use that of another
    for line in lines:
        for words in _split(shlex.split(line, comments=True)):
            if "=" in words[0] and words[0].split("=")[0].isidentifier():
                variables |= dict([words[0].split("=", 1)])
            else:
                found.append([string.Template(word).safe_substitute(variables) for word in words])
    return found


def _split(words: list[str]) -> list[list[str]]:
    found = [[]]
    for word in words:
        found.append([]) if word == "&&" else found[-1].append(word)
    return [words for words in found if words]


def prose(page: Path) -> str:
    """Return the running text of a page: no code, tables, headings, links' targets."""
    text = re.sub(r"<!--.*?-->", "", _BLOCK.sub("", page.read_text(encoding="utf-8")), flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not re.match(r"\s*(\||#|!\[|    )", line)]
    text = re.sub(r"\]\([^)]*\)", "]", "\n".join(lines))
    text = re.sub(r"^\s*(-|\d+\.) ", "\n\n", text, flags=re.MULTILINE)
    return re.sub(r"^\*\*[^*]+[.:]\*\*", "", text, flags=re.MULTILINE)  # a paragraph's bold heading


def sentences(page: Path) -> list[str]:
    """Return the sentences of a page's prose; a list's item or paragraph ends one too."""
    found = [part for part in re.split(r"\n\n+|(?<=[.!?])[*)]*\s+", prose(page)) if re.search(r"\w", part)]
    return [" ".join(sentence.split()) for sentence in found]


def links(page: Path) -> list[str]:
    """Return the targets of links and pictures that are no web addresses."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
