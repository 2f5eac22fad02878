"""Where pymerge keeps what it need not make twice: converted checkpoints, measured rates.

A leaf module: it imports nothing of pymerge.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``PYMERGE_CACHE``, else ``XDG_CACHE_HOME/pymerge``, else ``~/.cache/pymerge``."""
    if os.environ.get("PYMERGE_CACHE"):
        return Path(os.environ["PYMERGE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pymerge"
