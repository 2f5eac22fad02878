"""The files beside the weights: configuration, tokenizer, model card, manifest."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path

from pymerge.checkpoint import (
    INDEX_NAME,
    MANIFEST_NAME,
    Checkpoint,
    FileRecord,
    Manifest,
    companion_files,
    config_json,
    index_json,
    manifest_json,
    read_manifest,
    tokenizer_files,
)
from pymerge.checkpoint.license import license_of
from pymerge.engine.journal import NAME as JOURNAL_NAME
from pymerge.engine.journal import Record
from pymerge.engine.pieces import checksums, nonfinite
from pymerge.errors import CheckpointError, StorageError
from pymerge.methods.spec import ParameterValue, value_text
from pymerge.plan import Plan
from pymerge.plan.merged import MergedCheckpoint
from pymerge.report.card import CardBeside, CardModel, CardParameters, model_card

CARD_NAME = "README.md"


def side_files(plan: Plan) -> dict[str, bytes]:
    """Name below the output folder → content, the manifest excluded.

    :raises StorageError: a file of a donor cannot be read.
    """
    files: dict[str, bytes] = {}
    for donor, paths in (
        (plan.donor, companion_files(plan.donor)),
        (plan.tokenizer_donor, tokenizer_files(plan.tokenizer_donor)),
    ):
        for path in paths:
            if donor.folder is not None:
                files[path.relative_to(donor.folder).as_posix()] = _content(path)
    files |= plan.files
    if plan.config is not None:
        files["config.json"] = config_json(plan.config)
    files[CARD_NAME] = _card(plan).encode()
    return files


def finished_manifest(plan: Plan, folder: Path, files: Mapping[str, bytes]) -> Manifest | None:
    """The manifest of a folder that holds the whole output of exactly this plan, with these files
    beside the weights, else None.

    :raises StorageError: the system does not let us look into the folder.
    """
    try:
        if (folder / JOURNAL_NAME).exists() or not (folder / MANIFEST_NAME).exists():
            return None
    except OSError as error:
        raise StorageError(
            f"cannot look into the output folder {folder}: {error}; choose another folder"
        ) from error
    try:
        manifest = read_manifest(folder)
        if manifest.content.get("plan") != plan.hash:
            return None
        # What is known only after the merge is compared with itself, below.
        late = () if plan.description is None else (plan.description.file_name,)
        known = {name: record for name, record in manifest.files.items() if name not in late}
        if known != _records(plan, files) or any(name not in manifest.files for name in late):
            return None
        whole = all(
            (folder / shard.file_name).stat().st_size == shard.num_bytes for shard in plan.shards
        ) and all(
            FileRecord.of_file(folder / name) == record for name, record in manifest.files.items()
        )
    except (CheckpointError, OSError):
        return None
    return manifest if whole else None


def _records(plan: Plan, files: Mapping[str, bytes]) -> dict[str, FileRecord]:
    """What the manifest says of the files beside the weights."""
    found = {name: FileRecord.of_bytes(content) for name, content in files.items()}
    if len(plan.model_shards) > 1:
        found[INDEX_NAME] = FileRecord.of_bytes(index_json(plan.model_shards))
    return found


def make_manifest(plan: Plan, records: Mapping[str, Record], files: Mapping[str, bytes]) -> bytes:
    """The manifest of a finished merge."""
    return manifest_json(
        recipe=plan.recipe_text,
        method=plan.method.spec.name,
        plan_hash=plan.hash,
        inputs=tuple(plan.checkpoints.values()),
        backends=plan.ops.backends,
        shards=plan.model_shards,
        task_shards=plan.task_shards,
        checksums=checksums(plan, records),
        task_checksums={
            part.name: crc
            for job in plan.jobs
            for part, crc in zip(job.parts, records[job.name].parts, strict=True)
        },
        nonfinite=nonfinite(plan, records),
        files={name: FileRecord.of_bytes(content) for name, content in files.items()},
    )


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {path}, which the output needs: {error}") from error


def _card(plan: Plan) -> str:
    sizes: dict[str, int] = {}
    for job in plan.jobs:
        sizes[job.format.name] = sizes.get(job.format.name, 0) + job.num_bytes
    spec = plan.method.spec
    return model_card(
        title=f"Merged model ({spec.name})",
        method=spec,
        models=[_card_model(checkpoint) for checkpoint in plan.checkpoints.values()],
        parameters=_parameters(plan),
        base=None if spec.base == "input" else _card_model(plan.donor),
        recipe=plan.recipe_text,
        dtype=max(sizes, key=lambda name: (sizes[name], name)),
        num_tensors=plan.num_tensors,
        beside=None
        if plan.description is None
        else CardBeside(plan.description.title, plan.description.use, plan.tasks),
    )


def _card_model(checkpoint: Checkpoint) -> CardModel:
    known = None if isinstance(checkpoint, MergedCheckpoint) else license_of(checkpoint)
    return CardModel(checkpoint.reference, checkpoint.hub_id, known)


def _parameters(plan: Plan) -> list[CardParameters]:
    """The values that the merged tensors have, of each model by its reference and of all."""
    found: dict[str | None, dict[str, set[ParameterValue]]] = {None: {}}
    for job in plan.jobs:
        if job.kind != "merge":
            continue
        own = zip(job.model_names, job.model_parameters, strict=False)
        for name, values in ((None, job.parameters), *own):
            opened = None if name is None else plan.checkpoints.get(name)
            of_model = found.setdefault(name if opened is None else opened.reference, {})
            for key, value in values.items():
                of_model.setdefault(key, set()).add(value)
    return [
        CardParameters(reference, {key: _range_text(each) for key, each in values.items()})
        for reference, values in found.items()
    ]


def _range_text(values: Set[ParameterValue]) -> str:
    """The value, or the ends of a range of numbers, or the words."""
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(values) > 1 and len(numbers) == len(values):
        return f"{value_text(min(numbers))} to {value_text(max(numbers))}"
    return ", ".join(sorted(map(value_text, values)))
