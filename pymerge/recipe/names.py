"""Names that users write, and the nearest ones that exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

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

#: Parameters that change nothing in any method.
WITHOUT_EFFECT = frozenset({"int8_mask"})

_MIN_RATIO = 0.6
_MIN_AFFIX = 4


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` most resembles, or None where it resembles none.

    Upper case, dashes and underscores do not count; a beginning or an end of four characters or
    more is a resemblance too (``base`` for ``base_model``).
    """
    folded: dict[str, str] = {}
    for candidate in known:
        folded.setdefault(_fold(candidate), candidate)
    wanted = _fold(name)
    matches = difflib.get_close_matches(wanted, folded, n=1, cutoff=_MIN_RATIO)
    if matches:
        return folded[matches[0]]
    if len(wanted) >= _MIN_AFFIX:
        for text, candidate in folded.items():
            if text.startswith(wanted) or text.endswith(wanted):
                return candidate
    return None


def _fold(name: str) -> str:
    return name.casefold().replace("-", "").replace("_", "").strip()


def listed(names: Iterable[str]) -> str:
    """The names in order of the alphabet, for a sentence."""
    return ", ".join(sorted(names))
