"""The files beside the weights that a model needs: tokenizer, processors, modules, code."""

from __future__ import annotations

from pathlib import Path

from pymerge.checkpoint.config import read_json, read_json_object
from pymerge.checkpoint.paths import stays_inside
from pymerge.checkpoint.source import PICKLE_SUFFIXES, Checkpoint
from pymerge.checkpoint.strict_json import shown
from pymerge.errors import CheckpointError

TOKENIZER_NAMES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "added_tokens.json",
    "merges.txt",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
COMPANION_NAMES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
)
MODULES_NAME = "modules.json"
SENTENCE_NAMES = (
    MODULES_NAME,
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)


def tokenizer_files(checkpoint: Checkpoint) -> list[Path]:
    """The tokenizer's files, all under ``checkpoint.folder``."""
    if checkpoint.folder is None:
        return []
    templates = sorted((checkpoint.folder / "additional_chat_templates").glob("*.jinja"))
    return _existing(checkpoint.folder, TOKENIZER_NAMES) + templates


def companion_files(checkpoint: Checkpoint) -> list[Path]:
    """Other files the model cannot be used without, all under ``checkpoint.folder``.

    Generation and processor settings; the modules of a sentence-transformers model with what they
    hold, weights included (they are the donor's, not merged); Python files where config.json or
    tokenizer_config.json names classes in them. Raises CheckpointError for a malformed
    modules.json.
    """
    if checkpoint.folder is None:
        return []
    files = _existing(checkpoint.folder, COMPANION_NAMES)
    if (checkpoint.folder / MODULES_NAME).exists():
        files += _existing(checkpoint.folder, SENTENCE_NAMES)
        files += _module_files(checkpoint.folder)
    if _needs_code(checkpoint):
        files += _code_files(checkpoint.folder)
    return files


def skipped_files(checkpoint: Checkpoint) -> list[Path]:
    """Python files that are not copied, since no configuration names them."""
    if checkpoint.folder is None or _needs_code(checkpoint):
        return []
    return _code_files(checkpoint.folder)


def _existing(folder: Path, names: tuple[str, ...]) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]


def _code_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.py"))


def _needs_code(checkpoint: Checkpoint) -> bool:
    if checkpoint.folder is None:
        return False
    tokenizer = read_json_object(checkpoint.folder / "tokenizer_config.json") or {}
    return "auto_map" in (checkpoint.config or {}) or "auto_map" in tokenizer


def _module_files(folder: Path) -> list[Path]:
    """Files in the sub-folders that modules.json names."""
    path = folder / MODULES_NAME
    modules = read_json(path)
    if not isinstance(modules, list):
        modules = [None]
    places = [module.get("path") if isinstance(module, dict) else None for module in modules]
    files = []
    for place in places:
        if not isinstance(place, str) or (place and not stays_inside(place)):
            raise CheckpointError(
                f"{path}: expected a list of modules, each with the path of a sub-folder, found "
                f"{shown(place)}; copy or download the model again"
            )
        if not place:
            continue
        inside = sorted(file for file in (folder / place).glob("*") if file.is_file())
        has_safetensors = any(file.suffix == ".safetensors" for file in inside)
        files += [
            file for file in inside if not (has_safetensors and file.suffix in PICKLE_SUFFIXES)
        ]
    return files
