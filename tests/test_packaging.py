"""An sdist holds all that the build and the tests need."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: Only git reads these.
NOT_PACKED = {".gitignore"}
#: setuptools packs these whatever MANIFEST.in says, and the packages' modules.
ALWAYS_PACKED = {"MANIFEST.in", "pyproject.toml", "setup.py"}


def test_every_file_of_the_repository_is_in_the_sdist():
    filelist = pytest.importorskip("setuptools._distutils.filelist")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("the files to look for are those of git, and this folder is no clone")
    names = {name for name in done.stdout.splitlines() if (ROOT / name).is_file()}
    packed = filelist.FileList()
    packed.set_allfiles(sorted(names))
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        if line and not line.startswith("#"):
            packed.process_template_line(line)
    modules = {name for name in names if name.startswith("pymerge/") and name.endswith(".py")}
    assert names - modules - ALWAYS_PACKED - NOT_PACKED <= set(packed.files)
