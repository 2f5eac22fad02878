"""Do two checkpoints hold the same model? The gate before any figure is printed.

    python bench/agreement.py OURS THEIRS BASE

Prints one JSON object: whether names, shapes and types agree, the largest relative difference of a
tensor, ||ours - theirs|| / ||theirs||, and the ratio of the updates of the whole model,
||ours - base|| / ||theirs - base||.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

ROWS = 4096  # of a tensor at a time, so that memory stays small


class Weights:
    """The tensors of a folder's safetensors files, read on demand."""

    def __init__(self, folder: Path) -> None:
        self.where: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, framework="pt")
            names: list[str] = file.offset_keys()  # type: ignore[no-untyped-call]
            self.where.update(dict.fromkeys(names, file))

    def layout(self) -> dict[str, tuple[list[int], str]]:
        slices = {name: file.get_slice(name) for name, file in self.where.items()}
        return {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}

    def rows(self, name: str, first: int) -> torch.Tensor:
        rows: torch.Tensor = self.where[name].get_slice(name)[first : first + ROWS]
        return rows.double()


def compare(ours: Weights, theirs: Weights, base: Weights) -> dict[str, Any]:
    layouts = ours.layout(), theirs.layout()
    report: dict[str, Any] = {
        "num_tensors": [len(layout) for layout in layouts],
        "same_layout": layouts[0] == layouts[1],
    }
    if not report["same_layout"]:
        return report
    updates = [0.0, 0.0]
    differences = {}
    for name, (shape, _) in layouts[0].items():
        difference, size = 0.0, 0.0
        for first in range(0, shape[0], ROWS):
            sides = ours.rows(name, first), theirs.rows(name, first)
            origin = base.rows(name, first)
            difference += squared(sides[0] - sides[1])
            size += squared(sides[1])
            updates = [sum_ + squared(x - origin) for sum_, x in zip(updates, sides, strict=True)]
        differences[name] = math.sqrt(difference / size if size else difference)
    worst = max(differences, key=lambda name: differences[name])
    report |= {"largest_relative_difference": differences[worst], "in_tensor": worst}
    report["update_ratio"] = math.sqrt(updates[0] / updates[1]) if updates[1] else None
    return report


def squared(values: torch.Tensor) -> float:
    return float(values.square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare two checkpoint folders.")
    parser.add_argument("ours", type=Path)
    parser.add_argument("theirs", type=Path)
    parser.add_argument("base", type=Path)
    arguments = parser.parse_args()
    folders = arguments.ours, arguments.theirs, arguments.base
    print(json.dumps(compare(*map(Weights, folders))))


if __name__ == "__main__":
    main()
