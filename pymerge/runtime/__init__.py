"""Using what is not one dense model: a folder with a model for each task, or with experts.

Import the modules here; :func:`pymerge.load_task`, :func:`pymerge.materialize` and
:func:`pymerge.load_smile` are theirs.
"""
