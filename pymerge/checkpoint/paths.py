"""File names that come from inside a checkpoint, where anyone may have written them."""

from __future__ import annotations


def stays_inside(file_name: str) -> bool:
    """Whether a relative file name leads to a place below its folder.

    Only the text is judged: hub caches are symbolic links that leave the folder, and rightly so.
    """
    parts = file_name.split("/")
    return "\0" not in file_name and "\\" not in file_name and not {"", ".", ".."} & set(parts)
