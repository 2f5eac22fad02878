"""Keys of random masks, and the masks that methods make of them."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys

import numpy as np

import pymerge
from pymerge.methods.randomness import key


def test_the_key_is_the_hash_of_length_prefixed_fields() -> None:
    text = b"".join(
        len(field).to_bytes(8, "little") + field
        for field in (b"7", b"dare", "modèle.0.weight".encode(), b"2")
    )
    expected = hashlib.blake2b(text, digest_size=8).digest()
    assert key(7, "dare", "modèle.0.weight", 2) == int.from_bytes(expected, "little")


def test_keys_are_frozen() -> None:
    """Outputs of released versions depend on these."""
    assert key(0, "dare", "model.embed_tokens.weight", 0) == 0xF152662A77033227
    assert key(-3, "della", "", 1) == 0x8E1231EFF144919D


def test_no_two_quadruples_share_a_key() -> None:
    fields = itertools.product((0, 1, 11), ("dare", "della"), ("a", "a1", "1a", "a.1"), (0, 1, 11))
    keys = [key(*each) for each in fields]
    assert len(set(keys)) == len(keys)
    assert all(0 <= each < 2**64 for each in keys)


def test_keys_do_not_depend_on_the_process() -> None:
    code = "from pymerge.methods.randomness import key; print(key(1, 'dare', 'x', 3))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": str(number)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for number in (1, 2)
    }
    assert found == {f"{key(1, 'dare', 'x', 3)}\n"}


def kept(**parameters: object) -> np.ndarray:
    """Which elements of a task vector of ones DARE keeps."""
    base, model = np.zeros(4000, np.float32), np.ones(4000, np.float32)
    merged = pymerge.merge_tensor(
        "dare_linear", base, [model], weight=1.0, rescale=False, backend="reference", **parameters
    )
    return np.asarray(merged != 0)


def test_masks_differ_by_seed_and_by_name_and_grow_with_the_density() -> None:
    mask = kept(density=0.4)
    assert np.array_equal(mask, kept(density=0.4, seed=0))
    for other in (kept(density=0.4, seed=1), kept(density=0.4, name="other")):
        # Independent masks agree in 0.4² + 0.6² of the elements.
        agree = np.count_nonzero(mask == other)
        assert abs(agree - 4000 * 0.52) < 5 * (4000 * 0.52 * 0.48) ** 0.5
    assert not np.any(mask & ~kept(density=0.41))


def test_models_get_masks_of_their_own() -> None:
    base, ones = np.zeros(4000, np.float32), np.ones(4000, np.float32)
    merged = pymerge.merge_tensor(
        "dare_linear",
        base,
        [ones, 2 * ones],
        weight=1.0,
        density=0.5,
        rescale=False,
        backend="reference",
    )
    counts = [np.count_nonzero(merged == value) for value in (0, 1, 2, 3)]
    assert all(abs(count - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5 for count in counts), counts
