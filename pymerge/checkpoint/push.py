"""Uploading a merged model to the hub: the folder is verified first, then sent as one commit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymerge.checkpoint.hub import brief, is_hub_id
from pymerge.checkpoint.strict_json import shown
from pymerge.checkpoint.verify import Progress, verify_folder
from pymerge.errors import CheckpointError, PymergeError, StorageError

#: May be edited after the merge: it is for people, and no loader reads it.
CARD_NAME = "README.md"
UNFINISHED_SUFFIX = ".partial"
MESSAGE = "Upload a model merged by pymerge"
#: What the answers of the hub mean for someone who wants to upload.
_MEANINGS = {
    401: "the token is not valid; log in anew with 'hf auth login' or set HF_TOKEN",
    403: "the token may not write there; take one with write access to that user or organisation",
    404: "there is no such repository or branch, or the token may not see it",
    409: "the repository changed meanwhile; push again",
    413: "the hub found it too large",
}


@dataclass(frozen=True)
class Pushed:
    """What was uploaded: where it is to be seen, the names of the files and their bytes."""

    url: str
    files: tuple[str, ...]
    num_bytes: int


def push_folder(
    folder: Path | str,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
) -> Pushed:
    """Upload the output folder of a merge to a model repository of the hub, made where there is
    none.

    Every byte is compared with the manifest before anything is sent. Hidden files, and what an
    unfinished merge leaves, stay here. The model card may have been edited. ``HF_ENDPOINT`` names
    another hub.

    :param private: make a new repository private; one that exists stays as it is.
    :param revision: the branch, made where there is none; default: the main one.
    :param message: of the commit.
    :param create_pr: open a pull request instead of changing the branch.
    :param token: default: that of ``HF_TOKEN`` or ``hf auth login``.
    :param progress: called with the bytes verified and the bytes to verify.
    :raises CheckpointError: the folder is not the whole output of a merge.
    :raises PymergeError: there is no token, it has no permission, or the name can be no repository.
    :raises StorageError: the hub cannot be reached or failed.
    """
    folder = Path(folder)
    if not is_hub_id(repo_id) or "/" not in repo_id:
        raise PymergeError(
            f"repository {shown(repo_id)}: expected owner/name of letters, digits and . _ -"
        )
    _check_whole(folder, progress)
    files = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    url = _upload(files, repo_id, private, revision, message or MESSAGE, create_pr, token)
    num_bytes = sum(path.stat().st_size for path in files.values())
    return Pushed(url, tuple(files), num_bytes)


def _check_whole(folder: Path, progress: Progress | None) -> None:
    report = verify_folder(folder, progress=progress)
    problems = [each for each in report.problems if not each.startswith(f"{CARD_NAME}: ")]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{folder} is not the whole output of a merge and is not uploaded: "
            f"{'; '.join(problems[:3])}{more}"
        )


def _files(folder: Path) -> Iterator[Path]:
    """What belongs to the model: no hidden files, nothing unfinished."""
    for root, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and not name.endswith(UNFINISHED_SUFFIX):
                yield Path(root) / name


def _upload(
    files: dict[str, Path],
    repo_id: str,
    private: bool,
    revision: str | None,
    message: str,
    create_pr: bool,
    token: str | None,
) -> str:
    """Make the repository and one commit; returns where that is to be seen."""
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

    token = token or get_token()
    if constants.HF_HUB_OFFLINE:
        raise PymergeError(
            f"{repo_id}: nothing can be uploaded while HF_HUB_OFFLINE is set; unset it"
        )
    if not token:
        raise PymergeError(
            f"{repo_id}: expected a token for {constants.ENDPOINT}, found none; log in with "
            "'hf auth login' or set HF_TOKEN to a token with write access"
        )
    api = HfApi(token=token, library_name="pymerge")
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, path) for name, path in files.items()],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
        )
    # The hub's client raises many kinds (its own, httpx's or requests', OSError); what they say is
    # passed on.
    except Exception as error:
        raise _worded(error, repo_id, constants.ENDPOINT) from error
    return str(commit.pr_url or commit.commit_url)


def _worded(error: Exception, repo_id: str, endpoint: str) -> PymergeError:
    """Ours for what the hub's client raised."""
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, ValueError) and status is None:  # what the hub or its client will not take
        return PymergeError(f"{repo_id}: {' '.join(str(error).split())}")
    if status in _MEANINGS:
        return PymergeError(f"{repo_id}: {endpoint} answered {status}: {_MEANINGS[status]}")
    if status is not None:
        return StorageError(f"{repo_id}: {endpoint} answered {status}: {brief(error)}; try again")
    return StorageError(
        f"{repo_id}: the upload to {endpoint} failed: {brief(error)}; check the network and push "
        "again: what has arrived is not sent twice"
    )
