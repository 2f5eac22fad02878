"""RegMean++ against a naive float64 one that runs every expert's blocks by itself."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import pymerge
from pymerge.errors import PymergeError

WIDTH = 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.a, self.b = nn.Linear(WIDTH, 9), nn.Linear(WIDTH, 9, bias=False)
        self.out = nn.Linear(9, WIDTH)

    def forward(self, h, scale=1.0):
        x = self.norm(h)
        return h + scale * self.out(torch.tanh(self.a(x)) * self.b(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x, attention_mask=None):
        h = self.stem(x)
        for number, block in enumerate(self.blocks):
            h = block(h, scale=1 + number)
        return self.head(h)


NAMES = [f"blocks.{number}" for number in range(3)]


def experts_of(make, num, noise=0.4):
    torch.manual_seed(11)
    base = make()
    experts = [copy.deepcopy(base) for _ in range(num)]
    with torch.no_grad():
        for expert in experts:
            for parameter in expert.parameters():
                parameter.add_(noise * torch.randn_like(parameter))
    return experts


def naive(experts, data, alpha, ridge, masks=None, shares=None):
    """Float64, and straight from the definition: a loop over blocks, experts and layers."""
    experts = [copy.deepcopy(expert).double() for expert in experts]
    merged = copy.deepcopy(experts[0])
    shares = shares or [1.0] * len(experts)
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            parameter.copy_(sum(e.get_parameter(name) for e in experts) / len(experts))
        hidden = [[merged.stem(x.double()) for x in batches] for batches in data]
        for number in range(3):
            new = {}
            for layer in ("a", "b", "out"):
                grams, rights = 0, 0
                for k, expert in enumerate(experts):
                    block, rows = expert.blocks[number], []
                    handle = block.get_submodule(layer).register_forward_pre_hook(
                        lambda _, args, rows=rows: rows.append(
                            args[0].reshape(-1, args[0].shape[-1])
                        )
                    )
                    for h in hidden[k]:
                        block(h, scale=1 + number)
                    handle.remove()
                    if masks is not None:
                        rows = [r[m.reshape(-1)] for r, m in zip(rows, masks[k], strict=True)]
                    x = torch.cat(rows)
                    gram = x.T @ x / len(x) * shares[k]
                    gram = alpha * gram + (1 - alpha) * torch.diag(gram.diagonal())
                    grams = grams + gram
                    mean = merged.blocks[number].get_submodule(layer).weight
                    delta = block.get_submodule(layer).weight - mean
                    rights = rights + gram @ delta.T
                shift = ridge * grams.diagonal().mean() * torch.eye(len(grams))
                new[layer] = mean + torch.linalg.solve(grams + shift, rights).T
            for layer, weight in new.items():
                merged.blocks[number].get_submodule(layer).weight.copy_(weight)
            block = merged.blocks[number]
            hidden = [[block(h, scale=1 + number) for h in batches] for batches in hidden]
    return merged


def assert_same(found, expected, bound):
    for name, value in expected.named_parameters():
        error = (found.get_parameter(name).double() - value).norm()
        assert error <= bound * value.norm(), f"{name}: {error}"


def data_of(num, rows=40):
    generator = torch.Generator().manual_seed(5)
    mixes = [torch.randn(4, 4, generator=generator) for _ in range(num)]
    return [[torch.randn(2, rows, 4, generator=generator) @ mix for _ in range(2)] for mix in mixes]


@pytest.mark.parametrize("alpha", [0.0, 0.7, 0.95])
def test_it_is_the_naive_one(alpha):
    experts, data = experts_of(Net, 3), data_of(3)
    merged, before = Net(), copy.deepcopy(experts)
    report = pymerge.regmean_plus_plus(merged, experts, NAMES, data, alpha=alpha, threads=1)
    assert_same(merged, naive(experts, data, alpha, 1e-4), 2e-5)
    assert list(report) == [f"blocks.{n}.{x}.weight" for n in range(3) for x in ("a", "b", "out")]
    assert {layer.rows_seen for layer in report.values()} == {3 * 2 * 2 * 40}
    assert max(layer.residual for layer in report.values()) < 1e-9
    for expert, old in zip(experts, before, strict=True):
        assert all(
            torch.equal(x, y) for x, y in zip(expert.parameters(), old.parameters(), strict=True)
        )
        assert expert.training
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in expert.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in merged.modules())


def test_weights_of_the_experts_and_few_rows():
    """Three rows: Grams of rank three, where the mean stays in the null space and the ridge divides
    what float32 rounds."""
    experts, data = experts_of(Net, 2), [[x[:1, :3] for x in each[:1]] for each in data_of(2)]
    merged = Net()
    pymerge.regmean_plus_plus(merged, experts, NAMES, data, alpha=1, weights=[1, 3], ridge=1e-3)
    assert_same(merged, naive(experts, data, 1, 1e-3, shares=[0.5, 1.5]), 1e-6 / 1e-3)


def test_padding_does_not_count():
    experts, data = experts_of(Net, 2), data_of(2)
    masks = [[torch.rand(2, 40) < 0.6 for _ in each] for each in data]
    batches = [
        [{"x": x, "attention_mask": m} for x, m in zip(xs, ms, strict=True)]
        for xs, ms in zip(data, masks, strict=True)
    ]
    merged = Net()
    report = pymerge.regmean_plus_plus(merged, experts, NAMES, batches)
    assert_same(merged, naive(experts, data, 0.95, 1e-4, masks), 2e-5)
    real = sum(int(m.sum()) for ms in masks for m in ms)
    assert {layer.rows_seen for layer in report.values()} == {real}


def test_experts_of_disjoint_inputs_are_recovered_each_on_its_own():
    """Planted subspaces: expert k's data lies in its own; there the merge acts as expert k does,
    and the mean does not."""

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Linear(12, 12, bias=False)

        def forward(self, x):
            return self.block(x)

    experts, merged = experts_of(Chain, 3, noise=1.0), Chain()
    basis = torch.linalg.qr(torch.randn(12, 12)).Q
    data = [[torch.randn(200, 4) @ basis[:, 4 * k : 4 * k + 4].T] for k in range(3)]
    pymerge.regmean_plus_plus(merged, experts, ["block"], data, alpha=1, ridge=1e-8)
    mean = sum(expert.block.weight for expert in experts) / 3
    with torch.no_grad():
        for expert, (x,) in zip(experts, data, strict=True):
            wanted = expert(x)
            assert (merged(x) - wanted).norm() <= 1e-5 * wanted.norm()
            assert (x @ mean.T - wanted).norm() >= 0.1 * wanted.norm()


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=24, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_a_llama():
    """The last layer's output projection solves its normal equations: inputs are recorded from the
    experts' own last layers on the hidden states of the merged first layer, in whole forwards."""
    experts, merged = experts_of(llama, 2, noise=0.2), llama()
    names = ["model.layers.0", "model.layers.1"]
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(24, (6, 8), generator=generator) for _ in experts]
    mask = torch.ones(6, 8, dtype=torch.long)
    mask[0, 5:] = 0
    batches = [[{"input_ids": x, "attention_mask": mask}] for x in ids]
    report = pymerge.regmean_plus_plus(merged, experts, names, batches, ridge=1e-6)
    assert len(report) == 14
    assert {layer.rows_seen for layer in report.values()} == {2 * 45}
    table = dict(merged.named_parameters())
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        mean = sum(expert.get_parameter(name) for expert in experts) / 2
        assert torch.equal(table[name], mean)
    keep = mask.reshape(-1).bool()
    for name in ("self_attn.v_proj", "mlp.down_proj"):
        gradient = scale = 0
        for expert, x in zip(experts, ids, strict=True):
            hybrid, seen = copy.deepcopy(merged), []
            own = hybrid.model.layers[1]
            own.load_state_dict(expert.model.layers[1].state_dict())
            # Norms and projections of the expert, on what the merged prefix makes.
            handle = own.get_submodule(name).register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0].reshape(-1, args[0].shape[-1]))
            )
            with torch.no_grad():
                hybrid(input_ids=x, attention_mask=mask)
            handle.remove()
            rows = seen[0][keep].double()
            gram = rows.T @ rows / len(rows)
            gram = 0.95 * gram + 0.05 * torch.diag(gram.diagonal())
            weight = merged.model.layers[1].get_submodule(name).weight.double()
            delta = weight - own.get_submodule(name).weight.double()
            gradient, scale = gradient + delta @ gram, scale + (delta @ gram).norm()
        assert gradient.norm() <= 1e-4 * scale


