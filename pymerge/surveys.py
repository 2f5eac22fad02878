"""Survey a merged model: what it kept of its base and its experts, tensor by tensor."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge import api
from pymerge.checkpoint import Checkpoint, Manifest, open_checkpoint, read_manifest
from pymerge.checkpoint.manifest import MANIFEST_NAME
from pymerge.errors import CheckpointError, PymergeError
from pymerge.machine import compute_threads
from pymerge.report.figures import Survey, TensorFigures
from pymerge.sizes import counted, parse_size

if TYPE_CHECKING:
    from pymerge.engine.events import Snapshot
    from pymerge.plan import Job
    from pymerge.recipe import Recipe


#: What the name of one of packed experts has behind that of the tensor.
_EXPERT = re.compile(r"\[\d+\]$")


@dataclass
class _Compared:
    """What the output is compared with."""

    jobs: list[Job]
    checkpoints: dict[str, Checkpoint]
    base: str | None
    experts: list[str]
    method: str | None = None
    warnings: list[str] = field(default_factory=list)


def survey(
    out: str | os.PathLike[str],
    *,
    recipe: api.RecipeSource | Recipe | None = None,
    base: str | None = None,
    models: Sequence[str] = (),
    use_recipe: bool = True,
    memory: int | str | None = None,
    threads: int | None = None,
    allow_pickle: bool = False,
    progress: Callable[[Snapshot], None] | None = None,
) -> Survey:
    """Measure a merged model against its base and its experts.

    The figures do not depend on memory and threads. Deltas to the base are float32, norms and inner
    products sums of float64.

    :param out: the folder of the merged model.
    :param recipe: what it was merged by; default: the recipe in the folder's manifest.
    :param base: with a recipe that has a base model, where that is now; else a base to compare
        with.
    :param models: with a recipe, where its other models are now, in its order; else models to
        compare with.
    :param use_recipe: False compares with ``base`` and ``models`` alone, by names and shapes.
    :param memory: bytes for the whole process, or a text such as ``"2GiB"``.
    :param threads: compute threads, default all CPUs.
    :param allow_pickle: accept PyTorch's pickled ``.bin`` files.
    :param progress: called about ten times a second.
    :raises CheckpointError: the output or an input cannot be opened, or they do not fit together.
    :raises PymergeError: there is nothing to compare with.
    :raises StorageError: reading failed.

    Raises also what :func:`pymerge.plan` raises.
    """
    from pymerge.engine.comparison import short_names
    from pymerge.engine.survey import plan_survey, run_survey

    output = open_checkpoint(os.fspath(out), allow_pickle=allow_pickle)
    manifest = _manifest(Path(out))
    source = None
    if use_recipe:
        source = recipe if recipe is not None else manifest and manifest.content.get("recipe")
    if source:
        compared = _of_recipe(source, output, manifest, base, models, allow_pickle)
    else:
        if base is None and not models:
            found = (
                f"{MANIFEST_NAME} with the recipe of a merge, found none"
                if use_recipe
                else "models to compare with when no recipe is used, found none"
            )
            raise PymergeError(
                f"{output.reference}: expected {found}; name what to compare with by --base and "
                "--models, or the recipe by --recipe"
            )
        compared = _of_models(output, base, models, allow_pickle)
    plan = plan_survey(
        compared.jobs,
        compared.checkpoints,
        output,
        memory=api.default_memory() if memory is None else parse_size(memory, "memory"),
        threads=compute_threads(threads),
        readers=api.READERS,
    )
    figures = run_survey(plan, progress)
    return Survey(
        out=output.reference,
        method=compared.method,
        base=compared.base,
        experts=tuple(compared.experts),
        labels=short_names([*compared.experts, *([compared.base] if compared.base else [])]),
        tensors=tuple(_placed(compared.jobs, figures)),
        warnings=tuple(compared.warnings),
    )


def _manifest(folder: Path) -> Manifest | None:
    return read_manifest(folder) if (folder / MANIFEST_NAME).is_file() else None


def _placed(jobs: Sequence[Job], figures: Mapping[str, Any]) -> list[TensorFigures]:
    """The figures with the layer and the module of each tensor."""
    from pymerge.plan.layers import find_stacks, layer_prefix

    stacks = find_stacks([job.name for job in jobs])
    placed = []
    for job in jobs:
        stack = stacks.get(layer_prefix(job.name) or "")
        split = None if stack is None else stack.split(job.name)
        layer, rest = (None, job.name) if split is None else split
        parts = ["*" if part.isdecimal() else part for part in rest.split(".")]
        parts[-1] = _EXPERT.sub("[*]", parts[-1])
        placed.append(
            TensorFigures(
                name=job.name,
                layer=None if stack is None or layer is None else f"{stack.prefix}{layer}",
                module=".".join(parts),
                shape=job.shape,
                format=job.format.name,
                experts=tuple(job.model_names[:-1]),
                has_base=job.base is not None,
                figures=figures[job.name],
            )
        )
    return placed


def _of_models(
    output: Checkpoint, base: str | None, models: Sequence[str], allow_pickle: bool
) -> _Compared:
    """The reduced form: nothing but names and shapes says what belongs together."""
    from pymerge.engine.comparison import compare_checkpoints

    experts = {name: open_checkpoint(name, allow_pickle=allow_pickle) for name in models}
    opened = None if base is None else open_checkpoint(base, allow_pickle=allow_pickle)
    jobs = compare_checkpoints(output, opened, experts)
    alone = [
        job.name
        for job in jobs
        if job.kind == "merge" and job.base is None and len(job.models) == 1
    ]
    warnings = []
    if alone:
        warnings.append(
            f"{counted(len(alone), 'tensor')} of the output are compared with nothing, because no "
            f"model has one of that name and shape: {_some(alone)}"
        )
    checkpoints = experts if base is None or opened is None else {base: opened, **experts}
    return _Compared(jobs, checkpoints, base, list(experts), warnings=warnings)


def _of_recipe(
    source: Any,
    output: Checkpoint,
    manifest: Manifest | None,
    base: str | None,
    models: Sequence[str],
    allow_pickle: bool,
) -> _Compared:
    from pymerge.engine.comparison import compare_merge

    loaded, inner = api.load_documents(source, as_read=True, allow_pickle=allow_pickle)
    own = None if loaded.base_model is None else str(loaded.base_model)
    moved = _moved(loaded, base if own is not None else None, models, allow_pickle)
    try:
        # What a merge takes is not taken here: the plan tells what belongs together.
        plan = api.plan(
            loaded,
            memory=1 << 50,
            threads=1,
            allow_pickle=allow_pickle,
            allow_missing=True,
            truncate_embeddings=True,
            opened={**inner, **moved},
        )
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. An input of the merge is needed for a report: name where the inputs are "
            "with --base and --models, or give another --recipe"
        ) from error
    checkpoints = dict(plan.checkpoints)
    extra = None
    if base is not None and own is None:
        extra = checkpoints[base] = open_checkpoint(base, allow_pickle=allow_pickle)
        own = base
    jobs = compare_merge(plan, output, own, extra)
    experts = [str(ref) for ref in loaded.models if str(ref) != own]
    has_base = any(job.base is not None for job in jobs)
    warnings = [] if manifest is None else _changed_inputs(plan.checkpoints, manifest)
    return _Compared(
        jobs,
        checkpoints,
        own if has_base else None,
        experts,
        loaded.method,
        warnings,
    )


def _moved(
    recipe: Recipe, base: str | None, models: Sequence[str], allow_pickle: bool
) -> dict[str, Checkpoint]:
    """The recipe's models that are elsewhere now, by the name that it gives them."""
    others = [ref for ref in recipe.models if ref != recipe.base_model]
    if models and len(models) != len(others):
        names = ", ".join(map(str, others))
        raise PymergeError(
            f"--models: expected one for each of the recipe's {len(others)} models beside the base "
            f"({names}), found {len(models)}; name them in this order"
        )
    places = list(zip(others, models, strict=False))
    if base is not None and recipe.base_model is not None:
        places.append((recipe.base_model, base))
    opened = {}
    for ref, place in places:
        if ref.revision is not None or ref.adapter is not None:
            raise PymergeError(
                f"{ref}: the recipe names it with a revision or an adapter, so that it cannot be "
                "named anew here; write the new place into a recipe and give that with --recipe"
            )
        opened[ref.path] = open_checkpoint(place, allow_pickle=allow_pickle)
    return opened


def _changed_inputs(checkpoints: Mapping[str, Checkpoint], manifest: Manifest) -> list[str]:
    """Sentences about inputs whose headers are not those that were merged."""
    merged = {
        record["header_sha256"]
        for each in manifest.content.get("inputs", [])
        for record in each["files"]
    }
    return [
        f"{name} is not what was merged: {header.path.name} has another header"
        for name, checkpoint in checkpoints.items()
        for header in checkpoint.headers
        if header.sha256 not in merged
    ]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
