"""What the demo merges: one recipe per configuration, as a user would write it.

Fixed settings are the usual ones for eight tasks: task arithmetic (arXiv:2212.04089) with lambda
0.3, TIES (arXiv:2306.01708) with density 0.2 and lambda 1, which its authors recommend where
nothing can be tuned; what drops at random keeps as much as TIES does and takes task arithmetic's
lambda, the rest the methods' defaults. The task vectors here are ten times as large as those of
the vision models that WUDI's rate of 1e-5 was chosen for, and so is the rate. Where lambda is
tuned, it is tuned on the selection parts and the row is marked with a star.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml


@dataclass(frozen=True)
class Configuration:
    """One row of the table: a method, its shared parameters and those of each model.

    ``lambdas`` are tried to tune it. ``per_task`` marks a method whose output holds a model for
    each task: each is judged on its own task. ``reads`` names the statistics that it needs beside
    the experts.
    """

    name: str
    title: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, float] = field(default_factory=dict)
    lambdas: Sequence[float] = ()
    per_task: bool = False
    reads: Literal["gram", "fisher"] | None = None

    @property
    def tuned(self) -> bool:
        return bool(self.lambdas)

    def with_lambda(self, value: float) -> Configuration:
        """The untuned configuration with this lambda."""
        parameters = {**self.parameters, "lambda": value}
        title = f"{self.title} λ={value:g}*"
        return replace(self, title=title, parameters=parameters, lambdas=())


WEIGHT = {"weight": 1.0}
SPARSE = {"weight": 1.0, "density": 0.2}
SUM = {"lambda": 0.3}
TIES = {"normalize": True, "lambda": 1.0}
CONFIGURATIONS = (
    Configuration("pretrained", "base (passthrough)", "passthrough"),
    Configuration("mean", "mean (linear)", "linear", {"normalize": True}, WEIGHT),
    Configuration("karcher", "Karcher mean", "karcher"),
    Configuration("multislerp", "multi-SLERP", "multislerp", {}, WEIGHT),
    Configuration("model-stock", "Model Stock", "model_stock"),
    Configuration(
        "task-arithmetic",
        "task arithmetic λ=0.3",
        "task_arithmetic",
        {**SUM, "normalize": False},
        WEIGHT,
    ),
    Configuration("ties", "TIES λ=1", "ties", TIES, SPARSE),
    Configuration(
        "ties-model", "TIES λ=1 model-wide", "ties", {**TIES, "trim_scope": "model"}, SPARSE
    ),
    Configuration("dare-linear", "DARE λ=0.3", "dare_linear", SUM, SPARSE),
    Configuration("dare-ties", "DARE-TIES λ=0.3", "dare_ties", SUM, SPARSE),
    Configuration("della", "DELLA λ=1", "della", {}, {**SPARSE, "epsilon": 0.1}),
    Configuration(
        "della-linear", "DELLA linear λ=0.3", "della_linear", SUM, {**SPARSE, "epsilon": 0.1}
    ),
    Configuration("breadcrumbs", "Breadcrumbs λ=0.3", "breadcrumbs", SUM, SPARSE),
    Configuration("breadcrumbs-ties", "Breadcrumbs-TIES λ=0.3", "breadcrumbs_ties", SUM, SPARSE),
    Configuration("sce", "SCE", "sce", {"select_topk": 0.2}),
    Configuration("pcb", "PCB", "pcb"),
    Configuration("ram", "RAM", "ram"),
    Configuration("ramplus", "RAM+", "ramplus_tl"),
    Configuration("magmax", "MagMax λ=0.5", "magmax"),
    Configuration("consensus-ta", "Consensus TA α=0.3", "consensus_ta", {"alpha": 0.3}),
    Configuration("knots", "KnOTS λ=1", "knots"),
    Configuration("lore", "LoRE λ=1, TIES", "lore", {"merge": "ties"}),
    Configuration("opcm", "OPCM", "opcm"),
    Configuration("doge", "DOGE TA", "doge_ta"),
    Configuration("iso-c", "Iso-C λ=1", "iso_c"),
    Configuration("iso-cts", "Iso-CTS λ=1", "iso_cts"),
    Configuration("tsv-m", "TSV-M λ=1", "tsv_m"),
    Configuration("wudi", "WUDI", "wudi", {"lr": 1e-4}),
    Configuration("wudi-spectral", "WUDI spectral", "wudi", {"solver": "spectral"}),
    Configuration("optmerge", "OptMerge", "optmerge", {"lr": 1e-4}),
    Configuration("fisher", "Fisher", "fisher", reads="fisher"),
    Configuration("regmean", "RegMean", "regmean", reads="gram"),
    Configuration(
        "task-arithmetic-tuned",
        "task arithmetic",
        "task_arithmetic",
        {"normalize": False},
        WEIGHT,
        lambdas=(0.2, 0.3, 0.4, 0.5, 0.6, 0.8),
    ),
    Configuration("ties-tuned", "TIES", "ties", TIES, SPARSE, lambdas=(1.0, 1.5, 2.0)),
    Configuration("iso-c-tuned", "Iso-C", "iso_c", lambdas=(1.0, 1.5, 2.0, 2.5)),
    Configuration("tsv-m-tuned", "TSV-M", "tsv_m", lambdas=(1.0, 1.25, 1.5, 1.75)),
    Configuration("smile", "SMILE, routed", "smile", {"k": 32, "gate_k": 8}),
    Configuration("tall-masks", "TALL masks, own task", "tall_masks", per_task=True),
    Configuration("emr", "EMR, own task", "emr", per_task=True),
)


#: Methods to which the base is a model like any other, or none.
WITHOUT_BASE = ("linear", "karcher", "regmean", "fisher", "lore")


def recipe(configuration: Configuration, base: Path, experts: Sequence[Path]) -> dict[str, Any]:
    """The configuration as a recipe document for these folders."""
    method = configuration.method
    document: dict[str, Any] = {"merge_method": method}
    if method == "passthrough":
        document["models"] = [{"model": str(base)}]
    else:
        if method not in WITHOUT_BASE:
            document["base_model"] = str(base)
        own = {"parameters": dict(configuration.own)} if configuration.own else {}
        document["models"] = [{"model": str(path), **own} for path in experts]
    if configuration.parameters:
        document["parameters"] = dict(configuration.parameters)
    document["dtype"] = "float32"
    return document


def write(document: Mapping[str, Any], path: Path, comment: str) -> None:
    """The document as a YAML file that begins with ``comment``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True)
    path.write_text(f"# {comment}\n{body}", encoding="utf-8")
