"""``pymerge-yaml``: mergekit-yaml's command line over this engine."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pymerge.commands import mergekit_options as options
from pymerge.commands.options import Debug, this_command
from pymerge.commands.running import run_app
from pymerge.errors import BackendError, PlanError, PymergeError

if TYPE_CHECKING:
    from pymerge.plan import Plan
    from pymerge.recipe import Recipe

RECIPE_NAME = "mergekit_config.yml"
CARD_NAME = "README.md"

app = typer.Typer(
    name="pymerge-yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(epilog="Exit codes: 0 done, 2 your input is wrong, 3 storage failed, 130 interrupted.")
def merge(
    config_file: options.ConfigArgument,
    out_path: options.OutArgument,
    allow_crimes: options.AllowCrimes = False,
    unsafe_truncate_embeddings: options.TruncateEmbeddings = False,
    trust_remote_code: options.TrustRemoteCode = False,
    transformers_cache: options.TransformersCache = None,
    lora_merge_cache: options.LoraMergeCache = None,
    lora_merge_dtype: options.LoraMergeDtype = None,
    random_seed: options.RandomSeed = None,
    verbosity: options.Verbosity = 0,
    quiet: options.Quiet = False,
    cuda: options.Cuda = False,
    device: options.Device = None,
    low_cpu_memory: options.LowCpuMemory = False,
    lazy_unpickle: options.LazyUnpickle = False,
    read_to_gpu: options.ReadToGpu = False,
    multi_gpu: options.MultiGpu = False,
    num_threads: options.NumThreads = None,
    gpu_rich: options.GpuRich = False,
    async_write: options.AsyncWrite = False,
    write_threads: options.WriteThreads = None,
    out_shard_size: options.OutShardSize = "5B",
    copy_tokenizer: options.CopyTokenizer = True,
    clone_tensors: options.CloneTensors = False,
    write_model_card: options.WriteModelCard = True,
    safe_serialization: options.SafeSerialization = True,
    memory: options.Memory = None,
    numerics: options.Numerics = "accurate",
    overwrite: options.Overwrite = False,
    allow_pickle: options.AllowPickle = False,
    backend: options.Backend = None,
    strict: options.Strict = False,
) -> None:
    """Merge the models of CONFIG_FILE into OUT_PATH: mergekit-yaml's options with their meaning.

    Run it again to continue a stopped merge.
    """
    given = dict(locals())
    Debug.shown = Debug.shown or verbosity > 0
    if not safe_serialization:
        raise PymergeError(
            "--no-safe-serialization: expected safetensors as the output, found pickles asked for, "
            "which are not written; leave the option out"
        )
    if transformers_cache is not None:
        # The hub's client reads this when it is imported, which nothing has done yet.
        os.environ["HF_HUB_CACHE"] = str(transformers_cache)
    from pymerge import api

    recipe = api.load_recipe(config_file, strict=strict)
    planning: dict[str, Any] = {
        "memory": memory,
        "threads": num_threads,
        "shard_size": options.shard_bytes(out_shard_size),
        "strict": strict,
        "allow_pickle": allow_pickle or lazy_unpickle,
        "numerics": numerics,
        "random_seed": random_seed,
        "truncate_embeddings": unsafe_truncate_embeddings,
    }
    planned = _plan(recipe, options.backends(device, cuda or gpu_rich, backend), planning)
    if not allow_crimes:
        _check_architectures(recipe, planned)
    files = _files(recipe, planned, card=write_model_card, tokenizer=copy_tokenizer)
    if write_model_card:
        files[RECIPE_NAME] = config_file.read_bytes()
    _run(planned, out_path, files, overwrite, None if quiet else list(options.notes(given)))


def _plan(recipe: Recipe, backends: tuple[str | None, ...], planning: dict[str, Any]) -> Plan:
    """The plan with the first of the backends that can run here.

    :raises BackendError: none can.
    """
    from pymerge import api

    reasons = []
    for backend in backends:
        try:
            return api.plan(recipe, backend=backend, **planning)
        except BackendError as error:
            reasons.append(str(error))
    raise BackendError("; ".join(reasons))


def _check_architectures(recipe: Recipe, planned: Plan) -> None:
    """:raises PlanError: the models are of different architectures."""
    found: dict[str, str] = {}
    for ref in recipe.models:
        named = (planned.checkpoints[str(ref)].config or {}).get("architectures")
        if ref.override_architecture is not None:
            found.setdefault(ref.override_architecture, str(ref))
        elif isinstance(named, list) and named:
            found.setdefault(", ".join(map(str, named)), str(ref))
    if len(found) > 1:
        each = "; ".join(f"{model}: {architecture}" for architecture, model in found.items())
        raise PlanError(
            f"expected models of one architecture, found {each}. Give --allow-crimes to merge "
            "them by the names of their tensors"
        )


def _files(recipe: Recipe, planned: Plan, *, card: bool, tokenizer: bool) -> dict[str, bytes]:
    """The files beside the weights that the options leave."""
    from pymerge.checkpoint.sidefiles import TOKENIZER_NAMES
    from pymerge.engine import side_files

    unwanted = [] if card else [CARD_NAME]
    if not tokenizer and recipe.tokenizer is None:  # one that the recipe makes is always written
        unwanted += [*TOKENIZER_NAMES, "additional_chat_templates"]
    files = side_files(planned)
    return {name: data for name, data in files.items() if name.partition("/")[0] not in unwanted}


def _run(
    planned: Plan, out: Path, files: dict[str, bytes], overwrite: bool, notes: list[str] | None
) -> None:
    """Merge; ``notes`` are shown with the warnings, None for quiet."""
    from pymerge.engine import run_plan
    from pymerge.engine.rates import known_floor

    run = partial(
        run_plan,
        planned,
        out,
        side_files=files,
        overwrite=overwrite,
        drop_cache=True,
        floor_seconds=known_floor(planned, out),
        resume_hint=this_command(),
    )
    if notes is None:
        report = run()
        if report.nonfinite:
            text = f"warning: {len(report.nonfinite)} tensors hold non-finite elements"
            typer.echo(text, err=True)
        return
    from pymerge.terminal import Display, print_report, print_warnings

    for note in notes:
        typer.echo(f"note: {note}", err=True)
    print_warnings(planned.warnings)
    with Display() as display:
        report = run(progress=display.update)
    print_report(report)
    print_warnings(report.warnings[len(planned.warnings) :])


def main() -> None:
    """Entry point of the command ``pymerge-yaml``."""
    run_app(app)


if __name__ == "__main__":
    main()
