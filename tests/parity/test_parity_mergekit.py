"""The same recipe through mergekit 0.1.5 and through pymerge, compared tensor by tensor.

In float32 every method but TIES must agree to 2 units in the last place of the larger operand,
element by element (mergekit's own last bit depends on how its torch was built). TIES leaves open
which of several equal magnitudes survive, so there the kept count and the kept magnitudes must be
equal for each model, and the merge must agree wherever both programs kept the same entries.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pymerge = pytest.importorskip("pymerge")

DRIVER = Path(__file__).with_name("drive_mergekit.py")

#: Recipes whose outputs must agree everywhere. {x} stands for the folder of the checkpoint x.
#: The gradients sum to one in every layer: each program is up to 2.5 units from the exact value
#: where it divides by a sum that is not, and rare elements would be 3 units apart with nobody at
#: fault.
EXACT = {
    "linear": """
        merge_method: linear
        models:
          - {model: {a}, parameters: {weight: 0.3}}
          - {model: {b}, parameters: {weight: 0.5}}
          - {model: {c}, parameters: {weight: 0.9}}
        dtype: float32
    """,
    "linear-not-normalized": """
        merge_method: linear
        models:
          - {model: {a}, parameters: {weight: 0.3}}
          - {model: {b}, parameters: {weight: 0.5}}
        parameters: {normalize: false}
        dtype: float32
    """,
    "linear-base-among-the-models": """
        merge_method: linear
        base_model: {base}
        models:
          - {model: {base}, parameters: {weight: 0.5}}
          - {model: {a}, parameters: {weight: 1.0}}
        dtype: float32
    """,
    "task-arithmetic": """
        merge_method: task_arithmetic
        base_model: {base}
        models:
          - {model: {base}}
          - {model: {a}, parameters: {weight: 0.4}}
          - {model: {b}, parameters: {weight: 0.7}}
          - {model: {c}, parameters: {weight: -0.2}}
        parameters: {lambda: 0.8}
        dtype: float32
    """,
    "task-arithmetic-normalized-base-not-listed": """
        merge_method: task_arithmetic
        base_model: {base}
        models:
          - {model: {a}, parameters: {weight: 0.4}}
          - {model: {b}, parameters: {weight: 0.7}}
        parameters: {normalize: true}
        dtype: float32
    """,
    "task-arithmetic-weights-cancel": """
        merge_method: task_arithmetic
        base_model: {base}
        models:
          - {model: {a}, parameters: {weight: 0.5}}
          - {model: {b}, parameters: {weight: -0.5}}
        parameters: {normalize: true}
        dtype: float32
    """,
    "passthrough": """
        merge_method: passthrough
        models: [{model: {a}}]
        dtype: float32
    """,
    "passthrough-scale": """
        merge_method: passthrough
        models:
          - model: {a}
            parameters:
              scale: [{filter: down_proj, value: 0.5}, {value: 1.0}]
        dtype: float32
    """,
    "slices-stacked": """
        merge_method: passthrough
        slices:
          - sources: [{model: {a}, layer_range: [0, 3]}]
          - sources: [{model: {b}, layer_range: [1, 4]}]
          - sources: [{model: {deep}, layer_range: [4, 6]}]
        dtype: float32
    """,
    "slices-empty-slice-gives-the-embedding": """
        merge_method: passthrough
        slices:
          - sources: [{model: {b}, layer_range: [0, 0]}]
          - sources: [{model: {a}, layer_range: [1, 3]}]
        dtype: float32
    """,
    "slices-parameters-per-slice": """
        merge_method: linear
        slices:
          - sources:
              - {model: {a}, layer_range: [0, 2], parameters: {weight: 0.25}}
              - {model: {b}, layer_range: [1, 3]}
            parameters: {weight: 2.0, normalize: false}
          - sources:
              - {model: {a}, layer_range: [2, 3]}
              - {model: {deep}, layer_range: [5, 6], parameters: {weight: [0.1, 0.2, 0.6]}}
        parameters: {weight: 0.7}
        dtype: float32
    """,
    "slices-task-arithmetic-gradient-restarts": """
        merge_method: task_arithmetic
        base_model: {base}
        slices:
          - sources:
              - {model: {base}, layer_range: [0, 3]}
              - {model: {a}, layer_range: [0, 3], parameters: {weight: [0.0, 1.0]}}
          - sources:
              - {model: {base}, layer_range: [3, 4]}
              - {model: {a}, layer_range: [3, 4], parameters: {weight: [0.25, 0.75]}}
            parameters: {lambda: 0.5}
        dtype: float32
    """,
    "slices-base-of-one-slice": """
        merge_method: task_arithmetic
        base_model: {base}
        slices:
          - sources:
              - {model: {base}, layer_range: [0, 2]}
              - {model: {a}, layer_range: [0, 2], parameters: {weight: 0.5}}
          - base_model: {b}
            sources:
              - {model: {b}, layer_range: [2, 4]}
              - {model: {a}, layer_range: [2, 4], parameters: {weight: 0.5}}
        dtype: float32
    """,
    "gradients": """
        merge_method: linear
        models:
          - {model: {a}, parameters: {weight: [0.1, 0.3, 0.7]}}
          - {model: {b}, parameters: {weight: [0.7, 0.5, 0.1]}}
          - {model: {c}, parameters: {weight: [0.2]}}
        dtype: float32
    """,
    "filters-at-every-scope": """
        merge_method: task_arithmetic
        base_model: {base}
        models:
          - model: {a}
            parameters:
              weight:
                - {filter: mlp.down_proj, value: 0.125}
                - {filter: mlp, value: [0.2, 0.9]}
                - {filter: embed_tokens, value: 0.0}
          - model: {b}
            parameters: {weight: {filter: self_attn, value: 0.6}}
        parameters:
          weight: [{filter: layers.2, value: 0.05}, {value: 0.35}]
          lambda: [{filter: norm, value: 0.5}, {filter: "*", value: [1.0, 1.5, 0.75]}]
        dtype: float32
    """,
    "tied": """
        merge_method: linear
        models:
          - {model: {base-tied}, parameters: {weight: 0.5}}
          - {model: {a-tied}, parameters: {weight: 1.5}}
        dtype: float32
    """,
    "tied-with-untied": """
        merge_method: task_arithmetic
        base_model: {base}
        models:
          - {model: {a-tied}, parameters: {weight: 0.5}}
          - {model: {a}, parameters: {weight: 0.5}}
        dtype: float32
    """,
    "dtype-promoted": """
        merge_method: linear
        models:
          - {model: {a-bf16}, parameters: {weight: 0.5}}
          - {model: {c-f16}, parameters: {weight: 0.25}}
    """,
    "dtype-out": """
        merge_method: linear
        models:
          - {model: {a}, parameters: {weight: 0.5}}
          - {model: {c-f16}, parameters: {weight: 0.25}}
        dtype: float32
        out_dtype: bfloat16
    """,
    "dtype-bfloat16": """
        merge_method: linear
        models:
          - {model: {a-bf16}, parameters: {weight: 0.5}}
          - {model: {b-bf16}, parameters: {weight: 0.25}}
        dtype: bfloat16
    """,
    "dtype-task-arithmetic-out": """
        merge_method: task_arithmetic
        base_model: {base-bf16}
        models:
          - {model: {a-bf16}, parameters: {weight: 0.5}}
          - {model: {b-bf16}, parameters: {weight: 0.25}}
        dtype: float32
        out_dtype: float16
    """,
}


@dataclass(frozen=True)
class Ties:
    """A TIES merge of several models with their densities, and the same models one by one."""

    base: str
    densities: dict[str, float]
    weights: tuple[float, ...]
    shared: str

    def recipe(self) -> str:
        lines = [
            f"  - {{model: {{{model}}}, parameters: {{weight: {weight}, density: {density}}}}}"
            for (model, density), weight in zip(self.densities.items(), self.weights, strict=True)
        ]
        return self._document(lines, self.shared)

    def alone(self, model: str) -> str:
        """Weight 1 and lambda 1: output minus base are the kept entries of ``model``."""
        density = self.densities[model]
        line = f"  - {{model: {{{model}}}, parameters: {{weight: 1.0, density: {density}}}}}"
        return self._document([line], "{lambda: 1.0}")

    def _document(self, models: list[str], shared: str) -> str:
        head = ["merge_method: ties", f"base_model: {{{self.base}}}", "models:", *models]
        return "\n".join([*head, f"parameters: {shared}", "dtype: float32"])


TIES = {
    "ties": Ties("base", {"a": 0.2, "b": 0.5, "c": 0.8}, (1.0, 0.7, 0.4), "{normalize: true}"),
    "ties-not-normalized": Ties("base", {"a": 0.3, "b": 0.3}, (1.0, -0.5), "{normalize: false}"),
    "ties-equal-magnitudes": Ties(
        "base-bf16", {"a-bf16": 0.2, "b-bf16": 0.5}, (1.0, 1.0), "{lambda: 0.6, int8_mask: true}"
    ),
}


@dataclass(frozen=True)
class Pair:
    """One recipe's output folders, and the folders it read."""

    theirs: Path
    ours: Path
    inputs: tuple[Path, ...]


