"""Where adapters are computed."""

from __future__ import annotations

from pymerge.errors import BackendError
from pymerge.machine import compute_threads
from pymerge.names import shown
from pymerge.ops.workspace import Workspace


def workspace(threads: int | None, device: str) -> Workspace:
    """The workspace on a device by torch's name. Raises BackendError where there is none."""
    import torch

    try:
        kind = torch.device(device).type
        if kind not in ("cpu", "cuda"):
            raise RuntimeError(f"pymerge computes on cpu and cuda, not on {kind}")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BackendError(
            f"device: expected a device that torch can use here, found {shown(device)}: {reason}"
        ) from None
    return Workspace(compute_threads(threads), device)
