"""Fixtures of the parity tests: the environments of both peers, and the checkpoints to merge."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_checkpoints import llama_shapes, write_llama
from safetensors.torch import load_file, save_file

Tensors = Mapping[str, torch.Tensor]
FusionBench = Callable[[Mapping[str, Mapping[str, Any]]], dict[str, dict[str, torch.Tensor]]]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def peers_python() -> Path:
    """The Python of the environment that has mergekit."""
    environment = Path(os.environ.get("PYMERGE_PEERS", ROOT / ".venv-peers"))
    if not (environment / "bin" / "mergekit-yaml").exists():
        pytest.skip(
            f"mergekit is not installed in {environment}: "
            "run `make bench-peers`, or set PYMERGE_PEERS to an environment that has it"
        )
    return environment / "bin" / "python"


@pytest.fixture(scope="session")
def fusionbench(tmp_path_factory: pytest.TempPathFactory) -> FusionBench:
    """Runs FusionBench's code: a function from {name: job} to {name: its merged tensors}.

    A job has ``method`` (a key of METHODS in drive_fusionbench.py), ``base`` ({parameter: tensor})
    and ``tasks`` (a list of such), and may have ``options`` (FusionBench's arguments), ``inputs``
    (a tensor for each task), ``grams`` and ``fishers`` (lists of {module or parameter: tensor}),
    ``activation``, ``seed`` and ``threads``. One process runs all jobs of a call, because it takes
    seconds to start.
    """
    environment = Path(os.environ.get("PYMERGE_FUSIONBENCH", ROOT / ".venv-fusionbench"))
    python = environment / "bin" / "python"
    probe = [python, "-c", "import importlib.metadata as m; m.version('fusion-bench')"]
    if not python.exists() or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip(
            f"FusionBench is not installed in {environment}: "
            "run `make bench-peers`, or set PYMERGE_FUSIONBENCH to an environment that has it"
        )

    def run(jobs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, torch.Tensor]]:
        work = tmp_path_factory.mktemp("fusionbench")
        listed = []
        for name, job in jobs.items():
            settings = {key: value for key, value in job.items() if key not in TENSORS_OF_A_JOB}
            files = {"tensors": f"{work / name}.safetensors", "out": str(work / name)}
            save_file(fusionbench_tensors(**job), files["tensors"])
            listed.append({**settings, **files})
        (work / "jobs.json").write_text(json.dumps(listed))
        driver = Path(__file__).with_name("drive_fusionbench.py")
        command = [python, driver, work / "jobs.json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        for name in jobs:
            error = work / name / "error.txt"
            assert not error.exists(), f"{name}: {error.read_text()[-3000:]}"
        return {name: load_file(work / name / "merged.safetensors") for name in jobs}

    return run


TENSORS_OF_A_JOB = ("base", "tasks", "inputs", "grams", "fishers")


def fusionbench_tensors(
    *,
    base: Tensors,
    tasks: Sequence[Tensors],
    inputs: Sequence[torch.Tensor] = (),
    grams: Sequence[Tensors] = (),
    fishers: Sequence[Tensors] = (),
    **_: object,
) -> dict[str, torch.Tensor]:
    """A job's tensors under the names that drive_fusionbench.py reads."""
    tensors = {f"base/{name}": value for name, value in base.items()}
    for kind, parts in (("task", tasks), ("gram", grams), ("fisher", fishers)):
        for i, part in enumerate(parts):
            tensors |= {f"{kind}/{i}/{name}": value for name, value in part.items()}
    tensors |= {f"inputs/{i}": value for i, value in enumerate(inputs)}
    # the same tensor may be given twice, which a file may not hold
    return {key: value.contiguous().clone() for key, value in tensors.items()}


@pytest.fixture(scope="session")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small checkpoints.

    ``base``, ``a``, ``b``, ``c``: float32, 4 layers, no two magnitudes of a delta equal.
    ``base-bf16``, ``a-bf16``, ``b-bf16``: values with many equal magnitudes. ``c-f16``: float16.
    ``deep``: 6 layers. ``base-tied``, ``a-tied``: no head of their own.
    """
    root = tmp_path_factory.mktemp("llamas")

    def checkpoint(seed: int, num_layers: int = 4, tied: bool = False) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng(seed)
        return {
            name: torch.from_numpy(rng.normal(0, 0.02, shape).astype(np.float32))
            for name, shape in llama_shapes(num_layers, tied).items()
        }

    def tuned(base: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng(seed)
        return {
            name: tensor + torch.from_numpy(rng.normal(0, 2e-3, tensor.shape).astype(np.float32))
            for name, tensor in base.items()
        }

    def cast(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {name: tensor.to(dtype) for name, tensor in tensors.items()}

    base, base_tied = checkpoint(0), checkpoint(10, tied=True)
    models = {"base": base, **{name: tuned(base, n) for n, name in enumerate("abc", start=1)}}
    for name, tensors in models.items():
        write_llama(root / name, tensors, 4, tied=False)
    for name in ("base", "a", "b"):
        write_llama(root / f"{name}-bf16", cast(models[name], torch.bfloat16), 4, tied=False)
    write_llama(root / "c-f16", cast(models["c"], torch.float16), 4, tied=False)
    write_llama(root / "deep", checkpoint(20, num_layers=6), 6, tied=False)
    write_llama(root / "base-tied", base_tied, 4, tied=True)
    write_llama(root / "a-tied", tuned(base_tied, 11), 4, tied=True)
    return root
