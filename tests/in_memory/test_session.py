"""Session: every merge is that of merge_state_dicts, whatever was merged before it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import pymerge
from pymerge.in_memory.driver import Driver


def bases(case, nets):
    return nets.base if case.takes_base else None, nets.models[: case.num_models]


def changes(case):
    """Other values for some of a case's parameters."""
    found = [{}]
    for name, value in case.parameters.items():
        if isinstance(value, list):
            found.append({name: [0.5 * each + 0.1 for each in value]})
        elif name in ("density", "t", "ratio", "lambda_", "select_topk"):
            found.append({name: 0.5 * value})
        elif name == "steps":
            found.append({name: value - 2})
        elif name in ("trim_scope", "scope"):
            found.append({name: "tensor"})
    return [*found, *reversed(found)]


@pytest.mark.filterwarnings("ignore:none of")
def test_merges_are_those_of_merge_state_dicts(case, nets, assert_same_bytes):
    base, models = bases(case, nets)
    given = case.call(nets)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (nets.base, *models)]
    with pymerge.Session(base, models, **given) as session:
        for change in changes(case):
            expected = pymerge.merge_state_dicts(base, models, **{**given, **change})
            assert_same_bytes(session.merge(**change), expected)
    for model, state in zip((nets.base, *models), before, strict=True):
        assert_same_bytes(model.state_dict(), state)


@pytest.mark.parametrize(
    ("method", "parameters", "changed"),
    [
        ("ties", {"density": 0.3}, {"lambda_": 0.5, "normalize": False, "merge": "sum"}),
        ("ties", {"density": 0.3, "rescale": True}, {"lambda_": 0.5}),
        ("ties", {"density": 0.3, "trim_scope": "model"}, {"lambda_": 0.5}),
        ("ties", {"preset": "official", "zero_sign": "plus"}, {"lambda_": 0.5}),
        ("breadcrumbs", {"density": 0.7, "gamma": 0.1}, {"lambda_": 0.5}),
        ("dare_ties", {"density": 0.5}, {"lambda_": 0.5}),
        ("della", {"density": 0.5, "epsilon": 0.1}, {"lambda_": 0.5}),
        ("pcb", {}, {"lambda_": 0.5}),
        ("multislerp", {}, {}),
    ],
)
def test_new_weights_measure_nothing_again(
    method, parameters, changed, nets, assert_same_bytes, monkeypatch
):
    looks = []
    look = Driver._look
    monkeypatch.setattr(Driver, "_look", lambda *args: looks.append(1) or look(*args))
    base = None if method == "multislerp" else nets.base
    with pymerge.Session(base, nets.models, method=method, **parameters) as session:
        session.merge([0.5, 0.5, 0.5])
        assert looks
        looks.clear()
        found = session.merge([0.9, 0.1, 0.4], **changed)
        assert not looks
    expected = pymerge.merge_state_dicts(
        base, nets.models, method=method, weight=[0.9, 0.1, 0.4], **parameters, **changed
    )
    assert_same_bytes(found, expected)


@pytest.mark.parametrize("method", ["slerp", "nuslerp"])
def test_another_place_between_two_models_measures_nothing_again(method, nets, monkeypatch):
    base, models = (nets.base, nets.models[:1]) if method == "slerp" else (None, nets.models[:2])
    values = [{"t": 0.2}, {"t": 0.7}] if method == "slerp" else [{"weight": w} for w in (1, [1, 3])]
    looks = []
    look = Driver._look
    monkeypatch.setattr(Driver, "_look", lambda *args: looks.append(1) or look(*args))
    with pymerge.Session(base, models, method=method) as session:
        session.merge(**values[0])
        looks.clear()
        session.merge(**values[1])
    assert not looks


def test_a_live_module_is_written_in_place(nets, net, assert_same_bytes):
    """In its own dtype; buffers of whole numbers too; nothing is allocated for it."""
    live = net(0).bfloat16()
    live.steps.zero_()
    memory = {name: tensor.data_ptr() for name, tensor in live.state_dict().items()}
    with pymerge.Session(nets.base, nets.models, method="ties", density=0.5) as session:
        for weights in ([1, 0, 0], [0.3, 0.3, 0.4], [0, 1, 0]):
            assert session.merge(weights, out=live) is live
            expected = pymerge.merge_state_dicts(
                nets.base,
                nets.models,
                method="ties",
                density=0.5,
                weight=weights,
                out_dtype="bfloat16",
            )
            assert_same_bytes(live.state_dict(), expected)
    assert {name: tensor.data_ptr() for name, tensor in live.state_dict().items()} == memory
    assert live(torch.arange(4)).dtype == torch.bfloat16


