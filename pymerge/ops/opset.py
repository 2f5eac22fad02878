"""The ops that one merge uses, each from the backend chosen for it, chosen once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pymerge.ops.dispatch import choose, function


class OpSet:
    """Ops as attributes: ``ops.axpy_n(...)`` is the op of the backend that was chosen.

    ``backends`` maps op to backend, ``reasons`` op to why each preferred backend was passed over.
    """

    def __init__(
        self,
        functions: Mapping[str, Callable[..., Any]],
        backends: Mapping[str, str],
        reasons: Mapping[str, Mapping[str, str]],
    ) -> None:
        self._functions = dict(functions)
        self.backends = dict(backends)
        self.reasons = {op: dict(why) for op, why in reasons.items()}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        try:
            return self.__dict__["_functions"][name]  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError(f"op {name!r} is not part of this plan") from None


def choose_ops(names: Iterable[str], *, asked: str | None = None) -> OpSet:
    """Choose a backend for each op.

    :param asked: the backend's name where the user wants a certain one; default:
        ``PYMERGE_BACKEND``.
    :raises BackendError: the backend asked for does not exist or cannot run here; the message says
        why.
    """
    choices = {name: choose(name, asked) for name in dict.fromkeys(names)}
    return OpSet(
        {name: function(name, choice.backend) for name, choice in choices.items()},
        {name: choice.backend for name, choice in choices.items()},
        {name: choice.passed_over for name, choice in choices.items()},
    )