def all_recipes() -> dict[str, str]:
    recipes = dict(EXACT)
    for name, ties in TIES.items():
        recipes[name] = ties.recipe()
        recipes |= {f"{name}-{model}": ties.alone(model) for model in ties.densities}
    return recipes


@pytest.fixture(scope="module")
def pairs(
    peers_python: Path, llamas: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Pair]:
    """Every recipe through mergekit, in one process, and through pymerge."""
    work = tmp_path_factory.mktemp("parity")
    folders = sorted(llamas.iterdir())
    jobs, pairs = [], {}
    for name, text in all_recipes().items():
        used = []
        for folder in folders:
            if f"{{{folder.name}}}" in text:
                text = text.replace(f"{{{folder.name}}}", str(folder))
                used.append(folder)
        recipe = work / f"{name}.yaml"
        recipe.write_text(text)
        pairs[name] = Pair(work / "theirs" / name, work / "ours" / name, tuple(used))
        jobs.append({"recipe": str(recipe), "out": str(pairs[name].theirs)})
    job_file = work / "jobs.json"
    job_file.write_text(json.dumps(jobs))
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0"}
    subprocess.run([peers_python, DRIVER, job_file], check=True, env=environment)
    for job, pair in zip(jobs, pairs.values(), strict=True):
        pymerge.merge(job["recipe"], pair.ours)
    return pairs


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    error = folder / "error.txt"
    assert not error.exists(), error.read_text()
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same_layout(pair: Pair) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Both outputs, after checking that names, shapes and types agree."""
    theirs, ours = tensors(pair.theirs), tensors(pair.ours)
    layout = [{k: (t.shape, t.dtype) for k, t in side.items()} for side in (theirs, ours)]
    assert layout[0] == layout[1]
    return theirs, ours


def ulp(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The spacing of ``dtype`` at |x|, for normal numbers."""
    info = torch.finfo(dtype)
    exponent = np.floor(np.log2(np.maximum(np.abs(x), info.smallest_normal)))
    return np.exp2(exponent) * info.eps


