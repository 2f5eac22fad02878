"""pymerge as the backend of other programs: one file for each, which imports its host in use."""
