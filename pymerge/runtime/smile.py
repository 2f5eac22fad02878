"""A model whose linear layers have experts, out of a folder that a merge by smile wrote."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint import TensorEntry
from pymerge.errors import CheckpointError, PymergeError
from pymerge.methods.smile_outputs import DENSE, DOWN, ROUTER, UP
from pymerge.runtime.load import read_into
from pymerge.runtime.smile_folder import SmileFolder, Upscaled, open_smile

if TYPE_CHECKING:
    import torch


def load_smile(
    folder: str | os.PathLike[str], model: Any | None = None, device: Any | None = None
) -> Any:
    """The upscaled model of a merge by smile.

    Each upscaled ``nn.Linear`` (or transformers' ``Conv1D``) is replaced by a ``SmileLinear`` with
    its weight and bias and those of its experts, which are read one tensor at a time.

    :param folder: the merged folder.
    :param model: a torch module of the base's architecture; its parameters are set to the folder's,
        in its own dtype, and its layers replaced. If not given, transformers makes the one that
        config.json names, in the folder's dtype.
    :param device: where the model goes; default where it is.
    :returns: the model, in evaluation mode where transformers made it.
    :raises CheckpointError: the folder is no such merge or is damaged.
    :raises PymergeError: transformers does not have the architecture, or the model does not fit.
    """
    opened = open_smile(os.fspath(folder))
    if model is None:
        model = _from_config(opened)
    else:
        _check_layers(opened, model)
        _set_parameters(opened, model)
    if device is not None:
        model.to(device)
    _check_layers(opened, model)
    for layer in opened.modules:
        parent, _, last = layer.name.rpartition(".")
        made = _smile_linear()(model.get_submodule(layer.name), layer)
        setattr(model.get_submodule(parent), last, made)
    return model


def _from_config(opened: SmileFolder) -> Any:
    """The base model, made by transformers."""
    folder, config = opened.checkpoint.folder, opened.checkpoint.config or {}
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    try:
        import transformers
    except ImportError as error:
        raise PymergeError(
            f"load_smile needs transformers to make the model of {folder} ({error}); install it, "
            "or give a torch module as model"
        ) from error
    architecture: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    if not hasattr(architecture, "from_pretrained"):
        raise PymergeError(
            f"{folder}, config.json, architectures: expected a class of transformers "
            f"{transformers.__version__}, found {names}; give a torch module as model"
        )
    old = int(transformers.__version__.partition(".")[0]) < 5
    return architecture.from_pretrained(folder, **{"torch_dtype" if old else "dtype": "auto"})


def _set_parameters(opened: SmileFolder, model: torch.nn.Module) -> None:
    """Give a module the folder's tensors, one at a time."""
    import torch

    own = model.state_dict(keep_vars=True)
    for name, entry in opened.checkpoint.tensors.items():
        if name not in own or tuple(own[name].shape) != entry.shape:
            found = list(own[name].shape) if name in own else "none"
            raise PymergeError(
                f"load_smile: expected tensor {name!r} {list(entry.shape)} in the model, found "
                f"{found}; give a module of the architecture of {opened.checkpoint.reference}"
            )
        if own[name].is_meta:
            raise PymergeError(
                f"load_smile: the model's tensor {name!r} has no memory; give a module that is "
                "not on the meta device, or leave model out"
            )
        with torch.no_grad():
            own[name].copy_(read_tensor(entry))


def _check_layers(opened: SmileFolder, model: torch.nn.Module) -> None:
    """:raises PymergeError: an upscaled layer is not one of the model's linear layers."""
    modules = dict(model.named_modules())
    for layer in opened.modules:
        found = modules.get(layer.name)
        wanted = "Conv1D" if layer.transposed else "Linear"
        if type(found).__name__ != wanted or tuple(found.weight.shape) != layer.weight.shape:  # type: ignore[union-attr]
            raise PymergeError(
                f"load_smile: expected the model's {layer.name} to be a {wanted} with a weight "
                f"{list(layer.weight.shape)}, found {found}; give the architecture that was "
                "merged, or merge again with this layer in exclude"
            )


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """A tensor of a file.

    :raises CheckpointError: torch has no such dtype.
    :raises StorageError: it cannot be read.
    """
    import torch

    dtype = getattr(torch, entry.format.torch_name or "", None)
    if dtype is None:
        raise CheckpointError(
            f"{entry.file}, tensor {entry.name!r}: torch has no dtype for {entry.format.name}"
        )
    made: torch.Tensor = torch.empty(entry.shape, dtype=dtype)
    if entry.num_bytes:
        read_into(entry, 0, made.reshape(-1).view(torch.uint8).numpy())
    return made


@cache
def _smile_linear() -> Any:
    """The class SmileLinear; torch is imported when it is asked for."""
    import torch
    from torch.nn import functional

    class SmileLinear(torch.nn.Module):
        """A linear layer with experts: y = W x + b + Σ pᵢ·(upᵢ·downᵢ·x + Δbᵢ).

        ``weight`` and ``bias`` are those of the layer that it stands for, of [inputs, outputs]
        where ``transposed``. ``up`` [N, outputs, k] and ``down`` [N, k, inputs], or ``dense`` [N,
        \\*weight's shape]; ``router`` [N, gate_k, inputs]; ``bias_delta`` [N, outputs] or None; all
        trainable. Routing is in float32 at least, whatever the dtype of the layer.
        """

        weight: torch.nn.Parameter
        bias: torch.nn.Parameter | None
        up: torch.nn.Parameter
        down: torch.nn.Parameter
        dense: torch.nn.Parameter | None
        router: torch.nn.Parameter
        bias_delta: torch.nn.Parameter | None

        def __init__(self, base: Any, layer: Upscaled) -> None:
            super().__init__()
            self.out_features, self.in_features = layer.shape
            self.num_experts, self.top_k = layer.num_experts, layer.top_k
            self.transposed = layer.transposed
            self.weight, self.bias = base.weight, base.bias
            for name, extra in (("up", UP), ("down", DOWN), ("dense", DENSE), ("router", ROUTER)):
                entry = layer.parts.get(extra.suffix)
                value = None if entry is None else read_tensor(entry)
                self.register_parameter(name, self._parameter(value))
            delta = None
            if layer.bias is not None:
                rows = read_tensor(layer.bias)
                delta = rows.new_zeros((layer.num_experts, self.out_features))
                for expert, row in enumerate(layer.bias_rows):
                    if row is not None:
                        delta[expert] = rows[row]
            self.register_parameter("bias_delta", self._parameter(delta))
            self.train(base.training)

        def _parameter(self, value: torch.Tensor | None) -> torch.nn.Parameter | None:
            if value is None:
                return None
            like = self.weight
            value = value.to(device=like.device, dtype=like.dtype)
            return torch.nn.Parameter(value, requires_grad=like.requires_grad)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = x.reshape(-1, self.in_features)
            weight = self.weight.t() if self.transposed else self.weight
            shared = functional.linear(tokens, weight, self.bias)
            shares, chosen = self.route(tokens)
            added = torch.zeros_like(shared)
            for expert in range(self.num_experts):
                rows, places = torch.where(chosen == expert)
                if not rows.numel():
                    continue
                part = self._expert(expert, tokens[rows])
                part = part * shares[rows, places, None].to(part.dtype)
                added = added.index_add(0, rows, part.to(added.dtype))
            return (shared + added).reshape(*x.shape[:-1], self.out_features)

        def route(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """The shares [tokens, top_k] and numbers of the experts that each token goes to."""
            inside = functional.linear(tokens, self.router.flatten(0, 1))
            inside = inside.to(torch.promote_types(inside.dtype, torch.float32))
            logits = inside.reshape(len(tokens), *self.router.shape[:2]).norm(dim=-1)
            shares, chosen = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
            return shares / shares.sum(dim=-1, keepdim=True), chosen

        def _expert(self, number: int, tokens: torch.Tensor) -> torch.Tensor:
            bias = None if self.bias_delta is None else self.bias_delta[number]
            if self.dense is not None:
                weight = self.dense[number]
                weight = weight.t() if self.transposed else weight
                return functional.linear(tokens, weight, bias)
            inner = functional.linear(tokens, self.down[number])
            return functional.linear(inner, self.up[number], bias)

        def extra_repr(self) -> str:
            rank = "dense" if self.dense is not None else f"k={self.down.shape[1]}"
            return (
                f"in_features={self.in_features}, out_features={self.out_features}, "
                f"experts={self.num_experts}, top_k={self.top_k}, {rank}, "
                f"gate_k={self.router.shape[1]}"
            )

    SmileLinear.__qualname__ = "SmileLinear"
    return SmileLinear


def __getattr__(name: str) -> Any:
    if name == "SmileLinear":
        return _smile_linear()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
