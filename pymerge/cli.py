"""The command line: parses, calls the API, prints.

Everything heavy is imported inside the commands, so that ``pymerge --help`` answers at once.
"""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pymerge._version import __version__
from pymerge.errors import PymergeError

app = typer.Typer(
    name="pymerge",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Merge the weights of fine-tuned models: streamed, resumable, deterministic to the bit.",
    epilog="Exit codes: 0 done, 2 your input is wrong, 3 storage failed, 130 interrupted.",
)

INTERRUPTED = 130

_debug = False

RecipeArgument = Annotated[
    Path, typer.Argument(help="Recipe in mergekit's YAML dialect.", metavar="RECIPE")
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Memory for the whole process, e.g. 2GiB. Default: half of what is available.",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, metavar="N", help="Compute threads. Default: all CPUs."),
]
ShardOption = Annotated[
    str | None,
    typer.Option("--shard-size", metavar="SIZE", help="Largest output file. Default: 5GB."),
]
BackendOption = Annotated[
    str | None,
    typer.Option("--backend", metavar="NAME", help="Demand a backend instead of the best one."),
]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="NAME", help="Where to compute: cpu, cuda, cuda:1, ...")
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Treat warnings about the recipe as errors.")
]
PickleOption = Annotated[
    bool,
    typer.Option(
        "--allow-pickle", help="Accept .bin files, read by torch.load(weights_only=True)."
    ),
]
MissingOption = Annotated[
    bool,
    typer.Option("--allow-missing", help="Merge a tensor without the models that lack it."),
]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"pymerge {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show the traceback of an error.", envvar="PYMERGE_DEBUG"),
    ] = False,
) -> None:
    """Options that come before the command."""
    global _debug
    _debug = _debug or debug


