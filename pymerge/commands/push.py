"""Send a merged model to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    out: Annotated[Path, typer.Argument(help="Folder that pymerge wrote.", metavar="OUT")],
    repo_id: Annotated[
        str, typer.Argument(help="Model repository: owner/name.", metavar="REPO_ID")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(
            "--branch", "--revision", metavar="NAME", help="Branch, made where there is none."
        ),
    ] = None,
    message: Annotated[
        str | None, typer.Option("--message", "-m", metavar="TEXT", help="Of the commit.")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of a commit.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Verify OUT and upload it to the Hugging Face hub.

    The token is that of HF_TOKEN or of hf auth login; HF_ENDPOINT names another hub.
    """
    from pymerge import api
    from pymerge.sizes import counted, format_size

    if quiet:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    pushed = api.push(
        out, repo_id, private=private, revision=revision, message=message, create_pr=create_pr
    )
    if not quiet:
        size = format_size(pushed.num_bytes)
        typer.echo(f"{counted(len(pushed.files), 'file')}, {size}: {pushed.url}")
