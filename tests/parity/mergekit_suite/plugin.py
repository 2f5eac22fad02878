"""A pytest plug-in (``-p plugin``) that lets mergekit's own tests run against pymerge.

``MERGEKIT_SUITE`` says against what: ``native`` leaves mergekit alone, ``engine`` replaces
``run_merge`` as a whole (and the executor for what does not go through it), ``executor`` the
executor, ``methods`` the maths. ``MERGEKIT_SUITE_REPORT`` names a JSON file that is written at the
end: each test's outcome, and what pymerge did.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

MODE = os.environ.get("MERGEKIT_SUITE", "native")
OUTCOMES: dict[str, str] = {}


def pytest_configure(config: Any) -> None:
    import shared_helper

    sys.modules["tests.common"] = shared_helper
    sys.path.append(str(config.rootpath))  # for ``from tests.test_tokenizer import ...``
    if MODE == "native":
        return
    from pymerge.integrations import mergekit

    if MODE in ("engine", "executor"):
        mergekit.redirect(whole=MODE == "engine")
    elif MODE == "methods":
        mergekit.install()
    else:
        raise ValueError(f"MERGEKIT_SUITE: {MODE}")


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        OUTCOMES[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    place = os.environ.get("MERGEKIT_SUITE_REPORT")
    if place is None:
        return
    content: dict[str, Any] = {"outcomes": OUTCOMES}
    if MODE in ("engine", "executor"):
        from pymerge.integrations import mergekit

        content["lowered"] = mergekit.TALLY.as_dict()
    Path(place).write_text(json.dumps(content, indent=1))
