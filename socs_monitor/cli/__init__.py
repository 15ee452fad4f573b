"""The ``socs-monitor`` command, one module per subcommand.

Each has a function `define`, which adds the subcommand's arguments to a parser and sets ``run``: a function of the
parsed arguments that returns the exit code, or None for 0. `main` imports only the subcommand that is called.
"""