def test_weights_of_tensors_and_of_layers(nets, assert_same_bytes):
    with pymerge.Session(nets.base, nets.models, method="task_arithmetic") as session:
        names = session.names
        assert list(names) == [name for name in nets.base.state_dict() if name != "steps"]
        rows = np.random.default_rng(0).uniform(size=(len(names), 3))
        by_array = session.merge(rows)
        assert_same_bytes(session.merge(torch.from_numpy(rows)), by_array)
        by_name = dict(zip(names, rows.tolist(), strict=True))
        assert_same_bytes(session.merge(by_name), by_array)
        assert_same_bytes(session.merge(lambda name: by_name[name]), by_array)
        for name, weights in by_name.items():
            one = session.merge(weights)
            assert one[name].equal(by_array[name])
        layers = np.array([[1.0, 0.0, 0.0], [0.0, 0.5, 0.25]])
        found = session.merge(session.by_layer(layers, outside=[0.1, 0.1, 0.1]))
        assert found["layers.1.up.weight"].equal(session.merge(layers[1])["layers.1.up.weight"])
        assert found["layers.0.up.bias"].equal(session.merge(layers[0])["layers.0.up.bias"])
        assert found["head.weight"].equal(session.merge(0.1)["head.weight"])


def test_threads_may_share_a_session(nets, net, assert_same_bytes):
    weights = [[k / 10, 1 - k / 10, 0.5] for k in range(10)]
    with pymerge.Session(nets.base, nets.models, method="ties", density=0.4, threads=2) as session:
        expected = [session.merge(each) for each in weights]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(session.merge, weights))
    for one, other in zip(found, expected, strict=True):
        assert_same_bytes(one, other)


def test_checkpoints_are_mapped_into_memory(nets, cases, tmp_path, assert_same_bytes):
    case = next(case for case in cases if case.method == "ties")
    expected = case.through_files(nets, tmp_path / "out")
    with pymerge.Session.from_checkpoints(
        nets.root / "base", nets.folders, method="ties"
    ) as session:
        assert_same_bytes(session.merge(**case.parameters), expected)
    with pytest.raises(pymerge.CheckpointError):
        pymerge.Session.from_checkpoints(tmp_path / "none", nets.folders, method="ties")


def test_mistakes_are_named(nets, net):
    with pymerge.Session(nets.base, nets.models, method="task_arithmetic") as session:
        for call, message in (
            ({}, "needs the parameter 'weight'"),
            ({"weights": 1.0, "weight": 1.0}, "weights or weight, found both"),
            ({"weights": [1.0, 2.0]}, "2 values for 3"),
            ({"weights": np.ones((2, 3))}, "has 2 rows, expected one for each of"),
            ({"wieghts": 1.0}, "has no parameter 'wieghts'"),
            ({"weights": 1.0, "out": nets.base}, "is the memory of one of the session's inputs"),
            ({"weights": 1.0, "out": {}}, "is missing; out needs every tensor"),
        ):
            with pytest.raises(pymerge.PymergeError, match=message):
                session.merge(**call)
        with pytest.raises(pymerge.PymergeError, match="row of weights for each layer, found 3"):
            session.by_layer(np.ones((3, 3)))
        with pytest.raises(pymerge.PymergeError, match="are in no layer; give"):
            session.by_layer(np.ones((2, 3)))
    session.close()
    with pytest.raises(pymerge.PymergeError, match="the session is closed"):
        session.merge(1.0)
    with pytest.raises(pymerge.RecipeError, match="has no parameter 'densty'"):
        pymerge.Session(nets.base, nets.models, method="ties", densty=1.0)
    with (
        pytest.raises(pymerge.RecipeError, match="slerp has no parameter 'weight'"),
        pymerge.Session(nets.base, nets.models[:1], method="slerp") as session,
    ):
        session.merge(weights=1.0)


@pytest.mark.parametrize(
    ("method", "first", "then"),
    [
        ("nuslerp", {"nuslerp_flatten": True}, {"nuslerp_flatten": False, "weight": [0.3, 0.7]}),
        ("model_stock", {"filter_wise": False}, {"filter_wise": True}),
        (
            "breadcrumbs",
            {"trim_scope": "tensor"},
            {"trim_scope": "row", "density": 0.7, "weight": 0.5},
        ),
    ],
)
def test_tiles_end_with_rows_where_this_call_asks_for_it(
    method, first, then, monkeypatch, assert_same_bytes
):
    monkeypatch.setattr("pymerge.in_memory.tiles.TILE_ELEMENTS", 4096)
    models = [{"a": torch.randn(99, 101)} for _ in range(3)]
    expected = pymerge.merge_state_dicts(models[0], models[1:], method=method, **then)
    with pymerge.Session(models[0], models[1:], method=method) as session:
        session.merge(**{**then, **first})
        assert_same_bytes(session.merge(**then), expected)


def test_out_may_share_memory_with_no_input_of_any_tensor():
    base, model = ({"a": torch.randn(8), "b": torch.randn(8)} for _ in range(2))
    given = {"method": "ties", "weight": 1.0, "density": 0.5}
    with pymerge.Session(base, [model], **given) as session:
        for taken in (model["b"], base["b"].detach()):
            with pytest.raises(pymerge.PymergeError, match="the memory of one of the session's"):
                session.merge(out={"a": taken, "b": torch.zeros(8)})
        expected = pymerge.merge_state_dicts(base, [model], **given)
        assert session.merge()["a"].tolist() == expected["a"].tolist()
