"""The files of an output's tokenizer where they differ from the model's that it is taken from."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pymerge.checkpoint.config import read_json_object
from pymerge.checkpoint.tokenizer import (
    ADDED_TOKENS_NAME,
    FLAGS,
    PLAIN_FLAGS,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
    Flags,
    Tokenizer,
)
from pymerge.errors import CheckpointError

TEMPLATE_NAME, OLD_TEMPLATE_NAME = "chat_template.jinja", "chat_template.json"
TEMPLATE_FOLDER = "additional_chat_templates"


def union(
    base: Tokenizer, models: Sequence[tuple[Tokenizer, int | None]]
) -> tuple[dict[str, Flags], tuple[str, ...]]:
    """What the tokens of all models add to the base's: text to flags, in their order; and the
    tokens of which several models say different things.

    ``models`` are the tokenizers in the order of the recipe, the base's first, each with the rows
    of its embedding: tokens beyond them have none. As in mergekit tokens of vocabularies come
    before those that were added to one, and the first definition of an added token holds. A token
    of the base's vocabulary that another model added is found in texts as that one is.
    """
    added: dict[str, Flags] = {}
    differing: dict[str, None] = {}
    for tokenizer, rows in models:
        for text, flags in tokenizer.added.items():
            if rows is not None and tokenizer.tokens[text] >= rows:
                continue
            if added.setdefault(text, flags) != flags:
                differing[text] = None
    plain: dict[str, None] = {}
    for tokenizer, rows in models:
        missing = tokenizer.tokens.keys() - base.tokens.keys() - added.keys() - plain.keys()
        for text in sorted(missing, key=tokenizer.tokens.__getitem__):
            if rows is None or tokenizer.tokens[text] < rows:
                plain[text] = None
    found: dict[str, Flags] = dict.fromkeys(plain, PLAIN_FLAGS)
    found |= {text: flags for text, flags in added.items() if text not in base.added}
    return found, tuple(differing)


def extended(base: Tokenizer, additions: Mapping[str, Flags]) -> tuple[Tokenizer, dict[str, bytes]]:
    """A tokenizer with added tokens, and its files where they are not the base's.

    New tokens get the ids after the base's, in their order; a text that is a token already keeps
    its id. Raises CheckpointError where the base's files do not let tokens be added.
    """
    if not additions:
        return base, {}
    numbers = dict(base.tokens)
    number = max(base.num_ids, base.model_ids)
    for text in additions:
        if text not in numbers:
            numbers[text] = number
            number += 1
    document = _document(base, additions, numbers)
    files = {TOKENIZER_NAME: _json(document)}
    entries = {text: dict(flags) for text, flags in additions.items()}
    config = copy.deepcopy(dict(base.config))
    if isinstance(config.get("added_tokens_decoder"), dict):
        decoder = config["added_tokens_decoder"]
        decoder |= {str(numbers[text]): {"content": text, **entries[text]} for text in entries}
        files[TOKENIZER_CONFIG_NAME] = _json(config)
    listed = read_json_object(base.folder / ADDED_TOKENS_NAME)
    if listed is not None:
        listed |= {text: numbers[text] for text in entries}
        files[ADDED_TOKENS_NAME] = _json(listed)
    added = {**base.added, **additions}
    return Tokenizer(base.folder, numbers, added, base.model_ids, document, config), files


def _document(
    base: Tokenizer, additions: Mapping[str, Flags], numbers: Mapping[str, int]
) -> dict[str, Any]:
    """tokenizer.json with more added tokens."""
    if base.document is None:
        raise CheckpointError(
            f"{base.folder}: expected a tokenizer.json, to which {len(additions)} tokens are to be "
            "added, found none; save the tokenizer with transformers and put its tokenizer.json "
            "into the folder, or take the tokenizer of a model that has one"
        )
    words = base.document["model"]["vocab"]
    highest = len(words) - 1 if isinstance(words, list) else max(words.values())
    if highest != len(words) - 1:
        raise CheckpointError(
            f"{base.folder / TOKENIZER_NAME}: expected ids from 0 on without gaps, since the "
            f"tokenizers library numbers added tokens by how many there are, found {highest} as "
            f"the highest of {len(words)}; take the tokenizer of another model"
        )
    document = {**base.document}
    entries = [*(base.document.get("added_tokens") or [])]
    known = {entry["content"] for entry in entries}
    declared = {text: flags for text, flags in base.added.items() if text not in known}
    entries += [
        {"id": numbers[text], "content": text, **{name: flags[name] for name in FLAGS}}
        for text, flags in {**declared, **additions}.items()
    ]
    document["added_tokens"] = sorted(entries, key=lambda entry: int(entry["id"]))
    return document


def with_template(
    tokenizer: Tokenizer, files: Mapping[str, bytes], template: str
) -> dict[str, bytes]:
    """The files with a chat template: as chat_template.jinja, where transformers 5 writes it and
    looks first, and in tokenizer_config.json, where older programs look.

    Of several templates it is the default one, and the others are kept.
    """
    found = {**files, TEMPLATE_NAME: template.encode()}
    if TOKENIZER_CONFIG_NAME in files:
        config = json.loads(files[TOKENIZER_CONFIG_NAME])
    else:
        config = copy.deepcopy(dict(tokenizer.config))
    if config:
        several = config.get("chat_template")
        config["chat_template"] = template
        if isinstance(several, list):
            others = {each["name"]: each["template"] for each in several if _is_other(each)}
            named = [{"name": name, "template": text} for name, text in others.items()]
            config["chat_template"] = [{"name": "default", "template": template}, *named]
            # With a file for the default one transformers 5 takes no other from the list.
            found |= {f"{TEMPLATE_FOLDER}/{n}.jinja": text.encode() for n, text in others.items()}
        found[TOKENIZER_CONFIG_NAME] = _json(config, indent=2)
    old = read_json_object(tokenizer.folder / OLD_TEMPLATE_NAME)
    if old is not None:
        found[OLD_TEMPLATE_NAME] = _json({**old, "chat_template": template}, indent=2)
    return found


def _is_other(entry: Any) -> bool:
    """Whether an entry of a list of templates is one beside the default, by a plain name."""
    if not isinstance(entry, dict) or not isinstance(entry.get("template"), str):
        return False
    name = entry.get("name")
    return isinstance(name, str) and name != "default" and re.fullmatch(r"[\w-]+", name) is not None


def _json(value: object, indent: int | None = None) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=indent) + "\n").encode()
