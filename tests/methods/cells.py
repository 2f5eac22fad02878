"""One merge, at least, of every method, small enough for an emulator.

Run as a script it prints the digests of all results on a backend:

    python tests/methods/cells.py cuda
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, field
from typing import Any

import torch

import pymerge
from pymerge.methods import METHODS

#: 64 rows of odd length, so that rows and spans and vectors all end in the middle of one another.
SHAPE = (64, 131)


@dataclass(frozen=True)
class Cell:
    """A method with its parameters and how many models it merges."""

    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    num_models: int = 3
    base: bool = True
    diagonals: bool = False


def _weighted(**parameters: Any) -> dict[str, Any]:
    return {"weight": [0.5, 0.3, 0.4], **parameters}


def _gram(seed: int) -> torch.Tensor:
    inputs = torch.randn(300, SHAPE[1], generator=torch.Generator().manual_seed(seed))
    return inputs.T @ inputs / 300


GRAMS = [_gram(seed) for seed in range(3)]
CELLS = {
    "arcee_fusion": Cell("arcee_fusion", num_models=1),
    "breadcrumbs": Cell("breadcrumbs", _weighted(density=0.4, gamma=0.02)),
    "breadcrumbs-official": Cell("breadcrumbs", _weighted(preset="official", density=0.3)),
    "breadcrumbs_ties": Cell("breadcrumbs_ties", _weighted(density=0.4, gamma=0.02)),
    "consensus_ta": Cell("consensus_ta"),
    "dare_linear": Cell("dare_linear", _weighted(density=0.4, seed=5)),
    "dare_linear-official": Cell("dare_linear", _weighted(density=0.4, preset="official")),
    "dare_ties": Cell("dare_ties", _weighted(density=0.4, seed=5)),
    "della": Cell("della", _weighted(density=0.5, epsilon=0.2)),
    "della-official": Cell("della", _weighted(density=0.5, epsilon=0.2, preset="official")),
    "della_linear": Cell("della_linear", _weighted(density=0.5, epsilon=0.2)),
    "doge_ta": Cell("doge_ta", {"steps": 5}),
    "emr": Cell("emr"),
    "fisher": Cell("fisher", _weighted(), base=False, diagonals=True),
    "fisher-official": Cell("fisher", {"preset": "official"}, base=False, diagonals=True),
    "iso_c": Cell("iso_c", _weighted(lambda_=1.5)),
    "iso_cts": Cell("iso_cts"),
    "karcher": Cell("karcher", base=False),
    "knots": Cell("knots"),
    "linear": Cell("linear", _weighted(), base=False),
    "lore": Cell("lore", {"merge": "ties", "iterations": 3}, base=False),
    "magmax": Cell("magmax"),
    "model_stock": Cell("model_stock"),
    "model_stock-rows": Cell("model_stock", {"filter_wise": True}),
    "multislerp": Cell("multislerp", _weighted()),
    "nearswap": Cell("nearswap", {"t": 0.002}, num_models=1),
    "nuslerp": Cell("nuslerp", {"weight": [0.4, 0.7]}, num_models=2, base=False),
    "nuslerp-columns": Cell(
        "nuslerp",
        {"weight": [0.4, 0.7], "nuslerp_flatten": False, "nuslerp_row_wise": True},
        num_models=2,
    ),
    "nuslerp-rows": Cell("nuslerp", {"weight": [0.4, 0.7], "nuslerp_flatten": False}, num_models=2),
    "opcm": Cell("opcm"),
    "optmerge": Cell("optmerge", {"steps": 3}),
    "passthrough": Cell("passthrough", {"scale": 0.7}, num_models=1, base=False),
    "pcb": Cell("pcb"),
    "ram": Cell("ram"),
    "ramplus_tl": Cell("ramplus_tl"),
    "ramplus_tl-official": Cell("ramplus_tl", {"preset": "official"}),
    "regmean": Cell("regmean", {"statistics": GRAMS}, base=False),
    "sce": Cell("sce", {"select_topk": 0.3}),
    "slerp": Cell("slerp", {"t": 0.3}, num_models=1),
    "smile": Cell("smile", {"k": 3, "gate_k": 2}),
    "tall_masks": Cell("tall_masks"),
    "task_arithmetic": Cell("task_arithmetic", _weighted(lambda_=0.9)),
    "tsv_m": Cell("tsv_m"),
    "ties": Cell("ties", _weighted(density=0.3)),
    "ties-model": Cell("ties", _weighted(density=0.3, trim_scope="model")),
    "ties-official": Cell("ties", _weighted(density=0.3, preset="official")),
    "wudi": Cell("wudi", {"steps": 5, "lr": 1e-4}),
    "wudi-spectral": Cell("wudi", {"solver": "spectral"}),
    "ties-rescale": Cell("ties", _weighted(density=0.3, rescale=True)),
}


def inputs(num_models: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A bfloat16 base and models of three formats, full of equal magnitudes."""
    generator = torch.Generator().manual_seed(11)
    base = 0.02 * torch.randn(SHAPE, generator=generator)
    base = base.bfloat16()
    formats = (torch.bfloat16, torch.float32, torch.float16)
    models = [
        (base.float() + 2e-3 * torch.randn(SHAPE, generator=generator))
        .bfloat16()
        .to(formats[i % 3])
        for i in range(num_models)
    ]
    return base, models


def diagonals(num_models: int) -> list[torch.Tensor]:
    """Squares over many magnitudes, as those of gradients are."""
    generator = torch.Generator().manual_seed(12)
    return [torch.exp(4 * torch.randn(SHAPE, generator=generator) - 9) for _ in range(num_models)]


def digest(name: str, backend: str) -> str:
    """SHA-256 of the result of a cell."""
    cell = CELLS[name]
    base, models = inputs(cell.num_models)
    given = {"statistics": diagonals(cell.num_models)} if cell.diagonals else {}
    result = pymerge.merge_tensor(
        cell.method,
        base if cell.base else None,
        models,
        backend=backend,
        **given,
        **cell.parameters,
    )
    found = hashlib.sha256()
    parts = result.values() if isinstance(result, dict) else result
    for part in (parts,) if isinstance(parts, torch.Tensor) else parts:
        array = part.contiguous().view(torch.uint8) if isinstance(part, torch.Tensor) else part
        found.update(bytes(array.numpy()) if isinstance(array, torch.Tensor) else bytes(array))
    return found.hexdigest()


def values(name: str, backend: str) -> list[float]:
    """What a cell of one tensor adds to the base, for methods whose bytes a device may change."""
    cell = CELLS[name]
    merged = pymerge.merge_tensor(
        cell.method,
        inputs(cell.num_models)[0] if cell.base else None,
        inputs(cell.num_models)[1],
        backend=backend,
        out_dtype="float32",
        **cell.parameters,
    )
    if isinstance(merged, dict):  # singular vectors have no sign of their own
        products: list[float] = (merged["smile.up"] @ merged["smile.down"]).flatten().tolist()
        return products
    found: list[float] = (merged - inputs(0)[0].float()).flatten().tolist()
    return found


def main() -> None:
    """Print name → digest, or the error's sentence, as JSON; of methods of matrices the values of
    their result, too."""
    backend = sys.argv[1]
    found: dict[str, Any] = {}
    for name in CELLS:
        try:
            found[name] = digest(name, backend)
        except pymerge.PymergeError as error:
            found[name] = f"error: {error}"
        if METHODS[CELLS[name].method].cost is not None:
            try:
                found[f"{name}/values"] = values(name, backend)
            except pymerge.PymergeError as error:
                found[f"{name}/values"] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
