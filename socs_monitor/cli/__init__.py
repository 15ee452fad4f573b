"""The ``socs-monitor`` command, one module per subcommand.

A subcommand's module has `define`, which adds its arguments to a parser and sets ``run``: a function of the parsed
arguments that returns the exit code, or None for 0. `main` imports only the module of the command that is called.
"""
