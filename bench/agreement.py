"""Do two checkpoints hold the same model? The gate before any figure is printed.

    python bench/agreement.py OURS THEIRS

Prints one JSON object: whether names, shapes and types agree, and the largest relative difference
of a tensor, ||ours - theirs|| / ||theirs||.
"""

from __future__ import annotations

import argparse
import json
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
            self.where.update(dict.fromkeys(file.keys(), file))

    def layout(self) -> dict[str, tuple[list[int], str]]:
        slices = {name: file.get_slice(name) for name, file in self.where.items()}
        return {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}

    def rows(self, name: str, first: int) -> torch.Tensor:
        return self.where[name].get_slice(name)[first : first + ROWS].double()


def relative_difference(ours: Weights, theirs: Weights, name: str, num_rows: int) -> float:
    difference, size = 0.0, 0.0
    for first in range(0, num_rows, ROWS):
        reference = theirs.rows(name, first)
        difference += float((ours.rows(name, first) - reference).square().sum())
        size += float(reference.square().sum())
    return (difference / size) ** 0.5 if size else difference**0.5


def compare(ours: Weights, theirs: Weights) -> dict[str, Any]:
    layouts = ours.layout(), theirs.layout()
    report: dict[str, Any] = {
        "num_tensors": [len(layout) for layout in layouts],
        "same_layout": layouts[0] == layouts[1],
    }
    if report["same_layout"]:
        differences = {
            name: relative_difference(ours, theirs, name, shape[0])
            for name, (shape, _) in layouts[0].items()
        }
        worst = max(differences, key=lambda name: differences[name])
        report |= {"largest_relative_difference": differences[worst], "in_tensor": worst}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare two checkpoint folders.")
    parser.add_argument("ours", type=Path)
    parser.add_argument("theirs", type=Path)
    arguments = parser.parse_args()
    print(json.dumps(compare(Weights(arguments.ours), Weights(arguments.theirs))))


if __name__ == "__main__":
    main()
