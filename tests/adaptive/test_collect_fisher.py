"""Fisher diagonals against autograd, example by example and label by label, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import pymerge
from pymerge.errors import PymergeError

#: Relative, in norm: gradients and their squares are float32.
BOUND = 1e-5


class Classifier(nn.Module):
    """Everything that has a parameter of its own: a table, a gain, a bias, a loose vector."""

    def __init__(self, positions=None):
        super().__init__()
        self.embed, self.norm = nn.Embedding(9, 6), nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6, bias=False)
        self.head = nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6))
        self.per_position = positions

    def forward(self, ids, attention_mask=None):
        x = self.norm(self.embed(ids))
        x = x + self.down(torch.tanh(self.up(x)))
        x = x + self.down(torch.relu_(self.up(x * self.scale)))
        return self.head(x if self.per_position else x[:, -1])


def brute_force(model, batches, score):
    """Σ of squared gradients of what ``score`` yields for each example, by name, in float64."""
    wide = copy.deepcopy(model).double()
    parameters = dict(wide.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for batch in batches:
        for example in range(len(batch)):
            for value in score(wide(batch[example : example + 1])[0], example):
                grads = torch.autograd.grad(
                    value, parameters.values(), retain_graph=True, allow_unused=True
                )
                for name, grad in zip(parameters, grads, strict=True):
                    total[name] += 0 if grad is None else grad**2
    num = sum(map(len, batches))
    return {name: value / num for name, value in total.items()}


def all_classes(logits, _):
    log_p = torch.log_softmax(logits, -1)
    for c in range(len(log_p)):
        yield log_p[c].detach().exp().sqrt() * log_p[c]


def check(collector, expected, bound=BOUND):
    for name, value in expected.items():
        found = collector.fisher(name).double()
        assert found.shape == value.shape
        assert (found - value).norm() <= bound * value.norm(), name


@pytest.fixture
def model():
    torch.manual_seed(5)
    return Classifier().eval()


@pytest.fixture
def ids():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(9, (n, 3), generator=generator) for n in (4, 1, 3)]


def test_exact(model, ids):
    with pymerge.collect(model, "fisher", estimator="exact") as collector:
        for batch in ids:
            collector.backward(model(batch))
    assert collector.examples == 8
    check(collector, brute_force(model, ids, all_classes))


def test_rows_by_themselves_take_one_product():
    """A net of linear layers on single rows: (G⊙G)ᵀ(X⊙X) is exact."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    x = torch.randn(12, 5)
    with pymerge.collect(model, "fisher", estimator="exact") as collector:
        collector.backward(model(x))

    def score(logits, _):
        return all_classes(logits, None)

    wide = brute_force(model, [x.double()], score)
    check(collector, wide, 1e-6)


def test_monte_carlo_is_unbiased_and_its_seed_decides(ids):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(4000, 4)

    def run(estimator, **seed):
        with pymerge.collect(model, "fisher", estimator=estimator, **seed) as collector:
            collector.backward(model(x))
        return collector.fisher("0.weight")

    exact, first = run("exact"), run("monte_carlo", seed=1)
    # 4000 draws: the relative error of a mean of them is of the order of 1/sqrt(4000) = 1.6 %.
    assert (first - exact).norm() <= 0.06 * exact.norm()
    assert torch.equal(first, run("monte_carlo", seed=1))
    assert not torch.equal(first, run("monte_carlo", seed=2))


def test_empirical_by_labels_and_by_losses(model, ids):
    labels = [torch.arange(len(batch)) % 4 for batch in ids]
    flat = torch.cat(labels)
    numbers = iter(range(len(flat)))
    by_label, by_loss = (pymerge.collect(model, "fisher", estimator="empirical") for _ in range(2))
    for batch, each in zip(ids, labels, strict=True):
        with by_label:
            by_label.backward(model(batch), labels=each)
        with by_loss:
            losses = functional.cross_entropy(model(batch), each, reduction="none")
            by_loss.backward(losses=losses)

    def score(logits, _):
        yield torch.log_softmax(logits, -1)[flat[next(numbers)]]

    expected = brute_force(model, ids, score)
    check(by_label, expected)
    check(by_loss, expected)