@app.command()
def merge(
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Argument(help="Output model folder.", metavar="OUT")],
    memory: MemoryOption = None,
    threads: ThreadsOption = None,
    shard_size: ShardOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model that OUT holds.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            help="Write a Chrome trace of each read, computation and write.",
        ),
    ] = None,
    non_finite: Annotated[
        str,
        typer.Option(
            "--non-finite",
            metavar="warn|fail",
            help="What NaN and infinite elements in the result mean.",
        ),
    ] = "warn",
    sync: Annotated[
        bool,
        typer.Option(
            "--sync/--no-sync",
            help="Make the output safe against power loss (fsync) before it counts as done.",
        ),
    ] = True,
    cache_output: Annotated[
        bool,
        typer.Option(
            "--cache-output",
            help="Leave the output in the page cache, for an evaluation that follows.",
        ),
    ] = False,
    read_method: Annotated[
        str | None,
        typer.Option(
            "--read-method",
            metavar="NAME",
            help="Force how inputs are read: dontcache, direct, buffered, plain.",
        ),
    ] = None,
    backend: BackendOption = None,
    strict: StrictOption = False,
    allow_pickle: PickleOption = False,
    allow_missing: MissingOption = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Merge the models of RECIPE into the folder OUT. Run it again to continue a stopped merge."""
    global _debug
    _debug = _debug or debug
    from pymerge import api

    planned = api.plan(
        recipe,
        memory=memory,
        threads=threads,
        shard_size=shard_size,
        backend=backend,
        strict=strict,
        allow_pickle=allow_pickle,
        allow_missing=allow_missing,
    )
    run = partial(
        api.merge,
        planned,
        out,
        overwrite=overwrite,
        non_finite=non_finite,  # type: ignore[arg-type]
        sync=sync,
        cache_output=cache_output,
        read_method=read_method,
        trace=trace,
        resume_hint=f"run {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}",
    )
    if quiet:
        report = run()
        if report.nonfinite:
            text = f"warning: {len(report.nonfinite)} tensors hold non-finite elements"
            typer.echo(text, err=True)
        return
    from pymerge.terminal import Display, print_report, print_warnings

    print_warnings(planned.warnings)
    with Display() as display:
        report = run(progress=display.update)
    print_report(report)
    print_warnings(report.warnings[len(planned.warnings) :])


@app.command()
def plan(
    recipe: RecipeArgument,
    memory: MemoryOption = None,
    threads: ThreadsOption = None,
    shard_size: ShardOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every output tensor.")] = False,
    folder: Annotated[
        Path,
        typer.Option(
            "--folder",
            metavar="DIR",
            help="Folder whose storage the floor is estimated for, on a scratch file.",
        ),
    ] = Path("."),
    backend: BackendOption = None,
    strict: StrictOption = False,
    allow_pickle: PickleOption = False,
    allow_missing: MissingOption = False,
) -> None:
    """Print what a merge will do: jobs, bytes, memory, backends, time floor.

    Of the models only headers are read.
    """
    from pymerge import api
    from pymerge.engine.matrix_rates import matrix_rates_of
    from pymerge.engine.rates import rates_of
    from pymerge.terminal import print_plan

    planned = api.plan(
        recipe,
        memory=memory,
        threads=threads,
        shard_size=shard_size,
        backend=backend,
        strict=strict,
        allow_pickle=allow_pickle,
        allow_missing=allow_missing,
    )
    rates = rates_of(folder)
    print_plan(planned, rates, matrix_rates_of(planned), as_json=as_json, tensors=tensors)


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(help="Folder that pymerge wrote.", metavar="OUT")],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print problems only.")] = False,
) -> None:
    """Reread a merged folder and compare every byte with the checksums of its manifest."""
    from pymerge import api
    from pymerge.sizes import format_size

    report = api.verify(out)
    for problem in report.problems:
        typer.echo(problem, err=True)
    if report.problems:
        raise PymergeError(f"{out} is damaged, see above")
    if not quiet:
        typer.echo(
            f"{out} is whole: {report.files_checked} files, {format_size(report.num_bytes)} checked"
        )


@app.command()
def materialize(
    out: Annotated[Path, typer.Argument(help="Folder merged by emr or tall_masks.", metavar="OUT")],
    task: Annotated[
        str,
        typer.Argument(
            help="The task: its model in the recipe, its number from 0, or a part of the name.",
            metavar="TASK",
        ),
    ],
    dest: Annotated[Path, typer.Argument(help="Output model folder.", metavar="DEST")],
    memory: MemoryOption = None,
    threads: ThreadsOption = None,
    shard_size: ShardOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model that DEST holds.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    backend: BackendOption = None,
) -> None:
    """Write the model of one TASK of the multi-task folder OUT as a model of its own."""
    from pymerge.runtime.materialize import materialize as run
    from pymerge.terminal import Display, print_report

    options: dict[str, Any] = {
        "memory": memory,
        "threads": threads,
        "shard_size": shard_size,
        "backend": backend,
        "overwrite": overwrite,
        "resume_hint": f"run {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}",
    }
    if quiet:
        run(out, task, dest, **options)
        return
    with Display() as display:
        report = run(out, task, dest, progress=display.update, **options)
    print_report(report)


@app.command("extract-lora")
def extract_lora(
    base: Annotated[str, typer.Argument(help="Model it was trained from.", metavar="BASE")],
    model: Annotated[str, typer.Argument(help="Fine-tuned model.", metavar="MODEL")],
    out: Annotated[Path, typer.Argument(help="Output adapter folder.", metavar="OUT")],
    rank: Annotated[
        int, typer.Option("--rank", min=1, metavar="N", help="Largest rank of a module.")
    ] = 128,
    energy: Annotated[
        float | None,
        typer.Option(
            "--energy",
            metavar="SHARE",
            help="Smallest rank that holds this share of a change's squared norm, e.g. 0.99.",
        ),
    ] = None,
    epsilon: Annotated[
        float,
        typer.Option("--epsilon", metavar="X", help="Drop singular values at or below X."),
    ] = 0.0,
    include: Annotated[
        list[str] | None,
        typer.Option(
            "--include", metavar="REGEX", help="Only modules with such a name; repeatable."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="REGEX", help="Leave such modules out; repeatable."),
    ] = None,
    embed: Annotated[
        bool,
        typer.Option("--embed", help="Decompose embeddings and head, too, instead of saving them."),
    ] = False,
    save_module: Annotated[
        list[str] | None,
        typer.Option("--save-module", metavar="NAME", help="Save a module whole; repeatable."),
    ] = None,
    distribute_scale: Annotated[
        bool,
        typer.Option(
            "--distribute-scale/--no-distribute-scale",
            help="Roots of the singular values in both factors, or all of them in A.",
        ),
    ] = True,
    dtype: Annotated[
        str,
        typer.Option("--dtype", metavar="NAME", help="Factors: float32, float16 or bfloat16."),
    ] = "float32",
    route: Annotated[
        str, typer.Option("--route", metavar="gram|randomized", help="How to decompose.")
    ] = "gram",
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an adapter that OUT holds.")
    ] = False,
    allow_pickle: PickleOption = False,
) -> None:
    """Write a PEFT LoRA adapter that takes BASE near MODEL."""
    from pymerge.lora.extract import extract_lora as run

    report = run(
        base,
        model,
        out,
        rank=rank,
        energy=energy,
        epsilon=epsilon,
        include=include or (),
        exclude=exclude or (),
        embed=embed,
        save_modules=save_module or (),
        distribute_scale=distribute_scale,
        dtype=dtype,
        route=route,  # type: ignore[arg-type]
        threads=threads,
        device=device,
        overwrite=overwrite,
        allow_pickle=allow_pickle,
        progress=_count_modules if sys.stderr.isatty() else None,
    )
    for line in report.lines():
        typer.echo(line)


def _count_modules(done: int, num: int) -> None:
    """One line on the terminal that counts up."""
    typer.echo(f"\r{done} of {num} modules", err=True, nl=done == num)


@app.command("combine-lora")
def combine_lora(
    out: Annotated[Path, typer.Argument(help="Output adapter folder.", metavar="OUT")],
    adapters: Annotated[
        list[str], typer.Argument(help="PEFT adapters of one base.", metavar="ADAPTER...")
    ],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help="svd, cat, linear, ties, magnitude_prune, ties_svd, magnitude_prune_svd or "
            "robust_merge.",
        ),
    ] = "svd",
    weight: Annotated[
        list[float] | None,
        typer.Option(
            "--weight", metavar="X", help="One for each ADAPTER, in order. Default: 1 each."
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, metavar="N", help="Largest rank, for methods with svd."),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            "--energy", metavar="SHARE", help="Share of the squared norm that the rank holds."
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option("--density", metavar="SHARE", help="Elements kept by ties, magnitude_prune."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="NAME", help="Factors: float32, float16 or bfloat16."),
    ] = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an adapter that OUT holds.")
    ] = False,
    allow_pickle: PickleOption = False,
) -> None:
    """Combine LoRA adapters of one base into one adapter."""
    from pymerge.lora.combine import combine_lora as run

    report = run(
        adapters,
        out,
        method=method,
        weights=weight or None,
        rank=rank,
        energy=energy,
        density=density,
        dtype=dtype,
        threads=threads,
        device=device,
        overwrite=overwrite,
        allow_pickle=allow_pickle,
    )
    for line in report.lines():
        typer.echo(line)


@app.command()
def inspect(
    checkpoint: Annotated[
        str, typer.Argument(help="Model folder, file or hub id.", metavar="CKPT")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Read the data too and count non-finite elements.")
    ] = False,
    allow_pickle: PickleOption = False,
) -> None:
    """List the tensors of a checkpoint, as its validated headers give them."""
    from pymerge.checkpoint import open_checkpoint
    from pymerge.terminal import print_checkpoint

    opened = open_checkpoint(checkpoint, allow_pickle=allow_pickle)
    counts = None
    if check:
        from pymerge.engine.scan import count_nonfinite

        counts = count_nonfinite(opened)
    print_checkpoint(opened, counts, as_json=as_json)
    if not as_json:
        from pymerge.runtime.smile_folder import is_smile_folder, open_smile
        from pymerge.runtime.task_folder import is_task_folder, open_tasks

        if is_smile_folder(opened):
            upscaled = open_smile(checkpoint)
            experts = ", ".join(f"{i}: {name}" for i, name in enumerate(upscaled.experts))
            typer.echo(
                f"with experts beside {len(upscaled.modules)} layers by smile; experts {experts}"
            )
            typer.echo("pymerge.load_smile gives the model with them in Python")
        if is_task_folder(opened):
            folder = open_tasks(checkpoint)
            names = ", ".join(f"{task.number}: {task.name}" for task in folder.tasks)
            typer.echo(f"with a model for each task by {folder.method}; tasks {names}")
            typer.echo("pymerge materialize OUT TASK DEST writes one of them")


@app.command()
def methods(
    name: Annotated[
        str | None, typer.Argument(help="Show one method with its parameters.", metavar="NAME")
    ] = None,
) -> None:
    """List the merge methods, or the parameters of one."""
    from pymerge.methods import METHODS, get_method
    from pymerge.terminal import print_method, print_methods

    if name is None:
        print_methods([entry.spec for entry in METHODS.values()])
    else:
        print_method(get_method(name).spec)


@app.command()
def doctor(
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure storage (64 MiB), memory and matrix products."),
    ] = False,
    folder: Annotated[
        Path, typer.Option("--folder", metavar="DIR", help="Folder whose storage is examined.")
    ] = Path("."),
) -> None:
    """Tell what is available on this machine, and why the rest is not."""
    from pymerge.doctor import examine

    report = examine(folder)
    for line in report.lines():
        typer.echo(line)
    if measure:
        from pymerge.engine.rates import existing_parent, measure_rates
        from pymerge.sizes import format_size

        rates = measure_rates(existing_parent(folder))
        typer.echo(
            f"measured: device read {format_size(rates.read)}/s, cached read "
            f"{format_size(rates.cached_read)}/s, durable write "
            f"{format_size(rates.write)}/s, memory copy "
            f"{format_size(rates.copy)}/s"
        )
        from pymerge.engine.matrix_rates import measure_matrix_rates
        from pymerge.machine import compute_threads

        threads = compute_threads(None)
        matrices = measure_matrix_rates(threads)
        typer.echo(
            f"measured: matrix products {matrices.flops32:.3g} flops/s in float32 and "
            f"{matrices.flops64:.3g} in float64 with {threads} threads, eigenproblems "
            f"{matrices.eigen64:.3g} with one"
        )
    if report.problems:
        raise PymergeError("pymerge cannot merge here; the problems are listed above")


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for models, plot and results.")
    ] = Path("demo"),
) -> None:
    """Train small models on scikit-learn's digits, merge them with every method, print a table."""
    from rich.console import Console

    from pymerge.demo import run_demo

    run_demo(out, Console())


def main() -> None:
    """Entry point: run a command; an error of ours becomes a message and its exit code."""
    # The search for pydantic's plugins reads the metadata of every installed package.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # the option parser turns Ctrl-C into this
            _fail("interrupted", INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)
    except PymergeError as error:
        if _debug:
            traceback.print_exc()
        _fail(f"error: {error}", error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        os._exit(141)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except Exception as error:
        _show_usage_error(error)
        _show_missing_extension(error)
        raise


def _show_usage_error(error: Any) -> None:
    """A mistake in the options themselves, which the option parser words."""
    show = getattr(error, "show", None)
    if show is not None and hasattr(error, "exit_code"):
        show()
        sys.exit(error.exit_code)


def _show_missing_extension(error: Exception) -> None:
    """An installation whose native part cannot be loaded: the doctor knows why."""
    if not isinstance(error, ImportError) or _debug:
        return
    from pymerge.doctor import examine

    problems = examine().problems
    if problems:
        _fail(f"error: {'; '.join(problems)}", PymergeError.exit_code)


def _fail(message: str, code: int) -> None:
    typer.echo(message, err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
