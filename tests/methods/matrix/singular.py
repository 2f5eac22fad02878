"""The authors' formulas of TSV-M, Iso-C and Iso-CTS in float64, by SVD; and task vectors to merge.

``rank_of`` says how many singular values of a matrix count: all of them, as for the authors, or
those that are not negligible.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

Array = np.ndarray
Svd = tuple[Array, Array, Array]
NAME = "model.layers.0.mlp.up_proj"


def svd(x: Array, cut: float | None, scale: float | None = None) -> Svd:
    """Without the directions below ``cut`` times the largest value, or times ``scale``."""
    left, values, right = np.linalg.svd(x, full_matrices=False)
    if cut is not None and len(values):
        kept = int((values > cut * (values[0] if scale is None else scale)).sum())
        left, values, right = left[:, :kept], values[:kept], right[:kept]
    return left, values, right


def polar(x: Array, cut: float | None = None) -> Array:
    left, _, right = svd(x, cut)
    return left @ right


def tsv_m(
    deltas: Sequence[Array], weights: Sequence[float] | None = None, cut: float | None = None
) -> Array:
    keep = min(deltas[0].shape) // len(deltas)
    weights = [1.0] * len(deltas) if weights is None else weights
    parts = [svd(w * delta.astype(float), cut) for w, delta in zip(weights, deltas, strict=True)]
    left = np.hstack([part[0][:, :keep] for part in parts])
    values = np.concatenate([part[1][:keep] for part in parts])
    right = np.vstack([part[2][:keep] for part in parts])
    return polar(left, cut) * values @ polar(right, cut)


def iso_c(
    deltas: Sequence[Array], weights: Sequence[float] | None = None, cut: float | None = None
) -> Array:
    weights = [1.0] * len(deltas) if weights is None else weights
    total = sum(w * delta.astype(float) for w, delta in zip(weights, deltas, strict=True))
    left, values, right = svd(total, cut)
    return values.sum() / min(total.shape) * (left @ right)


def iso_cts(
    deltas: Sequence[Array],
    weights: Sequence[float] | None = None,
    cut: float | None = None,
    fraction: float = 0.8,
) -> Array:
    weights = [1.0] * len(deltas) if weights is None else weights
    deltas = [w * delta.astype(float) for w, delta in zip(weights, deltas, strict=True)]
    rank, num = min(deltas[0].shape), len(deltas)
    of_tasks = round((rank - int(rank * fraction)) / num) * num
    common = rank - of_tasks
    left, values, right = (part for part in svd(sum(deltas), cut))
    basis = left[:, :common]
    parts = [(basis, values[:common], right[:common])]
    for delta in deltas:
        u, s, v = svd(delta - basis @ (basis.T @ delta), cut, float(np.linalg.norm(delta)))
        parts.append((u[:, : of_tasks // num], s[: of_tasks // num], v[: of_tasks // num]))
    left = polar(np.hstack([part[0] for part in parts]), cut)
    mean = sum(part[1].sum() for part in parts) / rank
    return mean * (left @ polar(np.vstack([part[2] for part in parts]), cut))


ORACLES: dict[str, Callable[..., Array]] = {"tsv_m": tsv_m, "iso_c": iso_c, "iso_cts": iso_cts}


def task_vectors(
    rows: int, columns: int, num: int, *, decay: float = 0.7, seed: int = 0
) -> list[Array]:
    """Float32 matrices whose singular values fall as ``j ** -decay``."""
    generator = np.random.default_rng(seed)
    rank = min(rows, columns)
    found = []
    for _ in range(num):
        left = np.linalg.qr(generator.normal(size=(rows, rank)))[0]
        right = np.linalg.qr(generator.normal(size=(columns, rank)))[0]
        values = 0.1 * np.arange(1, rank + 1) ** -decay
        found.append((left * values @ right.T).astype(np.float32))
    return found


def noise(rows: int, columns: int, num: int) -> list[Array]:
    """Float32 matrices of independent elements."""
    return list(np.random.default_rng(3).normal(size=(num, rows, columns)).astype(np.float32))


def low_rank(rows: int, columns: int, num: int, rank: int, *, seed: int = 0) -> list[Array]:
    """Float64 products of ``rank`` columns and rows."""
    generator = np.random.default_rng(seed)
    return [
        0.01 * generator.normal(size=(rows, rank)) @ generator.normal(size=(rank, columns))
        for _ in range(num)
    ]


def difference(found: Array | torch.Tensor, expected: Array) -> float:
    """Relative to the expected matrix's norm."""
    return float(np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected))


def write_adapters(
    folder: Path, rows: int, columns: int, num: int, rank: int
) -> tuple[Array, list[Array], dict[str, object]]:
    """A base of one matrix with adapters: its weights, the adapters' products, and a recipe's
    inputs."""
    generator = np.random.default_rng(5)

    def draw(*shape: int) -> Array:
        return generator.normal(0, 0.05, shape).astype(np.float32)

    base = draw(rows, columns)
    (folder / "base").mkdir(parents=True)
    tensors = {f"{NAME}.weight": base, "model.norm.weight": draw(columns)}
    save_file(tensors, folder / "base" / "model.safetensors", {"format": "pt"})
    (folder / "base" / "config.json").write_text('{"model_type": "llama"}')
    deltas = []
    for index in range(num):
        left, right = draw(rows, rank), draw(rank, columns)
        place = folder / f"adapter{index}"
        place.mkdir()
        keys = {f"{NAME}.lora_A.weight": right, f"{NAME}.lora_B.weight": left}
        save_file(
            {f"base_model.model.{key}": value for key, value in keys.items()},
            place / "adapter_model.safetensors",
        )
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["up_proj"]}
        (place / "adapter_config.json").write_text(json.dumps(config))
        deltas.append(left.astype(float) @ right)
    models = [{"model": f"{folder}/base+{folder}/adapter{index}"} for index in range(num)]
    return base, deltas, {"base_model": str(folder / "base"), "models": models, "dtype": "float32"}
