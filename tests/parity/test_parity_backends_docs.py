"""The Python of docs/backends.md, run by each host's own Python in a folder of small models."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

import pymerge

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "backends.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
HOSTS = {
    "mergekit": ("PYMERGE_PEERS", ".venv-peers", "mergekit"),
    "FusionBench": ("PYMERGE_FUSIONBENCH", ".venv-fusionbench", "fusion_bench"),
    "sd-mecha": ("PYMERGE_PEERS", ".venv-peers", "sd_mecha"),
    "PEFT": ("PYMERGE_PEERS", ".venv-peers", "peft"),
}


@pytest.fixture(scope="module")
def folder(llamas: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    for name, model in (("llama", "base"), ("llama-finance", "a"), ("llama-medicine", "b")):
        (folder / name).symlink_to(llamas / model)
    for name in ("finance", "medicine"):
        pymerge.extract_lora(
            folder / "llama", folder / f"llama-{name}", folder / name, rank=4, include=["q_proj"]
        )
    return folder


@pytest.mark.parametrize("host", HOSTS)
def test_the_python_of_the_page_runs(host: str, folder: Path) -> None:
    variable, place, module = HOSTS[host]
    python = Path(os.environ.get(variable, ROOT / place)) / "bin" / "python"
    find = f"import importlib.util as u, pymerge; raise SystemExit(not u.find_spec('{module}'))"
    if not python.exists() or subprocess.run([python, "-c", find], capture_output=True).returncode:
        pytest.skip(f"{host} or pymerge is not installed in {place}: run `make bench-peers`")
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {host}\n")[2].partition("\n## ")[0]
    blocks = BLOCK.findall(text)
    programs = [body for language, body in blocks if language == "python"]
    assert programs
    for language, body in blocks:
        if language == "yaml" and "_target_:" in body:
            (folder / re.match(r"# (\S+)\n", body)[1]).write_text(body)
    for program in programs:
        done = subprocess.run(
            [python, "-c", program], cwd=folder, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]
