#!/usr/bin/env python3
"""Print the interpreters of the supported Python versions other than this one, one path per line.

They are looked for on PATH, beside this interpreter's own installation (pyenv keeps versions as sibling
folders) and in ~/.pyenv/versions. Only those that run and can make a virtual environment are printed.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

SUPPORTED = ("3.11", "3.12", "3.13")
PROBE = "import ensurepip, sqlite3, ssl, sys, venv; print('%d.%d' % sys.version_info[:2])"


def main() -> None:
    """Print at most one interpreter per version."""
    for version in SUPPORTED:
        if version != "{}.{}".format(*sys.version_info[:2]):
            found = next((path for path in candidates(version) if runs(path, version)), None)
            if found:
                print(found)


def candidates(version: str) -> list[str]:
    """Paths worth trying, nearest first."""
    on_path = shutil.which(f"python{version}")
    found = [on_path] if on_path else []
    for versions in (Path(sys.base_prefix).parent, Path(os.environ.get("HOME", "/")) / ".pyenv" / "versions"):
        # The highest patch release first; the folder names end in it.
        for home in sorted(versions.glob(f"{version}.*"), key=patch, reverse=True):
            found.append(str(home / "bin" / "python"))
    return found


def patch(home: Path) -> int:
    """The patch release in a folder name like 3.12.1; -1 for pre-releases."""
    last = home.name.rsplit(".", 1)[-1]
    return int(last) if last.isdigit() else -1


def runs(path: str, version: str) -> bool:
    """Whether this is that Python; a pyenv shim is on PATH even for versions that it then refuses to run."""
    try:
        told = subprocess.run([path, "-I", "-c", PROBE], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return False
    return told.returncode == 0 and told.stdout.strip() == version


if __name__ == "__main__":
    main()
