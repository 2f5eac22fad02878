"""Reading which token has which id from a tokenizer's files, without the library that runs it.

tokenizer.json says it all where it is there; older folders hold a vocabulary in a format of its
own: vocab.json (byte-level BPE), vocab.txt (WordPiece) or a SentencePiece model.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

from pymerge.checkpoint.config import read_json, read_json_object
from pymerge.checkpoint.strict_json import shown
from pymerge.errors import CheckpointError

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
ADDED_TOKENS_NAME = "added_tokens.json"
SENTENCEPIECE_NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
#: Classes that number the pieces of a SentencePiece model as it does.
_PLAIN_SENTENCEPIECE = ("Llama", "CodeLlama", "Gemma", "Mistral")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_COPY_AGAIN = "copy or download the file again"

#: How an added token is found in a text, as in tokenizer.json.
Flags = Mapping[str, bool]
#: Those of a token that has none of its own.
PLAIN_FLAGS: Flags = dict.fromkeys(FLAGS, False) | {"normalized": True}


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """The vocabulary of a model's tokenizer.

    ``tokens`` maps texts to ids, in the order of the ids; ``added`` maps those that are matched
    before the model splits a text to their flags. ``model_ids`` is how many ids the model itself
    gives out. ``document`` is what tokenizer.json holds, None where the folder has none; ``config``
    is that of tokenizer_config.json.
    """

    folder: Path
    tokens: Mapping[str, int]
    added: Mapping[str, Flags]
    model_ids: int
    document: Mapping[str, Any] | None = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)

    @cached_property
    def texts(self) -> dict[int, str]:
        """Id to text."""
        return {number: text for text, number in self.tokens.items()}

    @cached_property
    def num_ids(self) -> int:
        """The highest id and one."""
        return max(self.tokens.values(), default=-1) + 1


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The vocabulary of the tokenizer in a folder, None where it has none.

    Raises CheckpointError where its files cannot be understood.
    """
    config = read_json_object(folder / TOKENIZER_CONFIG_NAME) or {}
    if (folder / TOKENIZER_NAME).is_file():
        return _of_document(folder, config)
    models = [folder / name for name in SENTENCEPIECE_NAMES if (folder / name).is_file()]
    has_json = (folder / "vocab.json").is_file()
    if models and not has_json and models[0].name == "tokenizer.model" and _is_plain(config):
        return _of_words(folder, _pieces(models[0]), config)
    if models:
        return _through_transformers(folder, config)
    if has_json:
        words = read_json_object(folder / "vocab.json") or {}
        return _of_words(folder, _checked(folder / "vocab.json", words), config)
    if (folder / "vocab.txt").is_file():
        lines = _text(folder / "vocab.txt").split("\n")
        lines = lines[:-1] if lines[-1] == "" else lines
        words = {line.removesuffix("\r"): number for number, line in enumerate(lines)}
        return _of_words(folder, words, config)
    if (folder / "tekken.json").is_file():
        raise CheckpointError(
            f"{folder}: expected {TOKENIZER_NAME}, found only tekken.json, which pymerge does not "
            "read; save the tokenizer with transformers and put its tokenizer.json beside it"
        )
    return None


