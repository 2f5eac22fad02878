"""A model as a chain of blocks: what each block is called with, so that one can be run alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from pymerge.adaptive.masks import RealRows, checked_mask
from pymerge.errors import PymergeError
from pymerge.names import nearest, shown

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Arguments by which a block would read or lengthen a cache of earlier calls.
_CACHES = {"past_key_values": None, "past_key_value": None, "use_cache": False}


@dataclass
class BlockCall:
    """One batch: its hidden states, and for each block the other arguments of its call."""

    hidden: torch.Tensor
    by_keyword: str | None
    others: list[tuple[tuple[Any, ...], dict[str, Any]]]
    real: RealRows | None

    def run(self, block: nn.Module, number: int) -> torch.Tensor:
        """What a block, the merged model's or an expert's, makes of the hidden states."""
        args, kwargs = self.others[number]
        device = next((p.device for p in block.parameters()), self.hidden.device)
        args, kwargs = moved(args, device), moved(kwargs, device)
        hidden = self.hidden.to(device)
        if self.by_keyword is not None:
            output = block(*args, **{self.by_keyword: hidden}, **kwargs)
        else:
            output = block(hidden, *args, **kwargs)
        return first_tensor(output)


def check_blocks(merged: nn.Module, experts: Sequence[nn.Module], blocks: Sequence[str]) -> None:
    """The models have the same parameters, and blocks that share none of theirs.

    Raises PymergeError.
    """
    if isinstance(blocks, str) or not blocks:
        _refuse("names of blocks in order", shown(blocks), "name the model's layers")
    if any(expert is merged for expert in experts):
        _refuse(
            "a model of its own to merge into",
            "one of the experts, which would be overwritten",
            "give a copy",
        )
    shapes = _shapes(merged)
    for number, expert in enumerate(experts):
        found = _shapes(expert)
        if found != shapes:
            odd = sorted(set(found.items()) ^ set(shapes.items()), key=str)[0][0]
            _refuse(
                "experts with the parameters of the merged model",
                f"expert {number} differs in {shown(odd)}: {found.get(odd, 'none there')} instead "
                f"of {shapes.get(odd, 'none')}",
                "merge models of one architecture and one format",
            )
    modules = dict(merged.named_modules())
    users: dict[int, str] = {}
    for name in blocks:
        if name not in modules or not name:
            like = nearest(name, modules)
            _refuse(
                "blocks that are modules of the model",
                shown(name),
                f"is {like!r} meant?" if like else "see its named_modules()",
            )
        for parameter in modules[name].parameters():
            other = users.setdefault(id(parameter), name)
            if other != name:
                _refuse(
                    "blocks with parameters of their own",
                    f"some that {other!r} and {name!r} share",
                    "a shared block cannot be fitted where it comes first alone; use regmean",
                )


def capture_calls(
    merged: nn.Module, blocks: Sequence[str], data: Iterable[Any], expert: int
) -> list[BlockCall]:
    """Call the model with each batch and keep what its blocks get.

    Raises PymergeError where the blocks do not follow each other as they are named.
    """
    calls = []
    for batch in data:
        recorder = _Recorder(merged, blocks)
        mask = None
        with recorder:
            if isinstance(batch, Mapping):
                mask = batch.get("attention_mask")
                merged(**batch)
            elif isinstance(batch, tuple | list):
                merged(*batch)
            else:
                merged(batch)
        real = None if mask is None or mask.ndim != 2 else checked_mask(mask)
        calls.append(recorder.call(None if real is None else RealRows(real)))
    if not calls:
        _refuse("batches for every expert", f"none for expert {expert}", "give it some of its data")
    return calls


class _Recorder:
    """Hooks on the blocks for one call of the model."""

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        self._model = model
        self._blocks = blocks
        self._handles: list[Any] = []
        self._seen: list[str] = []
        self._hidden: torch.Tensor | None = None
        self._output: torch.Tensor | None = None
        self._by_keyword: str | None = None
        self._others: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __enter__(self) -> None:
        for name in self._blocks:
            module = self._model.get_submodule(name)
            self._handles += [
                module.register_forward_pre_hook(self._before(name), with_kwargs=True),
                module.register_forward_hook(self._after),
            ]

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def call(self, real: RealRows | None) -> BlockCall:
        if self._seen != list(self._blocks) or self._hidden is None:
            _refuse(
                f"the model to call its blocks once each and in the order {list(self._blocks)}",
                f"{self._seen}",
                "name the blocks in the order of their calls",
            )
        return BlockCall(self._hidden, self._by_keyword, self._others, real)

    def _before(self, name: str) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            others = dict(kwargs)
            keyword = None
            if args:
                hidden, args = args[0], args[1:]
            else:
                keyword = next(iter(others), None)
                hidden = others.pop(keyword) if keyword is not None else None
            if not hasattr(hidden, "shape"):
                _refuse("hidden states as a block's first argument", shown(hidden), "see blocks")
            if self._hidden is None:
                self._hidden, self._by_keyword = hidden.detach().clone(), keyword
            elif not _same(hidden, self._output) or keyword != self._by_keyword:
                _refuse(
                    "each block to get what the one before it returned",
                    f"{name!r} gets something else",
                    "name blocks that follow each other with nothing between them",
                )
            self._seen.append(name)
            others.update({key: value for key, value in _CACHES.items() if key in others})
            self._others.append((args, others))

        return before

    def _after(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._output = first_tensor(output)


def first_tensor(output: Any) -> torch.Tensor:
    """The hidden states that a block returns, alone or first of several values."""
    tensor: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return tensor


def moved(value: Any, device: torch.device) -> Any:
    """Arguments with their tensors on a device."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(moved(item, device) for item in value)
    if type(value) is dict:
        return {key: moved(item, device) for key, item in value.items()}
    return value


def _same(left: torch.Tensor, right: torch.Tensor | None) -> bool:
    import torch

    return right is not None and (left is right or torch.equal(left, right))


def _shapes(model: nn.Module) -> dict[str, str]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}


def _refuse(expected: str, found: str, advice: str) -> NoReturn:
    raise PymergeError(f"regmean_plus_plus: expected {expected}, found {found}; {advice}")
