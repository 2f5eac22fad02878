"""Our methods in mergekit's registry: under the names of its own, and those that it lacks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pymerge.errors import RecipeError
from pymerge.integrations.hosts import by_tensor
from pymerge.integrations.mergekit_graph import WITHOUT_EFFECT
from pymerge.integrations.mergekit_run import seed_of_torch
from pymerge.integrations.mergekit_tally import LOG
from pymerge.methods.numerics import Numerics
from pymerge.methods.registry import METHODS, get_method
from pymerge.methods.spec import MethodSpec, ParameterSpec
from pymerge.names import listed
from pymerge.recipe.names import MERGEKIT_METHODS

_TYPES = {"float": float, "int": int, "bool": bool, "str": str}

_replaced: dict[str, Any] = {}
_registered: list[str] = []
#: Who asked for them.
_users: set[str] = set()


def ours() -> tuple[str, ...]:
    """The methods that mergekit lacks and could have: they make one dense model of models alone."""
    return tuple(
        name
        for name, method in METHODS.items()
        if name not in MERGEKIT_METHODS and method.reads is None and not method.extras
    )


def replace_theirs(numerics: Numerics, names: Iterable[str] | None) -> tuple[str, ...]:
    """Put ours in the place of theirs, with their own parameters and rules of inputs.

    :raises RecipeError: a name that not both have.
    """
    from mergekit.merge_methods import registry

    wanted = sorted(MERGEKIT_METHODS) if names is None else list(names)
    unknown = [name for name in wanted if name not in MERGEKIT_METHODS]
    if unknown:
        raise RecipeError(
            f"methods {listed(unknown)}: not methods that mergekit and pymerge both have; those "
            f"are {listed(sorted(MERGEKIT_METHODS))}"
        )
    for name in wanted:
        theirs = _replaced.setdefault(name, registry.get(name))
        registry._METHODS[name] = _method(theirs.spec, numerics, theirs)
    return tuple(wanted)


def restore_theirs() -> None:
    """Undo :func:`replace_theirs`."""
    if not _replaced:
        return
    from mergekit.merge_methods import registry

    registry._METHODS.update(_replaced)
    _replaced.clear()


def register_ours(user: str) -> tuple[str, ...]:
    """Make the methods that mergekit lacks known to it.

    :param user: what needs them, until it calls :func:`remove_ours`.
    :returns: their names; what another program registered under one of them stays.
    """
    from mergekit.merge_methods import registry

    _users.add(user)
    known = {method.spec.name for method in registry.registered_methods()}
    for name in ours():
        if name not in known:
            registry.register(_method(_their_spec(get_method(name).spec), "accurate", None))
            _registered.append(name)
        elif name not in _registered:
            LOG.warning("mergekit has a method %r of another program; pymerge leaves it", name)
    return tuple(_registered)


def remove_ours(user: str) -> None:
    """Undo :func:`register_ours`, once nobody needs them."""
    _users.discard(user)
    if _users or not _registered:
        return
    from mergekit.merge_methods import registry

    for name in _registered:
        registry._METHODS.pop(name, None)
    _registered.clear()


def _their_spec(spec: MethodSpec) -> Any:
    """A specification of ours in mergekit's terms."""
    from mergekit.merge_methods import base

    policy = base.BasePolicy
    contract = base.InputContract(
        base={"required": policy.REQUIRED, "optional": policy.OPTIONAL}.get(
            spec.base, policy.IGNORED
        ),
        min_non_base=None if spec.base == "input" else spec.min_models,
        max_non_base=None if spec.base == "input" else spec.max_models,
        min_inputs=spec.min_models,
        max_inputs=spec.max_models if spec.base == "input" else None,
    )
    return base.MergeMethodSpec(
        name=spec.name,
        parameters=tuple(
            _their_parameter(spec, parameter) for parameter in spec.parameters.values()
        ),
        contract=contract,
        pretty_name=spec.name,
        reference_url=spec.paper or None,
        uses_accelerator=False,
    )


def _their_parameter(spec: MethodSpec, parameter: ParameterSpec) -> Any:
    """What is not given stays None there, so that our presets choose the default."""
    from mergekit.merge_methods import base

    scopes = base.ParameterScope
    of_model = scopes.INPUT if spec.base == "input" else scopes.NON_BASE
    kind: Any = _TYPES[parameter.kind]
    default = {"default": None} if not parameter.required else {}
    return base.ParameterSpec(
        name=parameter.name,
        value_type=kind if parameter.required else kind | None,
        scope=scopes.SHARED if parameter.scope == "shared" else of_model,
        description=parameter.doc,
        **default,
    )


def _method(their_spec: Any, numerics: Numerics, theirs: Any) -> Any:
    """A method of mergekit's interface that computes by ours; ``theirs`` takes what ours cannot:
    tensors with gradients or on other devices than the CPU."""
    from mergekit.merge_methods.base import GroupMergeMethod

    class Method(GroupMergeMethod):  # type: ignore[misc]
        def __init__(self) -> None:
            self.spec = their_spec

        def __getattr__(self, name: str) -> Any:
            """What else mergekit's own object tells of itself."""
            if theirs is None or name.startswith("__"):
                raise AttributeError(name)
            return getattr(theirs, name)

        def merge_group(self, group: Any, /, **parameters: Any) -> Any:
            tensors = [entry.tensor for entry in group.entries]
            plain = all(t.device.type == "cpu" and not t.requires_grad for t in tensors)
            if not plain and theirs is not None:
                LOG.warning(
                    "%s: tensors with gradients or beside the CPU are merged by mergekit",
                    their_spec.name,
                )
                (result,) = theirs([group], parameters=parameters)
                return result
            return _merge(their_spec, group, parameters, numerics)

    return Method()


def _merge(their_spec: Any, group: Any, parameters: dict[str, Any], numerics: Numerics) -> Any:
    """One tensor of a few models by our method, ranked within the tensor where we could do so over
    the model.

    :raises RecipeError: the method needs the whole model, of which mergekit shows one tensor.
    """
    from pymerge.in_memory import merge_tensor

    spec = get_method(their_spec.name).spec
    entries = group.entries if spec.base == "input" else group.non_base
    base = group.base.tensor if group.base is not None and spec.base != "input" else None
    if not entries:
        return base
    given: dict[str, Any] = {}
    for name, value in parameters.items():
        parameter = spec.parameters.get(name)
        if parameter is None:
            if value is not None and name not in WITHOUT_EFFECT.get(spec.name, ()):
                raise RecipeError(
                    f"{spec.name} has the parameter {name!r} in this release of mergekit, which "
                    "pymerge does not know; call uninstall(), or install() without this method"
                )
            continue
        if parameter.scope == "model":
            values = [value[entry.id] for entry in entries]
            if any(each is not None for each in values):
                given[name] = values
        elif value is not None:
            given[name] = value
    if "seed" in spec.parameters:
        given.setdefault("seed", seed_of_torch(numerics))
    given = by_tensor(spec, given, "mergekit")
    device = entries[0].tensor.device
    result = merge_tensor(
        spec.name,
        None if base is None else base.detach().cpu().contiguous(),
        [entry.tensor.detach().cpu().contiguous() for entry in entries],
        name=group.metadata.name or "tensor",
        numerics=numerics,
        **given,
    )
    return result.to(device)
