"""What the demo merges: one recipe per configuration, as a user would write it.

Fixed settings are the usual ones for eight tasks: task arithmetic (arXiv:2212.04089) with lambda
0.3, TIES (arXiv:2306.01708) with density 0.2 and lambda 1, which its authors recommend where
nothing can be tuned. Where lambda is tuned, it is tuned on the selection parts and the row is
marked with a star.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Configuration:
    """One row of the table: a method and its parameters; ``lambdas`` are tried to tune it."""

    name: str
    title: str
    method: str
    parameters: Mapping[str, Any]
    density: float | None = None
    lambdas: Sequence[float] = ()

    @property
    def tuned(self) -> bool:
        return bool(self.lambdas)

    def with_lambda(self, value: float) -> Configuration:
        """The untuned configuration with this lambda."""
        parameters = {**self.parameters, "lambda": value}
        title = f"{self.title} λ={value:g}*"
        return replace(self, title=title, parameters=parameters, lambdas=())


TIES = {"normalize": True, "lambda": 1.0}
CONFIGURATIONS = (
    Configuration("pretrained", "base (passthrough)", "passthrough", {}),
    Configuration("mean", "mean (linear)", "linear", {"normalize": True}),
    Configuration(
        "task-arithmetic",
        "task arithmetic λ=0.3",
        "task_arithmetic",
        {"normalize": False, "lambda": 0.3},
    ),
    Configuration("ties", "TIES λ=1", "ties", TIES, density=0.2),
    Configuration(
        "ties-model",
        "TIES λ=1 model-wide",
        "ties",
        {**TIES, "trim_scope": "model"},
        density=0.2,
    ),
    Configuration(
        "task-arithmetic-tuned",
        "task arithmetic",
        "task_arithmetic",
        {"normalize": False},
        lambdas=(0.2, 0.3, 0.4, 0.5, 0.6, 0.8),
    ),
    Configuration(
        "ties-tuned",
        "TIES",
        "ties",
        TIES,
        density=0.2,
        lambdas=(1.0, 1.5, 2.0),
    ),
)


def recipe(configuration: Configuration, base: Path, experts: Sequence[Path]) -> dict[str, Any]:
    """The configuration as a recipe document for these folders."""
    method = configuration.method
    document: dict[str, Any] = {"merge_method": method}
    if method == "passthrough":
        document["models"] = [{"model": str(base)}]
    else:
        if method != "linear":
            document["base_model"] = str(base)
        own: dict[str, float] = {"weight": 1.0}
        if configuration.density is not None:
            own["density"] = configuration.density
        document["models"] = [{"model": str(path), "parameters": dict(own)} for path in experts]
    if configuration.parameters:
        document["parameters"] = dict(configuration.parameters)
    document["dtype"] = "float32"
    return document


def write(document: Mapping[str, Any], path: Path, comment: str) -> None:
    """The document as a YAML file that begins with ``comment``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True)
    path.write_text(f"# {comment}\n{body}", encoding="utf-8")
