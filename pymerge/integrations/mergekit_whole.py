"""What stands in for mergekit's ``run_merge``: its configuration is a recipe of ours, planned and
merged by our engine as ``pymerge-yaml`` does; mergekit reads the configuration and no more."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge import api
from pymerge.errors import BackendError, PlanError, RecipeError
from pymerge.integrations.mergekit_executor import Settings
from pymerge.integrations.mergekit_recipe import (
    check_architectures,
    files_beside,
    notes,
    plan_on,
)
from pymerge.integrations.mergekit_run import left_of, run_reported, seed_of_torch
from pymerge.integrations.mergekit_tally import LOG, TALLY
from pymerge.methods import specs
from pymerge.sizes import MAX_BYTES

if TYPE_CHECKING:
    from pymerge.plan import Plan
    from pymerge.recipe import Recipe

RunMerge = Callable[..., None]


class WrongRecipe(RecipeError, ValueError):
    """A recipe is wrong; mergekit raises a ValueError then, which its callers catch."""


class WrongPlan(PlanError, ValueError):
    """Recipe and models do not fit; mergekit raises a ValueError then, which its callers catch."""


def run_merge_with(host: RunMerge, settings: Settings) -> RunMerge:
    """A function that is used in the place of ``host``, mergekit's ``run_merge``.

    What our engine does not have, a method or PyTorch files as output, is left to ``host``, whose
    executor is ours and says so. What it refuses is an error, also a ValueError where recipe or
    models are wrong.
    """

    @functools.wraps(host)
    def run_merge(
        merge_config: Any,
        out_path: str | os.PathLike[str],
        options: Any,
        config_source: str | None = None,
    ) -> None:
        if merge_config.merge_method not in specs() or not options.safe_serialization:
            host(merge_config, out_path, options=options, config_source=config_source)
            return
        try:
            with _hub_cache(options.transformers_cache):
                _merge(merge_config, Path(out_path), options, config_source, settings)
        except RecipeError as error:
            raise WrongRecipe(str(error)) from error
        except PlanError as error:
            raise WrongPlan(str(error)) from error

    return run_merge


def _merge(
    merge_config: Any, out: Path, options: Any, source: str | None, settings: Settings
) -> None:
    recipe = api.load_recipe(merge_config.to_yaml() + "\n")
    planned = _planned(recipe, options, settings)
    if not options.allow_crimes:
        check_architectures(recipe, planned)
    files = files_beside(
        recipe,
        planned,
        card=options.write_model_card,
        tokenizer=options.copy_tokenizer,
        source=(source or merge_config.to_yaml()).encode(),
    )
    for sentence in notes(_beyond_defaults(options)):
        LOG.warning("%s", sentence)
    run_reported(planned, out, side_files=files, quiet=options.quiet)
    TALLY.merges += 1
    TALLY.planned += 1
    TALLY.tensors += planned.num_tensors


def _planned(recipe: Recipe, options: Any, settings: Settings) -> Plan:
    """:raises BackendError: the backend that :func:`redirect` was given cannot run here."""
    planning = {
        "memory": left_of(settings.memory),
        "threads": options.num_threads or settings.threads,
        "shard_size": max(0, options.out_shard_size) or MAX_BYTES,
        "allow_pickle": options.lazy_unpickle,
        "numerics": settings.numerics,
        "random_seed": _seed(options, settings),
        "truncate_embeddings": options.unsafe_truncate_embeddings,
    }
    # mergekit writes "cpu" where nobody chose, and "cuda" where torch has one and "auto" was given.
    if settings.backend is not None or options.device == "cpu":
        return plan_on(recipe, (settings.backend,), planning)
    try:
        return plan_on(recipe, ("cuda", "triton"), planning)
    except BackendError as error:
        LOG.warning("device %s: pymerge chooses another backend: %s", options.device, error)
        return plan_on(recipe, (None,), planning)


def _beyond_defaults(options: Any) -> dict[str, Any]:
    """The options whose values are not mergekit's defaults."""
    fields, given = type(options).model_fields, options.model_dump()
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


__all__ = ["RunMerge", "WrongPlan", "WrongRecipe", "run_merge_with"]
