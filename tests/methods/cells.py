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

#: 64 rows of odd length, so that rows and spans and vectors all end in the middle of one another.
SHAPE = (64, 131)


@dataclass(frozen=True)
class Cell:
    """A method with its parameters and how many models it merges."""

    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    num_models: int = 3
    base: bool = True


def _weighted(**parameters: Any) -> dict[str, Any]:
    return {"weight": [0.5, 0.3, 0.4], **parameters}


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
    "emr": Cell("emr"),
    "karcher": Cell("karcher", base=False),
    "linear": Cell("linear", _weighted(), base=False),
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
    "passthrough": Cell("passthrough", {"scale": 0.7}, num_models=1, base=False),
    "pcb": Cell("pcb"),
    "ram": Cell("ram"),
    "ramplus_tl": Cell("ramplus_tl"),
    "ramplus_tl-official": Cell("ramplus_tl", {"preset": "official"}),
    "sce": Cell("sce", {"select_topk": 0.3}),
    "slerp": Cell("slerp", {"t": 0.3}, num_models=1),
    "tall_masks": Cell("tall_masks"),
    "task_arithmetic": Cell("task_arithmetic", _weighted(lambda_=0.9)),
    "ties": Cell("ties", _weighted(density=0.3)),
    "ties-model": Cell("ties", _weighted(density=0.3, trim_scope="model")),
    "ties-official": Cell("ties", _weighted(density=0.3, preset="official")),
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


def digest(name: str, backend: str) -> str:
    """SHA-256 of the result of a cell."""
    cell = CELLS[name]
    base, models = inputs(cell.num_models)
    result = pymerge.merge_tensor(
        cell.method, base if cell.base else None, models, backend=backend, **cell.parameters
    )
    found = hashlib.sha256()
    for part in result if isinstance(result, tuple) else (result,):
        array = part.contiguous().view(torch.uint8) if isinstance(part, torch.Tensor) else part
        found.update(bytes(array.numpy()) if isinstance(array, torch.Tensor) else bytes(array))
    return found.hexdigest()


def main() -> None:
    """Print name → digest, or the error's sentence, as JSON."""
    backend = sys.argv[1]
    found = {}
    for name in CELLS:
        try:
            found[name] = digest(name, backend)
        except pymerge.PymergeError as error:
            found[name] = f"error: {error}"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
