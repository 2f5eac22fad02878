"""Names of the dialect's parameters."""

from __future__ import annotations

#: Parameters of mergekit 0.1.5. One that the chosen method does not have is only a warning.
MERGEKIT_PARAMETERS = (
    "alpha",
    "density",
    "eps",
    "epsilon",
    "filter_wise",
    "gamma",
    "int8_mask",
    "lambda",
    "max_iter",
    "normalize",
    "normalize_weights",
    "nuslerp_flatten",
    "nuslerp_row_wise",
    "r",
    "rescale",
    "scale",
    "select_topk",
    "t",
    "tol",
    "weight",
)

#: Methods of mergekit 0.1.5: a name among them is no misspelling of another.
MERGEKIT_METHODS = frozenset(
    {
        "arcee_fusion",
        "breadcrumbs",
        "breadcrumbs_ties",
        "dare_linear",
        "dare_ties",
        "della",
        "della_linear",
        "karcher",
        "linear",
        "model_stock",
        "multislerp",
        "nearswap",
        "nuslerp",
        "passthrough",
        "ram",
        "ramplus_tl",
        "sce",
        "slerp",
        "task_arithmetic",
        "ties",
    }
)

#: Parameters that change nothing in any method.
WITHOUT_EFFECT = frozenset({"int8_mask"})
