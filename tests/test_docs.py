"""What the pages say: links and paths lead somewhere, and commands take the options that they are shown with."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from radixmesh.cli import make_app

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [ROOT / "README.md", *(p for room in ("docs", "benchmarks", "examples") for p in (ROOT / room).rglob("*.md"))]
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"`([a-z_]+/[\w./-]+\.(?:json|md|py|toml))")
COMMAND = re.compile(r"(?:^|\$ |`|\|\| |python -m )(radixmesh [a-z][^`\n|&;>]*)", re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def commands(text: str) -> Iterator[list[str]]:
    """Words of each command; one that ends in a backslash goes on."""
    for found in COMMAND.findall(text.replace("\\\n", " ")):
        yield shlex.split(found.split(" # ")[0].rstrip("\\"), comments=True)[1:]


@cache
def cli() -> Any:
    return typer.main.get_command(make_app())


def complaint(words: list[str]) -> str:
    """What the command line has against a command, "" for nothing."""
    at = cli()
    while hasattr(at, "commands"):
        if not words or words[0].startswith("-"):
            return ""
        inner = at.commands.get(words[0])
        if inner is None:
            return "" if words[0].isupper() else f"no command {words[0]}"
        at, words = inner, words[1:]
    known = {option for p in at.params for option in (*p.opts, *p.secondary_opts)} | {"--help"}
    asked = {word.split("=")[0] for word in words if re.match(r"--[a-z]", word)}
    return ", ".join(sorted(asked - known))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_page_is_right(page: Path) -> None:
    text, wrong = page.read_text(), []
    for link in LINK.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        if not target.exists():
            wrong.append(f"{link}: not there")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text()):
            wrong.append(f"{link}: no such heading")
    named = [path for path in PATH.findall(text) if (ROOT / path.split("/")[0]).is_dir()]
    wrong += [f"{path}: not there" for path in named if not (ROOT / path).exists()]
    wrong += [f"{' '.join(words)}: {said}" for words in commands(text) if (said := complaint(words))]
    assert not wrong, "\n".join(wrong)


def test_what_is_wrong_is_found() -> None:
    assert complaint(["serve", "--port", "1", "--nope=2"]) == "--nope"
    assert complaint(["bench", "nope"]) == "no command nope"
    assert [*commands("so `radixmesh explain --json` and\nradixmesh serve \\\n  --port 1  # so")] == [
        ["explain", "--json"],
        ["serve", "--port", "1"],
    ]
    assert anchors("# A head, of (two) words\n```\n# not this\n```") == {"a-head-of-two-words"}