def test_what_does_not_fit_is_said():
    experts, data = experts_of(Net, 2), data_of(2)

    class Between(Net):
        def forward(self, x):
            h = self.blocks[0](self.stem(x))
            return self.head(self.blocks[1](2 * h))

    def run(merged=None, experts=experts, blocks=NAMES, data=data, **more):
        return pymerge.regmean_plus_plus(merged or Net(), experts, blocks, data, **more)

    shared = Net()
    shared.blocks[1].a.weight = shared.blocks[0].a.weight
    for arguments, message in (
        ({"alpha": 1.5}, "alpha from 0 to 1"),
        ({"ridge": -1}, "ridge of 0 or more"),
        ({"weights": [1]}, "2 weights"),
        ({"data": data[:1]}, "batches for each of 2 experts, found 1"),
        ({"data": [data[0], []]}, "none for expert 1"),
        ({"experts": []}, "at least one expert"),
        ({"blocks": ["block.0"]}, r"'block\.0'.*is 'blocks\.0' meant"),
        ({"blocks": NAMES[::-1]}, r"in the order|returned"),
        ({"experts": [experts[0], nn.Linear(2, 2)]}, "expert 1 differs in"),
        ({"merged": experts[0]}, "would be overwritten"),
        ({"merged": Between(), "blocks": NAMES[:2]}, "gets something else"),
        ({"merged": shared, "experts": [copy.deepcopy(shared)], "data": data[:1]}, "share"),
    ):
        with pytest.raises(PymergeError, match=message):
            run(**arguments)
    bad = copy.deepcopy(data)
    bad[0][0][0, 0, 0] = np.nan
    with pytest.raises(PymergeError, match=r"finite inputs of the layers a\.weight"):
        run(data=bad)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_layers_that_share_inputs_in_one_expert_and_not_in_the_other(order):
    """a and b get one tensor from the first expert's data and two from the second's."""

    class Parting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)

        def forward(self, h):
            return self.a(h) + self.b(h if h[0, 0] > 0 else 2 * h.flip(-1))

    experts, merged = experts_of(lambda: nn.Sequential(Parting()), 2), nn.Sequential(Parting())
    xs = [torch.randn(30, 5), torch.randn(40, 5)]
    xs[0][0, 0], xs[1][0, 0] = 1, -1
    data = [[xs[k]] for k in order]
    pymerge.regmean_plus_plus(merged, experts, ["0"], data, alpha=1, ridge=0)
    for name in ("a", "b"):
        grams, rights = 0, 0
        for k, expert in zip(order, experts, strict=True):
            x = xs[k].double()
            x = 2 * x.flip(-1) if name == "b" and k == 1 else x
            gram = x.T @ x / len(x)
            grams = grams + gram
            rights = rights + gram @ expert[0].get_submodule(name).weight.double().T
        expected = torch.linalg.solve(grams, rights).T
        found = merged[0].get_submodule(name).weight.double()
        assert (found - expected).norm() <= 1e-5 * expected.norm()
