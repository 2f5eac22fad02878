"""What the integrations share: which host is installed, and its tensors handed to our kernels."""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pymerge.errors import BackendError, RecipeError
from pymerge.in_memory import merge_tensor
from pymerge.methods import get_method
from pymerge.methods.spec import MethodSpec
from pymerge.names import listed

if TYPE_CHECKING:
    import torch

#: Elements of which a vote by count is taken at once: what it needs beside its inputs.
VOTES = 1 << 20
#: Tensors of fewer elements are merged by the thread that asks: hosts have threads of their own.
ALONE = 1 << 18
#: Parameters that say over what a method ranks.
SCOPES = ("scope", "trim_scope")


class HostWarning(UserWarning):
    """Something of the host that pymerge leaves to it, or does in another way."""


def host_version(distribution: str, known: Sequence[str]) -> str:
    """The installed version of a host; warns where it begins with none of ``known``.

    :raises BackendError: the host is not installed.
    """
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise BackendError(
            f"{distribution} is not installed here; install it, or merge with pymerge alone"
        ) from None
    if not any(f"{version}.".startswith(f"{each}.") for each in known):
        warnings.warn(
            f"{distribution} {version}: pymerge knows {listed(known)} and was tested with no other "
            "version; what it calls may have changed",
            HostWarning,
            stacklevel=3,
        )
    return version


def merged(
    method: str,
    base: torch.Tensor | None,
    tensors: Sequence[torch.Tensor],
    *,
    dtype: torch.dtype | None = None,
    **parameters: Any,
) -> torch.Tensor:
    """:func:`pymerge.merge_tensor` of a host's tensors, wherever they are and however laid out.

    Tensors of a device are merged in host memory, with a warning, and the result goes back.

    :param dtype: of the result; default the common dtype.
    """
    device = tensors[0].device
    if device.type != "cpu":
        warnings.warn(
            f"tensors on {device} are copied to host memory, merged there and copied back",
            HostWarning,
            stacklevel=3,
        )
    given = [tensor.detach().cpu().contiguous() for tensor in tensors]
    below = None if base is None else base.detach().cpu().contiguous()
    out = None if dtype is None else str(dtype)
    if parameters.get("threads") is None and given[0].numel() < ALONE:
        parameters["threads"] = 1
    result: torch.Tensor = merge_tensor(method, below, given, out_dtype=out, **parameters)
    return result.to(device)


def by_tensor(spec: MethodSpec, given: Mapping[str, Any], host: str) -> dict[str, Any]:
    """The parameters of a method where a host hands over one tensor at a time.

    What would be ranked over the whole model is ranked within each tensor.

    :raises RecipeError: the method looks at whole models, at statistics of theirs, or makes more
        than one model.
    """
    method = get_method(spec.name)
    unable = {
        "makes more than one model": bool(method.extras),
        "reads statistics that were collected beside the models": method.reads is not None,
        "measures the whole model before it merges": spec.statistics == "model",
    }
    for why, applies in unable.items():
        if applies:
            raise RecipeError(
                f"{spec.name} {why}, but {host} merges one tensor at a time; merge with pymerge"
            )
    chosen = dict(given)
    for name in SCOPES:
        if name in spec.parameters and chosen.setdefault(name, "tensor") != "tensor":
            raise RecipeError(
                f"{spec.name}: {name}: {chosen[name]} needs the whole model, but {host} merges one "
                "tensor at a time; use tensor, or merge with pymerge"
            )
    return chosen


def elected_by_count(
    kept: Sequence[torch.Tensor], weights: Sequence[float], *, zero_sign: int
) -> torch.Tensor:
    """TIES' disjoint mean where every model has one vote, whatever the magnitude of its element.

    The sign that more of the trimmed task vectors have is elected, ``zero_sign`` (1, or 0 for none)
    where as many have the one as the other; the weighted sum of those that have it is divided by
    their number.

    :param kept: trimmed task vectors of one shape.
    :returns: float32 of that shape, on the device of ``kept``.
    """
    import torch

    out = torch.empty(kept[0].shape, dtype=torch.float32, device=kept[0].device)
    flat, vectors = out.view(-1), [each.reshape(-1) for each in kept]
    for first in range(0, flat.numel(), VOTES):
        parts = [each[first : first + VOTES].float() for each in vectors]
        votes = torch.stack([part.sign() for part in parts])
        elected = votes.sum(0).sign()
        if zero_sign:
            elected[elected == 0] = zero_sign
        agree = (votes == elected) & (votes != 0)
        total = sum(
            torch.where(mask, part, 0.0) * weight
            for mask, part, weight in zip(agree, parts, weights, strict=True)
        )
        flat[first : first + VOTES] = total / agree.sum(0).clamp(min=1)
    return out
