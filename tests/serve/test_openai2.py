"""tests/serve/test_openai.py once more, with version 2 of the official client, which `make` keeps in a folder of its
own beside version 3."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
RUN = (
    "import sys, openai, pytest; assert openai.__version__.startswith('2.'), openai.__version__; "
    "sys.exit(pytest.main(['tests/serve/test_openai.py']))"
)


def test_with_version_2_of_the_client() -> None:
    path = Path(sys.prefix) / "openai2"
    assert path.is_dir(), f"no {path}: touch pyproject.toml and run make, which puts openai 2.x there"
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
