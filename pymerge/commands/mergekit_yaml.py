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
from pymerge.errors import PymergeError
from pymerge.integrations import mergekit_recipe

if TYPE_CHECKING:
    from pymerge.plan import Plan

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
    allow_missing: options.AllowMissing = False,
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
        "allow_missing": allow_missing,
        "numerics": numerics,
        "random_seed": random_seed,
        "truncate_embeddings": unsafe_truncate_embeddings,
    }
    backends = mergekit_recipe.backends(device, cuda or gpu_rich, backend)
    planned = mergekit_recipe.plan_on(recipe, backends, planning)
    if not allow_crimes:
        mergekit_recipe.check_architectures(recipe, planned)
    files = mergekit_recipe.files_beside(
        recipe,
        planned,
        card=write_model_card,
        tokenizer=copy_tokenizer,
        source=config_file.read_bytes(),
    )
    notes = None if quiet else list(mergekit_recipe.notes(given))
    _run(planned, out_path, files, overwrite, notes)


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
