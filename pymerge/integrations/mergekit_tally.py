"""What was done for mergekit and what was left to it, in numbers; and saying so once."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

LOG = logging.getLogger("pymerge.mergekit")


class Tally:
    """``merges`` run by our engine, of these ``planned`` by it, too; ``tensors`` that it merged or
    copied, ``left`` to mergekit: how many tensors, by the reason; ``whole``: merges that mergekit
    ran altogether, by the reason."""

    def __init__(self) -> None:
        self.merges = 0
        self.planned = 0
        self.tensors = 0
        self.left: Counter[str] = Counter()
        self.whole: Counter[str] = Counter()

    def leave(self, reasons: Counter[str]) -> None:
        """Tensors that mergekit computes itself."""
        for reason, count in reasons.items():
            LOG.warning(
                "pymerge leaves %d tensor%s to mergekit: %s", count, "s"[: count != 1], reason
            )
        self.left.update(reasons)

    def leave_whole(self, reason: str) -> None:
        """A merge that mergekit runs itself."""
        LOG.warning("pymerge leaves this merge to mergekit: %s", reason)
        self.whole[reason] += 1

    def as_dict(self) -> dict[str, Any]:
        return {
            "merges": self.merges,
            "planned": self.planned,
            "tensors": self.tensors,
            "left": dict(self.left),
            "whole": dict(self.whole),
        }


#: Of this process.
TALLY = Tally()
