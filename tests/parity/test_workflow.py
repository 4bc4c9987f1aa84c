"""The workflows for GitHub: their commands are commands, and what they keep is what those write."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from backends.target import check
from engine.model.registry import read_spec
from engine.target import Target
from radixmesh.cli import make_app
from radixmesh.parity.subjects import choose

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps(file: Path) -> list[dict[str, Any]]:
    content = yaml.safe_load(file.read_text())
    assert content["permissions"] == {"contents": "read"}
    assert {"name", True, "jobs"} <= set(content)  # YAML 1.1 reads `on` as true
    found = [step for job in content["jobs"].values() for step in job["steps"]]
    assert all(job["timeout-minutes"] <= 60 for job in content["jobs"].values())
    assert all(("run" in step) != ("uses" in step) for step in found)
    return found


def parsed(words: list[str]) -> dict[str, Any]:
    """The parameters of a radixmesh command line, as the command would get them. Raises for what it doesn't know."""
    group: Any = typer.main.get_command(make_app())
    command = group.commands[words[1]]
    context = command.make_context(words[1], words[2:])
    return dict(context.params)


def test_there_are_workflows() -> None:
    assert [f.name for f in FILES] == ["compile.yml", "parity.yml"]


def compiles(given: dict[str, Any]) -> None:
    """The target is one, and the model is there."""
    if given["target"]:
        check(Target.parse(given["target"]))
    if given["model"]:
        read_spec(ROOT / given["model"])


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_its_commands_are_commands(file: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    kept = [s["with"]["path"] for s in steps(file) if "upload-artifact" in s.get("uses", "")]
    assert len(kept) == 1
    ran, written = 0, set()
    for line in (line for s in steps(file) for line in s.get("run", "").splitlines()):
        words = shlex.split(line)
        if words[0] != "radixmesh":
            asked = re.fullmatch(r"python -m pip install -e '\.\[(\w+)\]'", line)
            assert asked, f"not known here: {line}"
            assert asked[1] in extras
            continue
        given = parsed(words)
        if words[1] == "parity":
            choose(given["backends"], given["a"], given["b"] or [])
        else:
            compiles(given)
        outputs = {str(given[k]) for k in ("html", "out")}
        assert not outputs & written
        assert all(x.startswith(kept[0]) for x in outputs)
        written |= outputs
        ran += 1
    assert ran >= 2


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_pages_are_kept_when_a_threshold_is_passed(file: Path) -> None:
    """A failed comparison must not stop the others, nor lose its page."""
    found = steps(file)
    first = next(i for i, s in enumerate(found) if s.get("run", "").startswith("radixmesh"))
    assert all(s["if"] == "${{ !cancelled() }}" for s in found[first + 1 :])
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", s["uses"]) for s in found if "uses" in s)
    assert not any("continue-on-error" in s for s in found)


def test_a_command_that_is_none_is_noticed() -> None:
    with pytest.raises(Exception, match="no-such-flag"):
        parsed(shlex.split("radixmesh parity --no-such-flag 3"))
    with pytest.raises(KeyError):
        parsed(shlex.split("radixmesh paritee"))
