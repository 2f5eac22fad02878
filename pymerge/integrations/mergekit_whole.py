"""What stands in for mergekit's ``run_merge``: its configuration is a recipe of ours, planned and
merged by our engine as ``pymerge-yaml`` does; mergekit reads the configuration and no more."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pymerge import api
from pymerge.engine import run_plan
from pymerge.integrations.mergekit_executor import Settings
from pymerge.integrations.mergekit_recipe import (
    backends,
    check_architectures,
    files_beside,
    notes,
    plan_on,
)
from pymerge.integrations.mergekit_run import Progress, left_of, seed_of_torch
from pymerge.integrations.mergekit_tally import LOG, TALLY
from pymerge.methods import specs
from pymerge.sizes import MAX_BYTES

RunMerge = Callable[..., None]


def run_merge_with(host: RunMerge, settings: Settings) -> RunMerge:
    """A function that is used in the place of ``host``, mergekit's ``run_merge``.

    What our engine does not have, a method or PyTorch files as output, is left to ``host`` with a
    message; what it refuses is an error.
    """

    @functools.wraps(host)
    def run_merge(
        merge_config: Any,
        out_path: str | os.PathLike[str],
        options: Any,
        config_source: str | None = None,
    ) -> None:
        reason = _why_left(merge_config, options)
        if reason is not None:
            TALLY.leave_whole(reason)
            host(merge_config, out_path, options=options, config_source=config_source)
            return
        with _hub_cache(options.transformers_cache):
            _merge(merge_config, Path(out_path), options, config_source, settings)

    return run_merge


def _why_left(merge_config: Any, options: Any) -> str | None:
    """What we do not have of what is asked for."""
    if merge_config.merge_method not in specs():
        return f"the method {merge_config.merge_method}, which pymerge does not have"
    if not options.safe_serialization:
        return "PyTorch files as output (--no-safe-serialization)"
    return None


def _merge(
    merge_config: Any, out: Path, options: Any, source: str | None, settings: Settings
) -> None:
    given = options.model_dump()
    recipe = api.load_recipe(merge_config.to_yaml() + "\n")
    planned = plan_on(
        recipe,
        # "cpu" is what mergekit writes where nobody chose; then the engine chooses.
        backends("auto" if options.device == "cpu" else options.device, False, settings.backend),
        {
            "memory": left_of(settings.memory),
            "threads": options.num_threads or settings.threads,
            "shard_size": max(0, options.out_shard_size) or MAX_BYTES,
            "allow_pickle": options.lazy_unpickle,
            "numerics": settings.numerics,
            "random_seed": _seed(options, settings),
            "truncate_embeddings": options.unsafe_truncate_embeddings,
        },
    )
    if not options.allow_crimes:
        check_architectures(recipe, planned)
    files = files_beside(
        recipe,
        planned,
        card=options.write_model_card,
        tokenizer=options.copy_tokenizer,
        source=(source or merge_config.to_yaml()).encode(),
    )
    for sentence in (*notes(_beyond_defaults(options, given)), *planned.warnings):
        LOG.warning("%s", sentence)
    with Progress(options.quiet) as progress:
        # As mergekit leaves them: in the page cache, and for the system to write out.
        report = run_plan(
            planned, out, side_files=files, overwrite=True, sync=False, progress=progress
        )
    for sentence in report.warnings[len(planned.warnings) :]:
        LOG.warning("%s", sentence)
    for name, count in report.nonfinite.items():
        LOG.warning("%s: %d elements are NaN or infinite", name, count)
    TALLY.merges += 1
    TALLY.planned += 1
    TALLY.tensors += planned.num_tensors


def _beyond_defaults(options: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options whose values are not mergekit's defaults."""
    fields = type(options).model_fields
    return {name: value for name, value in given.items() if value != fields[name].default}


def _seed(options: Any, settings: Settings) -> int | None:
    """The seed that was given, else the one that the program gave torch; None without either."""
    if options.random_seed is not None:
        return int(options.random_seed)
    return seed_of_torch(settings.numerics) or None


@contextmanager
def _hub_cache(place: str | None) -> Iterator[None]:
    """The folder in which the hub's client keeps models, where one is given."""
    if place is None:
        yield
        return
    from huggingface_hub import constants

    before = constants.HF_HUB_CACHE
    constants.HF_HUB_CACHE = str(place)
    try:
        yield
    finally:
        constants.HF_HUB_CACHE = before


__all__ = ["RunMerge", "run_merge_with"]
