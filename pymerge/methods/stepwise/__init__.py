"""mergekit's methods in mergekit's numbers."""

from pymerge.methods.stepwise.table import stepwise_method

__all__ = ["stepwise_method"]