def _of_document(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    path = folder / TOKENIZER_NAME
    document = read_json_object(path) or {}
    model = document.get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(words, list):  # Unigram: [piece, score], its id the position
        pieces = [piece[0] if isinstance(piece, list) and piece else None for piece in words]
        words = {piece: number for number, piece in enumerate(pieces)}
    tokens = _checked(path, words)
    model_ids = len(tokens)
    added: dict[str, Flags] = {}
    entries = document.get("added_tokens") or []
    if not isinstance(entries, list):
        raise _wrong(path, "field added_tokens: a list", entries)
    for entry in entries:
        text, number = _added_entry(path, entry)
        tokens[text] = number
        added[text] = _flags(entry)
    for text, number, flags in _declared(folder, config):
        if text not in tokens:
            tokens[text] = number
            added[text] = flags
    return Tokenizer(folder, _by_id(tokens), added, model_ids, document, config)


def _of_words(folder: Path, words: dict[str, int], config: Mapping[str, Any]) -> Tokenizer:
    """A tokenizer whose own file holds words, other files what was added to them."""
    tokens = dict(words)
    added: dict[str, Flags] = {}
    for text, number, flags in (*_declared(folder, config), *_listed(folder)):
        tokens.setdefault(text, number)
        added.setdefault(text, flags)
    return Tokenizer(folder, _by_id(tokens), added, len(words), None, config)


def _declared(folder: Path, config: Mapping[str, Any]) -> list[tuple[str, int, Flags]]:
    """What tokenizer_config.json says was added: text, id, flags."""
    path = folder / TOKENIZER_CONFIG_NAME
    entries = config.get("added_tokens_decoder") or {}
    if not isinstance(entries, dict):
        raise _wrong(path, "field added_tokens_decoder: an object", entries)
    found = []
    for key, entry in entries.items():
        if not key.isdecimal() or not isinstance(entry, dict):
            raise _wrong(path, "field added_tokens_decoder: tokens by their ids", {key: entry})
        text, number = _added_entry(path, {**entry, "id": int(key)})
        found.append((text, number, _flags(entry)))
    return found


def _listed(folder: Path) -> list[tuple[str, int, Flags]]:
    """What added_tokens.json says was added."""
    path = folder / ADDED_TOKENS_NAME
    entries = read_json_object(path)
    if entries is None:
        return []
    return [(text, number, PLAIN_FLAGS) for text, number in _checked(path, entries).items()]


def _added_entry(path: Path, entry: Any) -> tuple[str, int]:
    if isinstance(entry, dict):
        text, number = entry.get("content"), entry.get("id")
        if isinstance(text, str) and type(number) is int and number >= 0:
            return text, number
    raise _wrong(path, "added tokens with a content and an id", entry)


def _flags(entry: Mapping[str, Any]) -> Flags:
    return {name: bool(entry.get(name, PLAIN_FLAGS[name])) for name in FLAGS}


def _checked(path: Path, words: Any) -> dict[str, int]:
    """Words and their ids, a copy."""
    if not isinstance(words, dict) or not words:
        raise _wrong(path, "a vocabulary: tokens and their ids", words)
    if set(map(type, words.values())) != {int} or min(words.values()) < 0:
        raise _wrong(path, "ids that are whole numbers from 0 on", words)
    if set(map(type, words)) != {str}:
        raise _wrong(path, "tokens that are texts", words)
    return dict(words)


def _by_id(tokens: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(tokens.items(), key=itemgetter(1)))


def _wrong(path: Path, expected: str, found: object) -> CheckpointError:
    return CheckpointError(f"{path}: expected {expected}, found {shown(found)}; {_COPY_AGAIN}")


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: expected UTF-8, found another byte at {error.start}; {_COPY_AGAIN}"
        ) from None


def _is_plain(config: Mapping[str, Any]) -> bool:
    name = str(config.get("tokenizer_class") or "Llama")
    return name.removesuffix("Fast").removesuffix("Tokenizer") in _PLAIN_SENTENCEPIECE


def _pieces(path: Path) -> dict[str, int]:
    """The pieces of a SentencePiece model in their order.

    The file is a protocol buffer whose fields 1 are the pieces; field 1 of each is its text.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        pieces = [
            next(bytes(text).decode() for number, text in _fields(piece) if number == 1)
            for number, piece in _fields(memoryview(data))
            if number == 1
        ]
    except (ValueError, IndexError, StopIteration):
        raise CheckpointError(
            f"{path}: expected a SentencePiece model, found another file or a part of one; "
            f"{_COPY_AGAIN}"
        ) from None
    return _checked(path, {piece: number for number, piece in enumerate(pieces)})


def _fields(data: memoryview) -> Iterable[tuple[int, memoryview]]:
    """Number and bytes of each length-delimited field of a protocol buffer; others are skipped."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == 0:
            _, position = _varint(data, position)
            continue
        if kind == 2:
            size, position = _varint(data, position)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError("not a field")
        if position + size > len(data):
            raise ValueError("cut short")
        if kind == 2:
            yield key >> 3, data[position : position + size]
        position += size


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position
        if shift > 63:
            raise ValueError("not a number")


def _through_transformers(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    """A tokenizer whose class numbers its pieces in a way of its own."""
    advice = "save the tokenizer with transformers and put its tokenizer.json into the folder"
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise CheckpointError(
            f"{folder}: the tokenizer has no {TOKENIZER_NAME} and is read by transformers, which "
            f"is not installed ({error}); install it, or {advice}"
        ) from error
    try:
        loaded: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokens = dict(loaded.get_vocab())
        decoder = loaded.added_tokens_decoder
    except Exception as error:
        raise CheckpointError(
            f"{folder}: the tokenizer has no {TOKENIZER_NAME}, and transformers cannot load it: "
            f"{error}; {advice}"
        ) from error
    added = {each.content: {n: bool(getattr(each, n)) for n in FLAGS} for each in decoder.values()}
    model_ids = sum(text not in added for text in tokens)
    return Tokenizer(folder, _by_id(tokens), added, model_ids, None, config)


def read_template(folder: Path) -> str | None:
    """The chat template of a tokenizer, as transformers finds it; of several the default one.

    Raises CheckpointError.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _text(path)
    config = read_json_object(folder / TOKENIZER_CONFIG_NAME) or {}
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    if found is None and (folder / "chat_template.json").is_file():
        other = read_json(folder / "chat_template.json")
        found = other.get("chat_template") if isinstance(other, dict) else None
    return found if isinstance(found, str) else None
