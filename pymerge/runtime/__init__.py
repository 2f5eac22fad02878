"""Using what is not one dense model: a folder with a model for each task.

Import the modules here; :func:`pymerge.load_task` and :func:`pymerge.materialize` are theirs.
"""
