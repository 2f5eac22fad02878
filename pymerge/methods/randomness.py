"""Keys of random masks: the seed that a Philox generator gets for one model's tensor."""

from __future__ import annotations

from hashlib import blake2b


def key(seed: int, purpose: str, tensor: str, model: int) -> int:
    """64 bits that depend on all four: the first 8 bytes, little-endian, of a BLAKE2b.

    Hashed are the fields as UTF-8, the numbers in decimal, each after its length in bytes as 8
    bytes little-endian, so that no two different quadruples give the same text. ``model`` is the
    model's position in the recipe, ``tensor`` the name of the output tensor: a mask does not depend
    on the order in which tensors are merged, nor on which tensors or models there are besides.
    """
    digest = blake2b(digest_size=8)
    for field in (str(seed), purpose, tensor, str(model)):
        text = field.encode()
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return int.from_bytes(digest.digest(), "little")
