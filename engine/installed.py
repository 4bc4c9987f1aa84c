"""What is installed here, read without importing any of it."""

from __future__ import annotations

from importlib import metadata


def version(package: str) -> str:
    """Of a package, "" where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
