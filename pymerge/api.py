"""The Python API: plan a merge, run it, verify its output."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.errors import PymergeError, RecipeError
from pymerge.machine import available_memory, compute_threads
from pymerge.methods import specs
from pymerge.sizes import parse_size

if TYPE_CHECKING:
    from pymerge.checkpoint import Checkpoint, Pushed, VerifyReport
    from pymerge.engine.events import Snapshot
    from pymerge.engine.run import MergeReport, NonFinite
    from pymerge.methods.numerics import Numerics
    from pymerge.plan import Plan
    from pymerge.plan.explain import Explanation
    from pymerge.recipe import Recipe

RecipeSource = str | os.PathLike[str] | Mapping[str, Any]

#: Reads and writes in flight beside the compute threads.
READERS = 6
#: Share of the available memory that a merge takes where no budget is given, and its bounds.
MEMORY_SHARE = 0.5
MEMORY_BOUNDS = (256 << 20, 16 << 30)


def load_recipe(recipe: RecipeSource, *, strict: bool = False) -> Recipe:
    """Read and check a recipe: a YAML file, YAML text, or a mapping, in the dialect of mergekit.

    :param strict: make warnings errors.
    :raises RecipeError: a key, method, parameter or model is wrong; the message names all findings.
    """
    from pymerge.recipe import load_recipe as load

    source = os.fspath(recipe) if isinstance(recipe, os.PathLike) else recipe
    return load(source, specs=specs(), strict=strict)


def plan(
    recipe: RecipeSource | Recipe,
    *,
    memory: int | str | None = None,
    threads: int | None = None,
    shard_size: int | str | None = None,
    backend: str | None = None,
    strict: bool = False,
    allow_pickle: bool = False,
    allow_missing: bool = False,
    numerics: Numerics = "accurate",
    random_seed: int | None = None,
    opened: Mapping[str, Checkpoint] | None = None,
    truncate_embeddings: bool = False,
) -> Plan:
    """Decide everything a merge will do; only headers are read.

    :param recipe: what :func:`load_recipe` takes, or what it returned.
    :param memory: bytes for the whole process, or a text such as ``"2GiB"``; default: half of the
        available memory, at most 16 GiB. The result does not depend on it.
    :param threads: compute threads, 1 to 1024, default all CPUs available. The result does not
        depend on it.
    :param shard_size: bytes of an output shard, default 5 GB.
    :param backend: ask for a backend by name; default: the first that can do every op.
    :param strict: make the recipe's warnings errors.
    :param allow_pickle: accept PyTorch's pickled ``.bin`` files, through
        ``torch.load(weights_only=True)``.
    :param allow_missing: merge a tensor without the models that lack it instead of failing.
    :param numerics: ``"accurate"`` computes in float32 and rounds once; ``"mergekit"`` rounds every
        intermediate in the recipe's dtype as mergekit does, for results equal to its own.
    :param random_seed: the seed of random methods, instead of the recipe's parameter ``seed``; with
        ``numerics="mergekit"`` it is that of torch's generator.
    :param opened: models by the name that the recipe gives them, instead of opening these.
    :param truncate_embeddings: where vocabularies have different sizes and the recipe chooses no
        tokenizer, merge the first rows of embeddings, which all models have. The output is wrong
        unless their tokens have the same ids.
    :raises RecipeError: the recipe is wrong.
    :raises CheckpointError: an input is not a valid checkpoint.
    :raises PlanError: recipe and inputs do not fit together, or not into the memory.
    :raises BackendError: the backend asked for cannot run here.
    """
    from pymerge.plan import SHARD_BYTES, make_plan
    from pymerge.recipe import Recipe

    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, strict=strict)
    num_threads = compute_threads(threads)
    shard_bytes = SHARD_BYTES if shard_size is None else parse_size(shard_size, "shard size")
    if shard_bytes < 1:
        raise PymergeError(f"shard size: expected at least 1 byte, found {shard_bytes}")
    return make_plan(
        loaded,
        memory=default_memory() if memory is None else parse_size(memory, "memory"),
        threads=num_threads,
        readers=READERS,
        shard_bytes=shard_bytes,
        backend=backend,
        allow_pickle=allow_pickle,
        allow_missing=allow_missing,
        strict=strict,
        numerics=numerics,
        random_seed=random_seed,
        opened=opened or {},
        truncate_embeddings=truncate_embeddings,
    )


def explain(
    recipe: RecipeSource | Recipe,
    tensor: str | None = None,
    *,
    strict: bool = False,
    **planning: Any,
) -> Explanation:
    """What a merge will do to each output tensor, and which line of the recipe says so.

    Only headers are read. Of several documents the one without a name is explained.

    :param recipe: what :func:`load_recipe` takes, or what it returned.
    :param tensor: the name of an output tensor, or a part of the names of some; default: all.
    :param strict: make the recipe's warnings errors.
    :param planning: further options of :func:`plan`.
    :raises PlanError: no output tensor has ``tensor`` in its name.

    Raises also what :func:`plan` raises.
    """
    from pymerge.plan.explain import explain_plan

    loaded, inner = load_documents(recipe, strict=strict, **planning)
    decided = plan(loaded, strict=strict, **{**planning, "opened": inner})
    return explain_plan(loaded, decided, tensor)


def load_documents(
    recipe: RecipeSource | Recipe,
    *,
    strict: bool = False,
    opened: Mapping[str, Checkpoint] | None = None,
    as_read: bool = False,
    **planning: Any,
) -> tuple[Recipe, dict[str, Checkpoint]]:
    """A recipe and ``opened``; of several documents the one without a name, with the outputs of the
    others, of which there are headers only.

    :param as_read: the outputs are to be made as they are read.
    :raises RecipeError: no document is without a name; or, with ``as_read``, one must be written.
    """
    from pymerge.plan.merged import as_checkpoint, why_written
    from pymerge.recipe import Recipe, in_order, split_documents

    found = dict(opened or {})
    if isinstance(recipe, Recipe):
        return recipe, found
    text = _text_of(recipe)
    try:
        documents = [] if text is None else split_documents(text)
        if len(documents) < 2:
            return load_recipe(recipe, strict=strict), found
        merges = {each.name: load_recipe(each.text, strict=strict) for each in documents}
    except RecipeError as error:
        if text is recipe or str(error).startswith(f"{recipe}: "):
            raise
        raise RecipeError(f"{recipe}: {error}") from error
    if None not in merges:
        raise RecipeError(
            "every document has a name; leave out that of the one that others lead to"
        )
    uses = {}
    for name, each in merges.items():
        references = (*each.models, each.donor, each.tokenizer_donor)
        uses[name] = list(dict.fromkeys(ref.path for ref in references if ref.path in merges))
    for name in in_order(uses):
        if name is None or name in found:
            continue
        decided = plan(merges[name], strict=strict, **{**planning, "opened": found})
        reason = why_written(decided) if as_read else None
        if reason is not None:
            raise RecipeError(
                f"the document {name!r} must be merged by itself ({reason}); keep its output with "
                "pymerge multi --intermediates, and name the outputs of all documents as models, "
                "without the recipe"
            )
        found[name] = as_checkpoint(decided, name)
    return merges[None], found


def _text_of(recipe: RecipeSource) -> str | None:
    """The YAML text; None for a mapping, and for what is no readable file."""
    if isinstance(recipe, Mapping):
        return None
    text = os.fspath(recipe)
    if "\n" in text:
        return text
    try:
        return Path(text).read_text("utf-8-sig")
    except (OSError, ValueError):
        return None  # a recipe on one line, or something that load_recipe objects to


def merge(
    recipe: RecipeSource | Recipe | Plan,
    out: str | os.PathLike[str],
    *,
    memory: int | str | None = None,
    threads: int | None = None,
    shard_size: int | str | None = None,
    backend: str | None = None,
    strict: bool = False,
    allow_pickle: bool = False,
    allow_missing: bool = False,
    numerics: Numerics = "accurate",
    random_seed: int | None = None,
    overwrite: bool = False,
    non_finite: NonFinite = "warn",
    sync: bool = True,
    cache_output: bool = False,
    read_method: str | None = None,
    trace: str | os.PathLike[str] | None = None,
    progress: Callable[[Snapshot], None] | None = None,
    resume_hint: str = "run the same merge again",
) -> MergeReport:
    """Merge the checkpoints of a recipe into a model folder at ``out``.

    The output is whole or is not a model: until the last file is in place no loader accepts it. A
    run that was killed continues when the same merge is started again, with the same bytes as
    without the kill.

    :param recipe: what :func:`plan` takes, or a plan; with a plan the parameters up to
        ``random_seed`` are part of it already.
    :param out: output folder; created if it does not exist.
    :param overwrite: replace a model that ``out`` holds; without it that is an error.
    :param non_finite: ``"warn"`` reports NaN and infinite elements, ``"fail"`` leaves the merge
        unfinished.
    :param sync: make the output durable against power loss before it is committed (fsync).
    :param cache_output: leave the output in the page cache, for an evaluation that follows; by
        default nothing else is pushed out of the cache.
    :param read_method: force how sources are read: dontcache, direct, buffered or plain.
    :param trace: write a Chrome trace of every read, computation and write to this file.
    :param progress: called about ten times a second with a :class:`Snapshot`.
    :param resume_hint: how to continue, for the message of an interruption.
    :raises StorageError: reading or writing failed (no space, device error, source changed).
    :raises InterruptedMerge: SIGINT or SIGTERM; the state can be resumed.

    Raises also what :func:`plan` raises.
    """
    from pymerge.engine import run_plan, side_files
    from pymerge.engine.rates import known_floor
    from pymerge.engine.sources import METHODS
    from pymerge.plan import Plan

    if non_finite not in ("warn", "fail"):
        raise PymergeError(f"non-finite: expected warn or fail, found {non_finite!r}")
    if read_method is not None and read_method not in METHODS:
        raise PymergeError(
            f"read method: expected one of {', '.join(METHODS)}, found {read_method!r}"
        )
    decided = (
        recipe
        if isinstance(recipe, Plan)
        else plan(
            recipe,
            memory=memory,
            threads=threads,
            shard_size=shard_size,
            backend=backend,
            strict=strict,
            allow_pickle=allow_pickle,
            allow_missing=allow_missing,
            numerics=numerics,
            random_seed=random_seed,
        )
    )
    folder = Path(out)
    files = side_files(decided)
    return run_plan(
        decided,
        folder,
        side_files=files,
        overwrite=overwrite,
        nonfinite=non_finite,
        sync=sync,
        drop_cache=not cache_output,
        read_method=read_method,
        floor_seconds=known_floor(decided, folder),
        trace=None if trace is None else Path(trace),
        progress=progress,
        resume_hint=resume_hint,
    )


def verify(
    out: str | os.PathLike[str], *, progress: Callable[[int, int], None] | None = None
) -> VerifyReport:
    """Reread an output folder and compare every byte with the checksums of its manifest.

    :raises CheckpointError: the folder has no manifest that can be read.
    """
    from pymerge.checkpoint import verify_folder

    return verify_folder(Path(out), progress=progress)


def push(
    out: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Pushed:
    """Verify an output folder and upload it to the Hugging Face hub as one commit.

    Arguments, result and errors are those of :func:`pymerge.checkpoint.push_folder`.
    """
    from pymerge.checkpoint import push_folder

    return push_folder(
        Path(out),
        repo_id,
        private=private,
        revision=revision,
        message=message,
        create_pr=create_pr,
        token=token,
        progress=progress,
    )


def default_memory() -> int:
    """The budget where none is given: half of the memory available, within bounds."""
    low, high = MEMORY_BOUNDS
    return min(high, max(low, int(available_memory() * MEMORY_SHARE)))
