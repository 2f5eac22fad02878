"""The ops that one merge uses, each from the backend chosen for it, chosen once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pymerge.formats import F32, Format
from pymerge.ops.dispatch import choose_together, function
from pymerge.ops.view import Buffer, host_buffer

Allocate = Callable[[int, Format], Buffer]


class OpSet:
    """Ops as attributes: ``ops.axpy_n(...)`` is the op of the backend that was chosen.

    ``backends`` maps op to backend, ``reasons`` op to why each preferred backend was passed over.
    All ops of a set work on the same memory, the host's or a device's; ``buffer`` allocates there.
    """

    def __init__(
        self,
        functions: Mapping[str, Callable[..., Any]],
        backends: Mapping[str, str],
        reasons: Mapping[str, Mapping[str, str]],
        allocate: Allocate = host_buffer,
    ) -> None:
        self._functions = dict(functions)
        self._allocate = allocate
        self.backends = dict(backends)
        self.reasons = {op: dict(why) for op, why in reasons.items()}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        try:
            return self.__dict__["_functions"][name]  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError(f"op {name!r} is not part of this plan") from None

    def buffer(self, num: int, format: Format = F32) -> Buffer:
        """Uninitialised scratch elements that the ops can work on, until it is dropped."""
        return self._allocate(num, format)

    def allocating(self, allocate: Allocate) -> OpSet:
        """The same ops with buffers from ``allocate``."""
        return OpSet(self._functions, self.backends, self.reasons, allocate)


def choose_ops(names: Iterable[str], *, asked: str | None = None) -> OpSet:
    """Choose a backend for each op, all of one memory.

    :param asked: the backend's name where the user wants a certain one; default:
        ``PYMERGE_BACKEND``.
    :raises BackendError: the backend asked for does not exist or cannot run here; the message says
        why.
    """
    choices = choose_together(names, asked)
    return OpSet(
        {name: function(name, choice.backend) for name, choice in choices.items()},
        {name: choice.backend for name, choice in choices.items()},
        {name: choice.passed_over for name, choice in choices.items()},
    )