def larger_operand(pair: Pair, name: str, shape: torch.Size) -> np.ndarray | float:
    """The largest magnitude that any input has at each place of the tensor.

    A stacked model's layers come from elsewhere: there, the largest magnitude of any input tensor.
    """
    inputs = [tensors(folder) for folder in pair.inputs]
    if "slices" in pair.ours.name or any(name not in model for model in inputs):
        return max(float(t.abs().max()) for model in inputs for t in model.values())
    return np.max([model[name].double().abs().numpy() for model in inputs], axis=0)


@pytest.mark.parametrize("name", EXACT)
def test_agrees_within_two_units_in_the_last_place(pairs: dict[str, Pair], name: str) -> None:
    pair = pairs[name]
    theirs, ours = same_layout(pair)
    for tensor, reference in theirs.items():
        expected, found = reference.double().numpy(), ours[tensor].double().numpy()
        operand = np.maximum(larger_operand(pair, tensor, reference.shape), np.abs(expected))
        units = np.abs(found - expected) / ulp(operand, reference.dtype)
        assert units.max() <= 2, f"{tensor}: {units.max():.1f} units apart at {units.argmax()}"


@pytest.mark.parametrize("name", EXACT)
def test_config_agrees(pairs: dict[str, Pair], name: str) -> None:
    theirs, ours = (
        json.loads((folder / "config.json").read_text())
        for folder in (pairs[name].theirs, pairs[name].ours)
    )
    keys = ["architectures", "num_hidden_layers", "vocab_size", "hidden_size", "model_type"]
    if name != "dtype-promoted":  # mergekit keeps the donor's dtype whatever it wrote
        keys.append("dtype")
    assert {key: ours.get(key) for key in keys} == {key: theirs.get(key) for key in keys}


