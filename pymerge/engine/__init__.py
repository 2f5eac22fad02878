"""Runs a plan: pipeline, byte budget, journal and resume, progress and trace."""

from __future__ import annotations

from pymerge.engine.events import Snapshot
from pymerge.engine.finish import make_manifest, side_files
from pymerge.engine.run import MergeReport, run_plan

__all__ = ["MergeReport", "Snapshot", "make_manifest", "run_plan", "side_files"]
