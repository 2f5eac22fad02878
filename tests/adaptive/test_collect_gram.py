"""Input Grams against float64 numpy, whatever the model does with its layers."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import pymerge
from pymerge.adaptive import triangle
from pymerge.errors import PymergeError

#: Relative to the norm of the Gram: float32 products of at most 1024 rows.
BOUND = 1e-6


def close(found, expected, bound=BOUND):
    error = np.linalg.norm(np.asarray(found) - expected)
    assert error <= bound * np.linalg.norm(expected), error


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference", "autocast"])
def test_grams_are_means_over_all_calls(attention, inputs_of, mean_gram, mode):
    calls = [(torch.randn(2, 5, 6),), (torch.randn(7, 6),), (torch.randn(1, 1, 6),)]
    contexts = {
        "grad": torch.enable_grad(),
        "no_grad": torch.no_grad(),
        "inference": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }
    with contexts[mode]:
        names = ["q", "k", "v", "out", "side"]
        seen = inputs_of(attention, names, calls)
        with pymerge.collect(attention) as collector:
            for args in calls:
                attention(*args)
    assert hooks_of(attention) == 0
    for name in names:
        close(collector.gram(f"{name}.weight"), mean_gram(seen[name]))
    assert collector.rows_seen == {f"{name}.weight": 18 for name in names}


def test_many_columns_and_rows_cross_panels_and_chunks(monkeypatch):
    monkeypatch.setattr(triangle, "PANEL", 16)
    monkeypatch.setattr(triangle, "CHUNK", 32)
    layer = nn.Sequential(nn.Linear(37, 3))
    x = torch.randn(100, 37)
    with pymerge.collect(layer) as collector:
        layer(x)
    gram = collector.gram("0.weight")
    close(gram, x.double().T.numpy() @ x.double().numpy() / 100)
    assert torch.equal(gram, gram.T)


def test_half_of_the_matrix_is_kept():
    size = 8 * triangle.PANEL
    kept = sum(panel.numel() for panel in triangle.Triangle(size, torch.device("cpu"))._panels)
    assert kept == size * (size + triangle.PANEL) / 2


def test_products_do_not_lose_what_16_bits_would(monkeypatch):
    """Under autocast and the lowest matmul precision; bfloat16 products would be off by 1e-3."""
    layer = nn.Sequential(nn.Linear(8, 8)).bfloat16()
    x = (1 + torch.randn(3000, 8) / 100).bfloat16()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16), pymerge.collect(layer) as collector:
            layer(x)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    wide = x.double().numpy()
    close(collector.gram("0.weight"), wide.T @ wide / 3000)


def test_layers_on_one_tensor_share_one_sum(attention):
    with pymerge.collect(attention) as collector:
        for _ in range(3):
            attention(torch.randn(2, 4, 6))
    groups = [group.names for group in collector._sums.groups]
    assert groups == [
        {"q.weight", "k.weight", "v.weight", "side.weight"},
        {"out.weight"},
    ]


def test_padding_of_nan_does_not_part_layers_in_inference_mode(attention):
    x, mask = torch.full((1, 3, 6), float("nan")), torch.tensor([[1, 1, 0]])
    x[:, :2] = torch.randn(2, 6)
    with torch.inference_mode(), pymerge.collect(attention) as collector:
        attention(x + 0, attention_mask=mask)
    assert len(collector._sums.groups) == 2


def test_layers_that_part_get_sums_of_their_own(mean_gram):
    """a and b share their input in the first call, a and c in the second, all in the third."""

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x, plan):
            for name in plan:
                getattr(self, name.lower())(x if name.islower() else x + 1)

    torch.manual_seed(0)
    model, xs = Routed(), [torch.randn(5, 4) for _ in range(4)]
    plans = ["abC", "aBc", "abc", "aab"]
    with pymerge.collect(model) as collector:
        for x, plan in zip(xs, plans, strict=True):
            model(x, plan)
    for name in "abc":
        seen = [
            x.double().numpy() + letter.isupper()
            for x, plan in zip(xs, plans, strict=True)
            for letter in plan
            if letter.lower() == name
        ]
        close(collector.gram(f"{name}.weight"), mean_gram(seen))
        assert collector.rows_seen[f"{name}.weight"] == sum(len(x) for x in seen)


def test_a_tensor_changed_in_place_is_another_input(mean_gram):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            self.a(x)
            x.mul_(3)
            self.b(x)

    x = torch.randn(6, 4)
    first = x.double().numpy().copy()
    model = InPlace()
    with torch.no_grad(), pymerge.collect(model) as collector:
        model(x)
    close(collector.gram("a.weight"), mean_gram([first]))
    close(collector.gram("b.weight"), mean_gram([3 * first]), 3e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_one_tensor_for_every_batch(mean_gram, mode):
    """A buffer that is filled again, by changes that inference mode does not count."""
    model, seen = nn.Sequential(nn.Linear(4, 3)), []
    with mode(), pymerge.collect(model) as collector:
        buffer = torch.empty(6, 4)
        for _ in range(3):
            seen.append(buffer.normal_().double().numpy().copy())
            model(buffer)
    close(collector.gram("0.weight"), mean_gram(seen))


def test_a_change_in_place_within_a_call_in_inference_mode(mean_gram):
    class Activated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            hidden = x + 0
            before = self.a(hidden)
            return before + self.b(hidden.relu_())

    model, x = Activated(), torch.randn(6, 4)
    with torch.inference_mode(), pymerge.collect(model) as collector:
        model(x)
    close(collector.gram("a.weight"), mean_gram([x.double().numpy()]))
    close(collector.gram("b.weight"), mean_gram([x.relu().double().numpy()]))


def test_one_tensor_with_another_mask_in_each_call(mean_gram):
    x, masks = torch.randn(2, 3, 4), torch.tensor([[[1, 1, 0], [1, 0, 0]], [[0, 0, 1], [0, 1, 0]]])
    model = nn.Sequential(nn.Linear(4, 3))
    with pymerge.collect(model) as collector:
        for mask in masks:
            collector.mask(mask)
            model(x)
    assert collector.rows_seen == {"0.weight": 5}
    close(collector.gram("0.weight"), mean_gram([x.double().numpy()] * 2, list(masks.numpy())))


def test_a_mask_for_a_model_that_is_one_layer(mean_gram):
    layer, x, mask = nn.Linear(4, 3), torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    with pymerge.collect(layer) as collector:
        collector.mask(mask)
        layer(x)
    close(collector.gram("weight"), mean_gram([x.double().numpy()], [mask.numpy()]))


def test_a_layer_called_twice_and_tied_layers_sum_over_all_their_inputs(mean_gram):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(self.a(x)))

    model, x = Tied(), torch.randn(9, 4)
    with pymerge.collect(model) as collector:
        model(x)
    w = model.a.weight.detach().double().numpy()
    x0 = x.double().numpy()
    assert collector.linears == ["a.weight"]
    assert collector.rows_seen == {"a.weight": 27}
    close(collector.gram("a.weight"), mean_gram([x0, x0 @ w.T, x0 @ w.T @ w.T]))


def test_a_head_tied_to_an_embedding_is_not_a_linear_layer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.inner = nn.Linear(4, 4)
            self.head.weight = self.embed.weight

    assert pymerge.collect(Model()).linears == ["inner.weight"]


@pytest.mark.parametrize("how", ["keyword", "place", "given"])
def test_padding_does_not_count(attention, inputs_of, mean_gram, how):
    """Not even where it is NaN."""
    x = torch.randn(2, 5, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    seen = inputs_of(attention, ["q", "out"], [(x,)])
    x[mask == 0] = float("nan")
    with torch.no_grad(), pymerge.collect(attention) as collector:
        if how == "keyword":
            attention(x, attention_mask=mask)
        elif how == "place":
            attention(x, mask)
        else:
            collector.mask(mask)
            attention(x)
    for name in ("q", "out"):
        close(collector.gram(f"{name}.weight"), mean_gram(seen[name], [mask.numpy()]))
    assert collector.rows_seen["q.weight"] == 7
    assert collector.unmasked == []


def test_a_mask_is_for_one_call(attention):
    with pymerge.collect(attention) as collector:
        collector.mask(torch.tensor([[1, 0, 0]]))
        attention(torch.randn(1, 3, 6))
        attention(torch.randn(1, 3, 6))
        attention(torch.randn(1, 3, 6), attention_mask=torch.tensor([[0, 0, 1]]))
    assert collector.rows_seen["q.weight"] == 1 + 3 + 1
    with pymerge.collect(attention, masks=False) as collector:
        attention(torch.randn(1, 3, 6), attention_mask=torch.tensor([[0, 0, 1]]))
    assert collector.rows_seen["q.weight"] == 3


def test_rows_that_a_mask_does_not_fit_all_count_and_are_named():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.pool = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x, attention_mask):
            return self.pool(self.body(x)[:, 0])

    model = Pooled()
    with pymerge.collect(model) as collector:
        model(torch.randn(2, 3, 4), attention_mask=torch.tensor([[1, 1, 0], [1, 0, 0]]))
    assert collector.rows_seen == {"body.weight": 3, "pool.weight": 2}
    assert collector.unmasked == ["pool.weight"]


def test_a_mask_of_another_rank_is_refused(attention):
    with pymerge.collect(attention):
        with pytest.raises(PymergeError, match=r"\[batch, positions\].*\[1, 1, 3, 3\]"):
            attention(torch.randn(1, 3, 6), attention_mask=torch.ones(1, 1, 3, 3).bool())
        attention(torch.randn(1, 3, 6))
    assert hooks_of(attention) == 0


def test_hooks_go_whatever_happens(attention):
    training = attention.training
    collector = pymerge.collect(attention)

    def fail():
        with collector:
            attention(torch.randn(1, 2, 6))
            assert hooks_of(attention) > 0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert hooks_of(attention) == 0
    assert attention.training is training
    before = collector.rows_seen
    attention(torch.randn(1, 2, 6))
    assert collector.rows_seen == before
    with collector:
        attention(torch.randn(1, 2, 6))
        with pytest.raises(PymergeError, match="entered already"), collector:
            pass
    assert collector.rows_seen["q.weight"] == 4
    assert hooks_of(attention) == 0


def test_a_failing_call_leaves_a_mask_behind_for_nobody(attention):
    with pymerge.collect(attention) as collector:
        with pytest.raises(RuntimeError):
            attention(torch.randn(1, 3, 5), attention_mask=torch.tensor([[1, 0, 0]]))
        attention.q(torch.randn(1, 3, 6))
    assert collector.rows_seen == {"q.weight": 3}


def test_no_activation_outlives_its_use(attention):
    """The collector holds Grams alone."""
    x = torch.randn(2, 3, 6)
    alive = weakref.ref(x)
    with pymerge.collect(attention) as collector:
        with torch.no_grad():
            attention(x)
        del x
        gc.collect()
        assert alive() is None
    assert collector.rows_seen["out.weight"] == 6


def test_conv1d_of_transformers():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model, x = nn.Sequential(Conv1D(3, 5)), torch.randn(4, 6, 5)
    with pymerge.collect(model) as collector:
        model(x)
    rows = x.double().reshape(-1, 5).numpy()
    close(collector.gram("0.weight"), rows.T @ rows / 24)


def test_a_llama_shares_four_grams_a_layer(inputs_of, mean_gram):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(32, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with torch.no_grad(), pymerge.collect(model, only="model.layers.*") as collector:
        model(input_ids=ids, attention_mask=mask)
    assert len(collector.linears) == 14
    assert len(collector._sums.groups) == 8
    assert set(collector.rows_seen.values()) == {8}
    seen = {}
    name = "model.layers.1.mlp.down_proj"
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.update({name: args[0].detach().double().numpy()})
    )
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    handle.remove()
    close(collector.gram(f"{name}.weight"), mean_gram([seen[name]], [mask.numpy()]))


def test_an_encoder_decoder_with_padding_is_refused():
    class Config:
        is_encoder_decoder = True

    class Model(nn.Module):
        config = Config()

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, attention_mask=None):
            return self.layer(x)

    model = Model()
    with pymerge.collect(model) as collector:
        model(torch.randn(1, 2, 4), attention_mask=torch.ones(1, 2, dtype=torch.long))
        with pytest.raises(PymergeError, match="encoder"):
            model(torch.randn(1, 2, 4), attention_mask=torch.tensor([[1, 0]]))
    assert collector.rows_seen == {"layer.weight": 2}


def test_wrong_arguments_say_what_is_meant(attention):
    for arguments, message in (
        ({"kind": "hessian"}, "gram or fisher"),
        ({"seed": 1}, "no estimator and no seed"),
        ({"only": ["*.weigth"]}, r"only to match.*found none among 7"),
        ({"kind": "fisher", "estimator": "exakt"}, "monte_carlo, exact, empirical, mergelm"),
        ({"kind": "fisher", "device": "cpu"}, "no device"),
    ):
        with pytest.raises(PymergeError, match=message):
            pymerge.collect(attention, **arguments)
