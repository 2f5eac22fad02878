"""Methods that need data: statistics of a model's layers, and merges that run the models.

Import the modules here; :func:`pymerge.collect` and :func:`pymerge.regmean_plus_plus` are theirs.
"""
