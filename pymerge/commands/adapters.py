"""LoRA adapters: extract one from a model, combine several."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pymerge.commands.options import DeviceOption, PickleOption, ThreadsOption


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
