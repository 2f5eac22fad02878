"""Where each merge method is: its name in the recipe and the module of this folder.

A module is imported when one of its methods is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping

MODULES: Mapping[str, str] = {
    "arcee_fusion": "arcee_fusion",
    "breadcrumbs": "breadcrumbs",
    "breadcrumbs_ties": "breadcrumbs",
    "consensus_ta": "consensus_ta",
    "dare_linear": "dare",
    "dare_ties": "dare",
    "della": "della",
    "della_linear": "della",
    "doge_ta": "doge_ta",
    "emr": "emr",
    "fisher": "fisher",
    "iso_c": "iso_c",
    "iso_cts": "iso_cts",
    "karcher": "karcher",
    "knots": "knots",
    "linear": "linear",
    "lore": "lore",
    "magmax": "magmax",
    "model_stock": "model_stock",
    "multislerp": "multislerp",
    "nearswap": "nearswap",
    "nuslerp": "nuslerp",
    "opcm": "opcm",
    "optmerge": "optmerge",
    "passthrough": "passthrough",
    "pcb": "pcb",
    "ram": "ram",
    "ramplus_tl": "ram",
    "regmean": "regmean",
    "sce": "sce",
    "slerp": "slerp",
    "smile": "smile",
    "tall_masks": "tall_masks",
    "task_arithmetic": "task_arithmetic",
    "ties": "ties",
    "tsv_m": "tsv_m",
    "wudi": "wudi",
}