def test_mergelm_is_the_squared_gradient_of_whole_batches(model, ids):
    with pymerge.collect(model, "fisher", estimator="mergelm") as collector:
        for batch in ids:
            collector.backward(model(batch))
    wide = copy.deepcopy(model).double()
    total = {name: torch.zeros_like(p) for name, p in wide.named_parameters()}
    for batch in ids:
        logits = wide(batch)
        p, log_p = torch.softmax(logits, -1).detach(), torch.log_softmax(logits, -1)
        wide.zero_grad()
        (torch.sqrt(p) * log_p).sum(-1).sum(0).backward()
        for name, parameter in wide.named_parameters():
            total[name] += parameter.grad**2
    check(collector, {name: value / 8 for name, value in total.items()})


def test_sequences_and_padding():
    """A sequence is one example; labels of padded positions have no part in it."""
    torch.manual_seed(2)
    model = Classifier(positions=True).eval()
    batch = torch.randint(9, (3, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    labels = torch.randint(4, (3, 5))
    labels[0, 1] = -100
    with pymerge.collect(model, "fisher", estimator="empirical") as collector:
        collector.backward(model(batch, attention_mask=mask), labels=labels)

    def score(logits, example):
        log_p = torch.log_softmax(logits, -1)
        keep = mask[example].bool() & (labels[example] >= 0)
        yield log_p[keep, labels[example][keep]].sum()

    check(collector, brute_force(model, [batch], score))


def test_rows_flattened_on_the_way_belong_to_their_examples():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.inner, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, ids):
            x = torch.tanh(self.inner(self.embed(ids).reshape(-1, 4)))
            return self.head(x.reshape(*ids.shape, 4).sum(1))

    torch.manual_seed(0)
    model, ids = Flat(), torch.randint(9, (4, 3))
    with pymerge.collect(model, "fisher", estimator="exact") as collector:
        collector.backward(model(ids))
    check(collector, brute_force(model, [ids], all_classes))


def test_rows_of_nobody_known_are_refused_unless_there_is_one_example():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.expert, self.head = (
                nn.Embedding(9, 4),
                nn.Linear(4, 4),
                nn.Linear(4, 3),
            )

        def forward(self, ids):
            x = self.embed(ids)
            chosen = ids > 3
            x = x.index_put((chosen,), self.expert(x[chosen]))
            return self.head(x.sum(1))

    torch.manual_seed(0)
    model, ids = Routed(), torch.tensor([[1, 5, 6], [4, 7, 8]])
    message = r"expert\.weight.*rows \[5\].*one example"
    with (
        pymerge.collect(model, "fisher", estimator="exact") as collector,
        pytest.raises(PymergeError, match=message),
    ):
        collector.backward(model(ids))
    with collector:  # of the batch that was refused nothing is in the sums
        for example in range(2):
            collector.backward(model(ids[example : example + 1]))
    check(collector, brute_force(model, [ids], all_classes))


def test_tied_weights_and_layers_that_are_used_without_being_called(ids):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 4)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, batch):
            x = self.embed(batch)
            return self.head(self.attention(x, x, x, need_weights=False)[0][:, 0])

    torch.manual_seed(0)
    model = Tied().train()
    with pymerge.collect(model, "fisher", estimator="exact") as collector:
        for batch in ids:
            collector.backward(model(batch))
    assert model.training
    expected = brute_force(model, ids, all_classes)
    assert expected["attention.out_proj.weight"].norm() > 0
    check(collector, expected)


def test_conv1d_of_transformers():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model, x = nn.Sequential(Conv1D(3, 5)), torch.randn(6, 5)
    with pymerge.collect(model, "fisher", estimator="exact") as collector:
        collector.backward(model(x))
    check(collector, brute_force(model, [x.double()], all_classes))


