"""merge_state_dicts: the bytes of a merge through files, whatever holds the tensors."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from torch import nn

import pymerge
from pymerge.in_memory import driver, tiles
from pymerge.methods import METHODS


def bases(case, nets):
    return nets.base if case.takes_base else None, nets.models[: case.num_models]


def test_every_dense_method_has_a_case(cases):
    dense = {name for name, method in METHODS.items() if not method.extras}
    assert {case.method for case in cases} == dense


@pytest.mark.filterwarnings("ignore:none of")
def test_bytes_are_those_of_a_merge_through_files(
    case, nets, tmp_path, assert_same_bytes, monkeypatch
):
    expected = case.through_files(nets, tmp_path / "out")
    base, models = bases(case, nets)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (nets.base, *models)]
    found = pymerge.merge_state_dicts(base, models, **case.call(nets))
    assert_same_bytes(found, expected)
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 4096)
    monkeypatch.setattr(driver, "GROUP_BYTES", 50_000)
    for threads in (1, 3):
        cut = pymerge.merge_state_dicts(base, models, threads=threads, **case.call(nets))
        assert_same_bytes(cut, expected)
    for model, state in zip((nets.base, *models), before, strict=True):
        assert_same_bytes(model.state_dict(), state)


def test_the_smile_of_several_models_is_refused(nets):
    with pytest.raises(pymerge.PymergeError, match="emr makes more than one model"):
        pymerge.merge_state_dicts(nets.base, nets.models, method="emr")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
def test_dtypes_are_those_of_a_recipe(key, dtype, cases, nets, tmp_path, assert_same_bytes):
    case = next(case for case in cases if case.method == "ties")
    expected = case.through_files(nets, tmp_path / "out", **{key: dtype})
    found = pymerge.merge_state_dicts(nets.base, nets.models, **case.call(nets), **{key: dtype})
    assert_same_bytes(found, expected)
    assert found["head.weight"].dtype == getattr(torch, dtype)
    assert found["steps"].tolist() == list(range(7))


class Lazy(dict):
    """Holds functions, gives a new tensor for each question, and keeps a record."""

    def __init__(self, state):
        super().__init__({name: tensor.clone for name, tensor in state.items()})
        self.alive = []

    def __getitem__(self, name):
        tensor = super().__getitem__(name)()
        self.alive = [each for each in self.alive if each() is not None]
        self.alive.append(weakref.ref(tensor))
        return tensor


@pytest.mark.parametrize("method", ["ties", "linear", "pcb", "tsv_m"])
def test_mappings_are_read_tensor_by_tensor(
    method, cases, nets, tmp_path, assert_same_bytes, monkeypatch
):
    case = next(case for case in cases if case.method == method)
    base, models = bases(case, nets)
    expected = pymerge.merge_state_dicts(base, models, **case.call(nets))
    monkeypatch.setattr(driver, "GROUP_BYTES", 1)
    lazy = [Lazy(model.state_dict()) for model in models]
    found = pymerge.merge_state_dicts(base, lazy, **case.call(nets))
    assert_same_bytes(found, expected)
    assert all(len(each.alive) <= 2 for each in lazy)


def test_strided_and_shared_memory_is_read_right(nets, assert_same_bytes):
    """Transposed storage, a slice of a larger tensor, a broadcast one: the elements count."""
    values = [torch.randn(6, 9) for _ in range(3)]
    wide = torch.randn(6, 20)
    wide[:, 3:12] = values[1]
    strided = [{"w": values[0].T.contiguous().T, "c": torch.tensor(2.0).expand(5)}]
    strided += [{"w": wide[:, 3:12], "c": torch.ones(5)}, {"w": values[2], "c": torch.zeros(5)}]
    plain = [{name: t.contiguous().clone() for name, t in each.items()} for each in strided]
    found, expected = (
        pymerge.merge_state_dicts(each[0], each[1:], method="ties", weight=[1, 2], density=0.4)
        for each in (strided, plain)
    )
    assert_same_bytes(found, expected)


def test_tied_parameters_are_merged_once_and_stay_tied(net, assert_same_bytes):
    tied = [net(seed, tied=True) for seed in range(3)]
    how = {"method": "dare_linear", "weight": 1, "density": 0.5}
    found = pymerge.merge_state_dicts(tied[0], tied[1:], **how)
    assert found["head.weight"] is found["embed.weight"]
    without = [
        {name: tensor for name, tensor in each.state_dict().items() if name != "head.weight"}
        for each in tied
    ]
    alone = pymerge.merge_state_dicts(without[0], without[1:], **how)
    assert found["embed.weight"].equal(alone["embed.weight"])
    live = net(0, tied=True)
    pymerge.merge_state_dicts(tied[0], tied[1:], **how, out=live)
    assert live.head.weight is live.embed.weight
    assert live.embed.weight.equal(found["embed.weight"])


def test_what_is_tied_in_some_models_only_is_not(net):
    base, one, other = net(0, tied=True), net(1, tied=True), net(2)
    found = pymerge.merge_state_dicts(base, [one, other], method="linear", weight=1.0)
    for name in ("embed.weight", "head.weight"):
        mean = (one.state_dict()[name].double() + other.state_dict()[name].double()) / 2
        assert found[name].equal(mean.float())
    with pytest.raises(pymerge.PymergeError, match=r"out ties 'embed.weight' and 'head.weight'"):
        pymerge.merge_state_dicts(base, [one, other], method="linear", weight=1.0, out=base)


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "pcb", "slerp", "iso_c"])
@pytest.mark.parametrize("which", ["base", "model"])
def test_in_place_of_an_input(method, which, cases, nets, net, assert_same_bytes):
    case = next(case for case in cases if case.method == method)
    expected = pymerge.merge_state_dicts(
        nets.base, nets.models[: case.num_models], **case.call(nets)
    )
    base, models = net(0), [net(seed + 1) for seed in range(case.num_models)]
    out = base if which == "base" else models[0]
    memory = {name: tensor.data_ptr() for name, tensor in out.state_dict().items()}
    assert pymerge.merge_state_dicts(base, models, out=out, **case.call(nets)) is out
    assert_same_bytes(out.state_dict(), expected)
    assert {name: tensor.data_ptr() for name, tensor in out.state_dict().items()} == memory


def test_out_keeps_its_dtype_layout_and_names(nets):
    """Float32 inputs rounded once into bfloat16 and into strided memory; others untouched."""
    models = [net.state_dict() for net in nets.models]
    plain = pymerge.merge_state_dicts(nets.base, models, method="task_arithmetic", weight=0.3)
    out = {name: tensor.clone().bfloat16() for name, tensor in plain.items() if name != "steps"}
    out["head.weight"] = torch.empty(64, 100, dtype=torch.float16).T
    out |= {"steps": torch.zeros(7, dtype=torch.int64), "other": torch.ones(2)}
    kept = {name: tensor.data_ptr() for name, tensor in out.items()}
    pymerge.merge_state_dicts(nets.base, models, method="task_arithmetic", weight=0.3, out=out)
    for name, tensor in plain.items():
        assert out[name].equal(tensor.to(out[name].dtype)), name
    assert out["other"].tolist() == [1, 1]
    assert {name: tensor.data_ptr() for name, tensor in out.items()} == kept


def test_autograd_sees_that_parameters_changed(nets, net):
    live = net(0)
    loss = (live.head.weight**2).sum()
    pymerge.merge_state_dicts(nets.base, nets.models, method="linear", weight=1.0, out=live)
    assert live.head.weight.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_may_go_by_the_names_of_tensors(nets):
    """A function, filters in their order, and a tensor of weights."""
    models = [net.state_dict() for net in nets.models[:2]]

    def merged(**parameters):
        return pymerge.merge_state_dicts(nets.base, models, method="task_arithmetic", **parameters)

    chosen = {"norm": [0.0, 0.0], "layers.1": [1.0, 0.0], "*": [0.25, 0.5]}
    by_filter = merged(weight=chosen, lambda_={"head": 2.0})

    def weight(name):
        return next(v for k, v in chosen.items() if k == "*" or k in name)

    by_function = merged(weight=weight, lambda_=lambda name: 2.0 if "head" in name else None)
    for name, tensor in nets.base.state_dict().items():
        if name == "steps":
            continue
        first, second = weight(name)
        scale = 2.0 if "head" in name else 1.0
        deltas = [(m[name] - tensor).double() for m in models]
        truth = tensor.double() + scale * (first * deltas[0] + second * deltas[1])
        assert torch.allclose(by_filter[name].double(), truth, rtol=0, atol=1e-6)
        assert by_function[name].equal(by_filter[name])
    assert merged(weight=torch.tensor([0.25, 0.5]))["embed.weight"].equal(by_filter["embed.weight"])
    with pytest.warns(UserWarning, match="no merged tensor has 'layer.1' in its name"):
        merged(weight={"layer.1": 1.0, "*": 0.5})


def state(**changes):
    found = {"w": torch.ones(3, 2), "b": torch.ones(3), "n": torch.tensor([1])}
    return {name: tensor for name, tensor in (found | changes).items() if tensor is not None}


@pytest.mark.parametrize(
    ("base", "models", "options", "message"),
    [
        (state(), state(), {}, "models is a list of state dicts, found dict"),
        (state(), [torch.ones(2)], {}, r"models\[0\]: expected a state dict or a torch module"),
        (state(), ["folder"], {}, "for a checkpoint's folder use pymerge.merge"),
        (state(), [], {}, "takes 1 or more models besides the base, found 0"),
        (None, [state()], {}, "task_arithmetic needs a base"),
        (state(), [state(w=torch.ones(2, 3))], {}, r"'w' of models\[0\] has shape \[2, 3\]"),
        (state(), [state(w=torch.ones(3, 2).int())], {}, "is int32, in base it is float32"),
        (state(), [state(b=None)], {}, "tensor 'b' is in base but not in models"),
        (state(), [state(w=torch.ones(3, 2, device="meta"))], {}, "device meta, where it has no"),
        (state(), [state(w=torch.ones(3, 2).to_sparse())], {}, "dense tensor, found layout"),
        (state(), [state(w=np.ones((3, 2)))], {}, "expected a torch tensor, found ndarray"),
        (state(), [state()], {"wieght": 1}, "did you mean 'weight'"),
        (state(), [state()], {"weight": {"w": 1.0}}, "tensor 'b': .* needs the parameter 'weight'"),
        (state(), [state()], {"out": state(w=None)}, "out, tensor 'w' is missing"),
        (state(), [state()], {"out": state(w=torch.ones(2))}, r"shape \[2\], expected \[3, 2\]"),
        (state(), [state()], {"out": state(w=torch.ones(3, 2).int())}, "which kernels do not"),
        (state(), [state()], {"out": state(n=torch.ones(1))}, "is float32, expected int64"),
        (state(), [state()], {"statistics": [{}]}, "task_arithmetic reads no statistics"),
        (state(), [state()], {"out_dtype": "int8"}, "out_dtype 'int8' cannot be written"),
        (state(), [state()], {"threads": 0}, "threads: .* found 0"),
    ],
)
def test_mistakes_are_named(base, models, options, message):
    with pytest.raises(pymerge.PymergeError, match=message):
        pymerge.merge_state_dicts(
            base, models, method="task_arithmetic", **{"weight": 1.0, **options}
        )


def test_statistics_are_asked_for_and_checked(nets):
    models = nets.models[:2]
    for given in (None, [{}], {}):
        with pytest.raises(pymerge.PymergeError, match=r"fisher needs statistics=\[...\]"):
            pymerge.merge_state_dicts(None, models, method="fisher", statistics=given)
    half = [nets.statistics["gram"][0], {}]
    with pytest.raises(pymerge.PymergeError, match=r"for models\[0\] and not for models\[1\]"):
        pymerge.merge_state_dicts(None, models, method="regmean", statistics=half)
    with pytest.raises(pymerge.RecipeError, match=r"every weight of tensor .* is 0"):
        pymerge.merge_state_dicts(
            None, models, method="regmean", weight=0.0, statistics=nets.statistics["gram"][:2]
        )


def test_what_is_left_out_or_not_finite_is_said(nets):
    extra = {**nets.models[0].state_dict(), "more": torch.ones(2)}
    with pytest.warns(UserWarning, match="1 tensor of the models not in base"):
        pymerge.merge_state_dicts(nets.base, [extra], method="linear", weight=1.0)
    broken = nets.models[0].state_dict() | {"head.weight": torch.full((100, 64), torch.inf)}
    with pytest.warns(UserWarning, match=r"1 tensor of the result .* head.weight \(6400\)"):
        pymerge.merge_state_dicts(nets.base, [broken], method="linear", weight=1.0)


def test_values_that_a_solver_does_not_read_are_said(nets):
    with pytest.warns(UserWarning, match="wudi: solver: adam does not read time"):
        pymerge.merge_state_dicts(nets.base, nets.models, method="wudi", steps=1, time=20.0)


def test_any_module_without_hooks_of_its_own(nets):
    """Modules that hold nothing to merge but numbers in buffers."""
    norm = [nn.BatchNorm1d(3) for _ in range(3)]
    norm[1].running_mean += 1.0
    found = pymerge.merge_state_dicts(norm[0], norm[1:], method="linear", weight=1.0)
    assert found["running_mean"].tolist() == [0.5] * 3
    assert found["num_batches_tracked"].item() == 0


@pytest.mark.parametrize("method", ["linear", "ties", "slerp", "dare_ties"])
def test_both_numerics_are_those_of_files(method, cases, nets, tmp_path, assert_same_bytes):
    case = next(case for case in cases if case.method == method)
    base, models = bases(case, nets)
    given = {"numerics": "mergekit", "dtype": "bfloat16"}
    expected = case.through_files(nets, tmp_path / "out", **given)
    found = pymerge.merge_state_dicts(base, models, **case.call(nets), **given)
    assert_same_bytes(found, expected)
    with pymerge.Session(base, models, **case.call(nets), **given) as session:
        assert_same_bytes(session.merge(), expected)
    accurate = pymerge.merge_state_dicts(base, models, **case.call(nets), dtype="bfloat16")
    assert any(not found[name].equal(accurate[name]) for name in found)


def test_out_may_be_another_view_of_an_input():
    model = {"w": torch.arange(9.0).reshape(3, 3)}
    expected = model["w"].clone()
    out = {"w": model["w"].T}
    pymerge.merge_state_dicts(None, [model], method="passthrough", out=out)
    assert torch.equal(out["w"], expected)


def test_an_expanded_out_is_refused():
    given = {"method": "task_arithmetic", "weight": 1.0, "out": {"w": torch.zeros(1).expand(4)}}
    with pytest.raises(pymerge.PymergeError, match="'w' is expanded"):
        pymerge.merge_state_dicts({"w": torch.zeros(4)}, [{"w": torch.ones(4)}], **given)


def test_a_parameter_is_given_once_and_may_be_a_tensor():
    base, model = {"w": torch.zeros(4)}, {"w": torch.ones(4)}
    given = {"method": "task_arithmetic", "weight": torch.tensor(0.5)}
    found = pymerge.merge_state_dicts(base, [model], lambda_=torch.tensor(0.5), **given)
    assert found["w"].tolist() == [0.25] * 4
    with pytest.raises(pymerge.RecipeError, match="expected lambda or lambda_, found both"):
        pymerge.merge_state_dicts(base, [model], **given, **{"lambda": 1.0, "lambda_": 2.0})


def test_numbers_that_no_method_merges_are_told_of():
    base = {"w": torch.zeros(4), "phase": torch.zeros(4, dtype=torch.complex64)}
    model = {"w": torch.ones(4), "phase": torch.ones(4, dtype=torch.complex64)}
    with pytest.warns(UserWarning, match="1 tensor of complex64, .* copied from base: phase"):
        pymerge.merge_state_dicts(base, [model], method="task_arithmetic", weight=1.0)


def test_out_and_another_out_dtype_are_refused():
    base, model, out = ({"w": torch.zeros(4)} for _ in range(3))
    given = {"method": "task_arithmetic", "weight": 1.0, "out": out}
    pymerge.merge_state_dicts(base, [model], out_dtype="float32", **given)
    with pytest.raises(pymerge.PymergeError, match=r"'w' is float32, .* out_dtype is bfloat16"):
        pymerge.merge_state_dicts(base, [model], out_dtype="bfloat16", **given)


def test_a_passthrough_is_rounded_by_a_dtype_in_between():
    model = {"w": torch.randn(8)}
    given = {"method": "passthrough", "dtype": "bfloat16", "out_dtype": "float32"}
    found = pymerge.merge_state_dicts(None, [model], numerics="mergekit", **given)
    assert torch.equal(found["w"], model["w"].bfloat16().float())
