"""Make the editable install of this environment importable in another one of the same Python.

    .venv/bin/python bench/install_in_peers.py .venv-peers

Nothing is built again: the files that the install put into this environment are copied, the
commands with the other environment's interpreter.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

NAME = "pymerge-engine"


def main(environment: Path) -> None:
    python = environment.absolute() / "bin" / "python"
    here, there = Path(sysconfig.get_path("purelib")), _packages(python)
    if here.name != there.name or here.parent.name != there.parent.name:
        raise SystemExit(
            f"{environment} has another Python than {sys.prefix} ({there}); make both with one "
            "PYTHON, as `make distclean dev bench-peers` does"
        )
    for file in importlib.metadata.distribution(NAME).files or ():
        source = Path(str(file.locate()))
        if not source.is_file() or source.suffix == ".pyc":
            continue
        if source.resolve().is_relative_to(here.resolve()):
            target = there / source.resolve().relative_to(here.resolve())
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
        else:
            _copy_command(source, python)


def _packages(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


def _copy_command(source: Path, python: Path) -> None:
    _, _, text = source.read_text().partition("\n")
    target = python.parent / source.name
    target.write_text(f"#!{python}\n{text}")
    target.chmod(0o755)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
