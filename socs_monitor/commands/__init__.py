"""The commands of ``socs-monitor``, a module each; ``shared``, ``stopped``, ``view`` and ``checks`` serve them.

A command's module has `define`, which adds its arguments to a parser and sets ``run``: a function of the parsed
arguments that returns the exit code, or None for 0. Only the module of the command that is called is imported.
"""