def test_frozen_models_and_their_gradients_are_left_as_they_were(model, ids):
    model.requires_grad_(False)
    model.norm.bias.requires_grad_(True)
    model.norm.bias.grad = torch.ones(6)
    with pymerge.collect(model, "fisher", estimator="exact") as collector:
        collector.backward(model(ids[0]))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["norm.bias"]
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {"norm.bias"}
    assert torch.equal(model.norm.bias.grad, torch.ones(6))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    model.requires_grad_(True)
    check(collector, brute_force(model, ids[:1], all_classes))


def test_bfloat16(ids):
    """Of the gradients that bfloat16 gives, squares and sums are float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).bfloat16()
    x = torch.randn(64, 4).bfloat16()
    with pymerge.collect(model, "fisher", estimator="exact") as collector:
        logits = model(x)
        collector.backward(logits)
    p = torch.softmax(logits.detach().float(), -1)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for c in range(3):
        g = p[:, c : c + 1].sqrt() * (torch.eye(3)[c] - p)
        g = g.bfloat16().double()
        expected += (g**2).T @ x.double() ** 2 / 64
    assert (collector.fisher("0.weight") - expected).norm() <= 3e-3 * expected.norm()


def test_only_some_parameters(model, ids):
    with pymerge.collect(model, "fisher", estimator="exact", only=["head.*", "norm.bias"]) as some:
        some.backward(model(ids[0]))
    expected = brute_force(model, ids[:1], all_classes)
    assert set(some._sums) == {"head.weight", "head.bias", "norm.bias"}
    check(some, {name: expected[name] for name in some._sums})


def test_what_has_no_part_in_the_answer_has_zeros():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare, self.idle = (nn.Linear(4, 3) for _ in range(3))

        def forward(self, x):
            self.spare(x)
            return self.used(x)

    model = Unused()
    with pymerge.collect(model, "fisher") as collector:
        collector.backward(model(torch.randn(3, 4)))
    for name, parameter in model.named_parameters():
        assert collector.fisher(name).shape == parameter.shape
        assert bool(collector.fisher(name).any()) is name.startswith("used")


def test_what_cannot_be_is_said(model, ids):
    collector = pymerge.collect(model, "fisher")
    with pytest.raises(PymergeError, match="within the with block"):
        collector.backward(model(ids[0]))
    with collector:
        old = model(ids[0])
        with torch.no_grad():
            bare = model(ids[0])
        with pytest.raises(PymergeError, match=r"some without.*no_grad"):
            collector.backward(bare)
        with pytest.raises(PymergeError, match="estimator empirical"):
            collector.backward(old, labels=torch.zeros(4, dtype=torch.long))
        collector.backward(old)
        model(ids[0])
        with pytest.raises(PymergeError, match="latest call"):
            collector.backward(torch.randn(4, 4, requires_grad=True) * 2)
    with pymerge.collect(model, "fisher", estimator="empirical") as other:
        with pytest.raises(PymergeError, match=r"labels or losses"):
            other.backward(model(ids[0]))
        with pytest.raises(PymergeError, match=r"one label for each row of logits, \[4\]"):
            other.backward(model(ids[0]), labels=torch.zeros(3, dtype=torch.long))
    long = Classifier(positions=True)
    with (
        pymerge.collect(long, "fisher", estimator="exact") as other,
        pytest.raises(PymergeError, match=r"\[4, 3, 4\].*monte_carlo"),
    ):
        other.backward(long(ids[0]))


def test_an_input_changed_in_place_is_an_error():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            y = self.layer(x)
            x.mul_(2)
            return y

    model = InPlace()
    with (
        pymerge.collect(model, "fisher") as collector,
        pytest.raises(PymergeError, match=r"layer\.weight.*changed in place"),
    ):
        collector.backward(model(torch.randn(3, 4)))