def kept(pair: Pair, base: dict[str, torch.Tensor]) -> tuple[dict[str, np.ndarray], ...]:
    """What both programs kept of the only model of a TIES merge: output minus base per tensor."""
    return tuple(
        {name: (tensor.double() - base[name].double()).numpy() for name, tensor in side.items()}
        for side in same_layout(pair)
    )


@pytest.mark.parametrize(
    ("name", "model"), [(name, model) for name, ties in TIES.items() for model in ties.densities]
)
def test_ties_keeps_as_many_and_as_large(
    pairs: dict[str, Pair], llamas: Path, name: str, model: str
) -> None:
    ties = TIES[name]
    base, tuned = tensors(llamas / ties.base), tensors(llamas / model)
    theirs, ours = kept(pairs[f"{name}-{model}"], base)
    for tensor, expected in theirs.items():
        found = ours[tensor]
        delta = (tuned[tensor].float() - base[tensor].float()).abs().numpy().ravel()
        largest = np.sort(delta)[::-1][: int(ties.densities[model] * delta.size)]
        count = np.count_nonzero(largest)
        assert np.count_nonzero(expected) == np.count_nonzero(found) == count, tensor
        # base + delta is rounded to float32, which moves a kept entry by at most half a unit of
        # base.
        rounding = float(ulp(base[tensor].double().abs().max().numpy(), torch.float32))
        magnitudes = [np.sort(np.abs(side).ravel())[::-1][:count] for side in (expected, found)]
        assert np.abs(magnitudes[0] - magnitudes[1]).max() <= rounding, tensor
        assert np.abs(magnitudes[1] - largest[:count]).max() <= rounding, tensor


@pytest.mark.parametrize("name", TIES)
def test_ties_agrees_where_the_masks_agree(pairs: dict[str, Pair], llamas: Path, name: str) -> None:
    ties = TIES[name]
    base = tensors(llamas / ties.base)
    same_mask = {tensor: np.ones(value.shape, dtype=bool) for tensor, value in base.items()}
    for model in ties.densities:
        theirs, ours = kept(pairs[f"{name}-{model}"], base)
        for tensor in same_mask:
            same_mask[tensor] &= (theirs[tensor] != 0) == (ours[tensor] != 0)
    theirs, ours = same_layout(pairs[name])
    num_same = sum(int(mask.sum()) for mask in same_mask.values())
    assert num_same > 0.95 * sum(mask.size for mask in same_mask.values())
    for tensor, mask in same_mask.items():
        expected, found = theirs[tensor].double().numpy(), ours[tensor].double().numpy()
        operand = np.maximum(
            larger_operand(pairs[name], tensor, base[tensor].shape), np.abs(expected)
        )
        units = np.abs(found - expected) / ulp(operand, torch.float32)
        assert units[mask].max() <= 2, f"{tensor}: {units[mask].max():.1f} units apart"
