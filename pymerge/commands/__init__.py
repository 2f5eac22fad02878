"""The commands of the command line, one file for each group: they parse, call the API and print.

Everything heavy is imported inside the commands, so that ``pymerge --help`` answers at once.
"""
