"""The wheel: built from the source alone, installed elsewhere, it generates text from outside the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ("pyproject.toml", "README.md", "LICENSE")
ROOMS = ("radixmesh", "engine", "backends", "models_jax", "models_torch")
OUTSIDE = ("tests", "benchmarks", "docs", "examples")


def pip(*args: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, args)]
    subprocess.run(command, check=True, timeout=240)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a copy, so that nothing lies in the checkout afterwards and no old build gets in; without a network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for folder in ROOT.iterdir():
        if folder.is_dir() and not folder.name.startswith(".") and folder.name not in ("build", "dist"):
            shutil.copytree(folder, source / folder.name, ignore=skipped)
    for name in SOURCE:
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", out, source)
    return next(out.glob("radixmesh-*.whl"))


def test_the_wheel_holds_the_rooms_and_the_demo_model_alone(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {n.split("/")[0] for n in names if ".dist-info/" not in n}
    assert not tops & set(OUTSIDE)
    assert tops <= {*ROOMS, "kernels_pallas", "kernels_cuda"}
    here = {str(f.relative_to(ROOT)) for room in ROOMS for f in (ROOT / room).rglob("*.py")}
    assert here <= names
    demo = {f"radixmesh/demo/{f.name}" for f in (ROOT / "radixmesh" / "demo").iterdir()}
    assert demo <= names
    assert {"radixmesh/demo/config.json", "radixmesh/demo/model.safetensors", "radixmesh/demo/tokenizer.json"} <= demo
    assert {f"radixmesh/parity/{name}" for name in ("thresholds.toml", "prompts/code.txt")} <= names
    assert {"engine/py.typed", "backends/py.typed", "radixmesh/py.typed"} <= names
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)


def test_installed_elsewhere_it_generates(wheel: Path, tmp_path: Path) -> None:
    site, home = tmp_path / "site", tmp_path / "home"
    home.mkdir()
    pip("install", "--no-deps", "--no-index", "--target", site, wheel)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import radixmesh, engine, backends\n"
        f"assert all(m.__file__.startswith({str(site)!r}) for m in (radixmesh, engine, backends))\n"
        "with radixmesh.Engine(backend='torch', slots=2, cache_tokens=256) as e:\n"
        "    print(e.generate('def add(a, b):', sampling_params={'temperature': 0, 'max_new_tokens': 16})['text'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=home, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
