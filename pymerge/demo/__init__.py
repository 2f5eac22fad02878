"""The demo: small models trained on the spot, merged by the engine, evaluated on eight tasks."""

from pymerge.demo.run import DemoResult, run_demo

__all__ = ["DemoResult", "run_demo"]
