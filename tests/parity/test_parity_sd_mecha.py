"""pymerge.integrations.sd_mecha against sd-mecha's own merges and against merge_tensor."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pymerge
from pymerge.integrations.sd_mecha import is_by_tensor

DRIVER = Path(__file__).with_name("drive_sd_mecha.py")
SHAPES = {"a.weight": (24, 16), "b.weight": (12, 24), "a.bias": (24,), "scale": ()}
LEFT = {"ties_stock": "apply_stock", "ties_median": "apply_median"}
CASES = (
    "weighted_sum",
    "weighted_sum_more",
    "n_average",
    "slerp",
    "slerp_of_one",
    "ties",
    "ties_of_sums",
    "ties_all",
    "ties_few",
    "ties_extended",
    "ties_stock",
    "ties_median",
    "dare",
    "dare_count",
)
METHODS = sorted(name for name in pymerge.methods.METHODS if is_by_tensor(name))

Merged = dict[str, dict[str, torch.Tensor]]


def checkpoint(seed: int, base: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in SHAPES.items():
        values = torch.from_numpy(np.asarray(rng.normal(0, 0.2, shape), np.float32))
        found[name] = values if base is None else base[name] + values / 10
    # equal magnitudes, and models that pull an element either way with as many votes
    if base is not None:
        found["a.bias"][:8] = base["a.bias"][:8] + 0.03125 * (1 if seed % 2 else -1)
    return found


@pytest.fixture(scope="module")
def folder(peers_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd-mecha")
    probe = [peers_python, "-c", "import pymerge, sd_mecha"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("sd-mecha or pymerge is not installed beside mergekit: run `make bench-peers`")
    base = checkpoint(0, None)
    for number, name in enumerate(("base", "a", "b", "c")):
        save_file(base if not number else checkpoint(number, base), folder / f"{name}.safetensors")
    done = subprocess.run([peers_python, DRIVER, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


@pytest.mark.parametrize("case", CASES)
def test_its_own_methods_by_our_kernels(folder: Path, case: str) -> None:
    theirs = load_file(folder / "theirs" / f"{case}.safetensors")
    found = load_file(folder / "installed" / f"{case}.safetensors")
    assert theirs.keys() == found.keys() == SHAPES.keys()
    exact = case.startswith(("ties", "dare"))
    for name, expected in theirs.items():
        # interpolation: a rounding of float32 or two of values below 1
        torch.testing.assert_close(found[name], expected, rtol=0, atol=0 if exact else 1.2e-7)


@pytest.mark.parametrize("case", CASES)
def test_what_is_left_to_it_is_told(report: dict[str, Any], case: str) -> None:
    told = " ".join(report["warnings"][case])
    assert LEFT.get(case, "") in told
    assert bool(told) == (case in LEFT)


def test_uninstalled(report: dict[str, Any]) -> None:
    assert report["uninstalled"]


def test_every_method_by_tensor_is_registered(report: dict[str, Any]) -> None:
    assert report["registered"] == METHODS
    assert {"wudi", "tsv_m", "iso_c", "pcb", "model_stock", "ties", "slerp"} <= set(METHODS)
    assert not {"fisher", "regmean", "emr", "smile", "opcm"} & set(METHODS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore")
def test_registered_methods(folder: Path, method: str) -> None:
    """The same bytes as merge_tensor gives with the same parameters."""
    spec = pymerge.methods.METHODS[method].spec
    base, *models = (load_file(folder / f"{name}.safetensors") for name in ("base", "a", "b", "c"))
    models = models[: spec.max_models]
    options: dict[str, Any] = {"t": 0.3} if "t" in spec.parameters else {}
    if "weight" in spec.parameters:
        options["weight"] = [0.3, 0.4, 0.3] if len(models) > 2 else 0.4
    for scope in ("scope", "trim_scope"):
        if scope in spec.parameters:
            options[scope] = "tensor"
    found = load_file(folder / "ours" / f"{method}.safetensors")
    for name in SHAPES:
        expected = pymerge.merge_tensor(
            method,
            base[name] if spec.base == "required" else None,
            [model[name] for model in models],
            name=name,
            **options,
        )
        torch.testing.assert_close(found[name], expected, rtol=0, atol=0)


def test_recipes_as_text(folder: Path, report: dict[str, Any]) -> None:
    assert '"pymerge_wudi"' in report["text"]
    models = [load_file(folder / f"{name}.safetensors") for name in ("base", "a", "b", "c")]
    found = load_file(folder / "ours" / "from_text.safetensors")
    for name in SHAPES:
        base, *others = (model[name] for model in models)
        expected = pymerge.merge_tensor("wudi", base, others, name=name, lambda_=0.5)
        torch.testing.assert_close(found[name], expected, rtol=0, atol=0)


def test_refusals(report: dict[str, Any]) -> None:
    assert "sd-mecha merges one tensor at a time" in report["refusals"]["ties"]
    assert "expected one number or 3" in report["refusals"]["linear"]
