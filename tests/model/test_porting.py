"""The example of docs/porting.md is a file that works."""

from __future__ import annotations

import re
from pathlib import Path

from engine.model.archs import phi3

ROOT = Path(__file__).parents[2]


def test_the_code_in_the_page_stands_in_the_file() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "porting.md").read_text(), re.DOTALL)
    source = Path(phi3.__file__).read_text()
    assert len(blocks) >= 3
    for block in blocks:
        assert block in source, block


def test_every_file_that_the_page_links_is_there() -> None:
    links = re.findall(r"\]\((\.\./[^)#]+)\)", (ROOT / "docs" / "porting.md").read_text())
    assert len(links) > 5
    assert all((ROOT / "docs" / link).exists() for link in links)
