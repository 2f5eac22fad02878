"""Fisher diagonals of every parameter (arXiv 2111.09832)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.adaptive.collector import Collector, linear_input
from pymerge.adaptive.exact import float32_products
from pymerge.adaptive.masks import checked_mask
from pymerge.adaptive.per_example import Call, add_squares, by_example
from pymerge.adaptive.save import Part, write_statistics
from pymerge.adaptive.scores import batch_score, example_scores
from pymerge.checkpoint.statistics import ESTIMATORS
from pymerge.errors import PymergeError
from pymerge.names import shown

if TYPE_CHECKING:
    from types import TracebackType

    import torch
    from torch import nn
    from typing_extensions import Self

    from pymerge.adaptive.layers import LinearWeight


class FisherCollector(Collector):
    """Means over the examples of squared gradients, one float32 number for each parameter.

    Parameters need gradients for the length of the block, whatever ``requires_grad`` says, and no
    ``grad`` is touched. Weights and biases of linear layers come from one backward pass a batch;
    all other parameters from one for each example of it, so that batches of one example are as
    cheap as it gets where those count.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        only: Iterable[str] | None = None,
        masks: bool = True,
        estimator: str = "monte_carlo",
        seed: int = 0,
    ) -> None:
        if estimator not in ESTIMATORS:
            raise PymergeError(
                f"collect: expected the estimator {', '.join(ESTIMATORS)}, found {shown(estimator)}"
            )
        super().__init__(model, only, masks)
        self.estimator = estimator
        self.examples = 0
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._parameters = {
            name: parameter
            for name, parameter in model.named_parameters()
            if name in self._names and parameter.is_floating_point()
        }
        self._name_of = {id(parameter): name for name, parameter in self._parameters.items()}
        self._sums: dict[str, torch.Tensor] = {}
        self._calls: list[Call] = []
        self._lengths: set[int] = set()
        self._mask: torch.Tensor | None = None
        self._paused = False
        self._before_needs: dict[str, bool] = {}

    def backward(
        self,
        logits: torch.Tensor | None = None,
        *,
        labels: torch.Tensor | None = None,
        losses: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> None:
        """Add one batch: called in the block, once after each call of the model, in place of a
        loss's ``backward``.

        :param logits: [examples, classes], or [examples, positions, classes]: an example is then
            the sequence, and its positions' labels are independent given the inputs.
        :param labels: for the estimator empirical: the class of each row of ``logits``, negative
            where there is none. A language model's are shifted by one, which is left to the caller.
        :param losses: for the estimator empirical instead of logits and labels: one loss for each
            example, a negative log-likelihood of any kind.
        :param mask: which positions of ``logits`` [examples, positions] are real; default: the mask
            of the model's call.
        :raises PymergeError: the estimator needs something else, or what is given carries no
            gradient or does not fit the call.
        """
        import torch

        if not self._handles:
            raise PymergeError("collect: expected backward within the with block, found it outside")
        given = logits if losses is None else losses
        if given is not None and not isinstance(given, torch.Tensor):
            raise PymergeError(
                f"collect: expected logits or losses as a tensor, found {type(given).__name__}; "
                "give the output's logits"
            )
        if given is None or not given.requires_grad:
            raise PymergeError(
                "collect: expected logits or losses that carry a gradient, found "
                f"{'none' if given is None else 'some without'}; call the model within the with "
                "block and outside torch.no_grad()"
            )
        real = checked_mask(mask) if mask is not None else self._mask
        with self._pausing(), torch.enable_grad():
            if self.estimator == "mergelm":
                num = self._add_batch(batch_score(logits, labels, losses, real), len(given))
            else:
                scores = example_scores(
                    self.estimator, logits, labels, losses, real, self._generator(given.device)
                )
                num = self._add_examples(scores, given)
        self.examples += num
        for name in self._parameters:
            self._sum(name)
        self._calls.clear()
        self._lengths.clear()
        self._mask = None

    def fisher(self, name: str) -> torch.Tensor:
        """The mean squared gradient of a parameter, float32 of its shape.

        :raises PymergeError: there is no such parameter, or no example was seen.
        """
        if name not in self._sums:
            raise PymergeError(
                f"collect: expected a parameter that has seen examples, found {shown(name)}; there "
                f"are {len(self._sums)} of those"
            )
        return self._sums[name] / self.examples

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write the means as ``pymerge-statistics/fisher.safetensors`` beside a checkpoint.

        What is there of another kind stays, what is there of this one is replaced.

        :returns: the folder ``pymerge-statistics``.
        :raises PymergeError: no example was seen, or a gradient was not finite.
        :raises CheckpointError: the checkpoint in the folder has no such weights.
        :raises StorageError: writing failed.
        """
        if not self.examples:
            raise PymergeError(
                "collect: expected examples, found none; call collector.backward(logits) after "
                "each call of the model"
            )
        squares: list[float] = []

        def pieces(name: str) -> Iterator[Any]:
            mean = self.fisher(name).cpu().reshape(-1)
            total = float(mean.double().square().sum())
            if not math.isfinite(total):
                raise PymergeError(
                    f"collect: expected finite gradients of {shown(name)}, found NaN, infinity or "
                    "values whose squares float32 cannot hold; run the model in a wider format"
                )
            squares.append(total)
            yield mean.numpy()

        shapes = {name: tuple(self._parameters[name].shape) for name in self._sums}
        return write_statistics(
            Path(folder),
            "fisher",
            [Part(name, shape, lambda n=name: pieces(n)) for name, shape in shapes.items()],  # type: ignore[misc]
            lambda: {
                "norm": math.sqrt(math.fsum(squares)),
                "examples": self.examples,
                "estimator": self.estimator,
            },
            shapes=shapes,
        )

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            for name, parameter in self._parameters.items():
                self._before_needs[name] = parameter.requires_grad
                parameter.requires_grad_(True)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        for name, needs in self._before_needs.items():
            self._parameters[name].requires_grad_(needs)
        self._before_needs.clear()
        self._calls.clear()
        self._lengths.clear()
        self._mask = None

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._paused:
            return
        super()._before(module, args, kwargs)
        rows = self._rows
        self._mask = None if rows is None else rows.mask
        if rows is not None:
            self._lengths.add(int(rows.mask.shape[1]))
        self._lengths |= {
            int(value.shape[1])
            for value in (*args, *kwargs.values())
            if hasattr(value, "is_floating_point")
            and value.ndim == 2
            and not value.is_floating_point()
        }

    def _hook(self, linear: LinearWeight, module: nn.Module) -> Any:
        from torch.autograd.graph import get_gradient_edge

        def after(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
        ) -> torch.Tensor:
            x = linear_input(args, kwargs)
            if x is None or self._paused or not output.requires_grad:
                return output
            # An operation in place on a view (an activation after the layer) goes around the view's
            # place in the graph, where the gradient would never appear.
            output = output.clone() if output._is_view() else output
            bias = self._name_of.get(id(module._parameters.get("bias")))
            edge = get_gradient_edge(output)
            self._calls.append(Call.of(linear, bias, x, edge))
            return output

        return module.register_forward_hook(after, with_kwargs=True)

    @contextmanager
    def _pausing(self) -> Iterator[None]:
        """A backward pass that calls layers again, as checkpointing does, records nothing."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _generator(self, device: torch.device) -> torch.Generator:
        import torch

        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]

    def _sum(self, name: str) -> torch.Tensor:
        """Where the squares of a parameter are added up."""
        import torch

        if name not in self._sums:
            parameter = self._parameters[name]
            with torch.inference_mode(False):
                self._sums[name] = torch.zeros(
                    parameter.shape, dtype=torch.float32, device=parameter.device
                )
        return self._sums[name]

    def _add_batch(self, score: torch.Tensor, num: int) -> int:
        """Squares of the gradient of the whole batch."""
        import torch

        grads = torch.autograd.grad(score, list(self._parameters.values()), allow_unused=True)
        self._add_grads(self._parameters, grads)
        return num

    def _add_examples(self, scores: Iterator[torch.Tensor], given: torch.Tensor) -> int:
        """Squares of each example's gradient, summed over the scores [examples]."""
        import torch

        linear = {call.linear.name for call in self._calls}
        linear |= {call.bias for call in self._calls if call.bias is not None}
        linear -= self._shared_biases()
        rest = {name: p for name, p in self._parameters.items() if name not in linear}
        edges = [call.edge for call in self._calls]
        num = 0
        for number, score in enumerate(scores):
            num = len(score)
            inputs = [*edges, *(rest.values() if num == 1 else ())]
            # The graph is freed with the batch; which backward is the last is not known here.
            grads: list[Any] = []
            if inputs:
                grads = list(
                    torch.autograd.grad(score.sum(), inputs, retain_graph=True, allow_unused=True)
                )
            if number == 0 and edges and all(grad is None for grad in grads[: len(edges)]):
                raise PymergeError(
                    "collect: expected logits of the model's latest call, found some that none of "
                    "its linear layers had a part in; call backward once after each call"
                )
            if number == 0:
                self._check_calls(grads[: len(edges)], num, given)
            for example in range(num) if num > 1 and rest else ():
                self._add_grads(
                    rest,
                    torch.autograd.grad(
                        score[example], list(rest.values()), retain_graph=True, allow_unused=True
                    ),
                )
            if num == 1:
                self._add_grads(rest, grads[len(edges) :])
            self._add_linears(grads[: len(edges)], linear, num)
        return num

    def _check_calls(self, grads: list[Any], num: int, given: torch.Tensor) -> None:
        """Refuse a batch before any of it is added: the sums stay good for those that follow."""
        lengths, pooled = set(self._lengths), given.ndim <= 2
        if not pooled:
            lengths.add(math.prod(given.shape[1:-1]))
        for call, grad in zip(self._calls, grads, strict=True):
            if grad is not None:
                call.check(num, lengths, pooled)

    def _shared_biases(self) -> set[str]:
        """Biases of several modules: their gradients are sums that no one layer sees."""
        users: dict[str, set[int]] = {}
        for module in self.model.modules():
            for parameter in module.parameters(recurse=False):
                name = self._name_of.get(id(parameter))
                if name is not None:
                    users.setdefault(name, set()).add(id(module))
        biases = {call.bias for call in self._calls if call.bias is not None}
        return {name for name in biases if len(users[name]) > 1}

    def _add_grads(self, parameters: Iterable[str], grads: Iterable[torch.Tensor | None]) -> None:
        for name, grad in zip(parameters, grads, strict=True):
            total = self._sum(name)
            if grad is not None:
                total += grad.detach().float().square()

    def _add_linears(self, grads: list[Any], linear: set[str], num: int) -> None:
        by_weight: dict[str, list[tuple[Call, Any]]] = {}
        for call, grad in zip(self._calls, grads, strict=True):
            by_weight.setdefault(call.linear.name, []).append((call, grad))
        for name, calls in by_weight.items():
            with float32_products(calls[0][0].x.device):
                pairs = [
                    (by_example(call.x, num), by_example(grad, num))
                    for call, grad in calls
                    if grad is not None
                ]
                add_squares(self._sum(name), pairs, transposed=calls[0][0].linear.transposed)
                by_bias: dict[str, list[torch.Tensor]] = {}
                used = [call for call, grad in calls if grad is not None]
                for call, (_, g) in zip(used, pairs, strict=True):
                    if call.bias in linear and call.bias is not None:
                        by_bias.setdefault(call.bias, []).append(g.sum(1))
                for bias, sums in by_bias.items():
                    self._sum(bias).add_(sum(sums[1:], sums[0]).square().sum(0))
