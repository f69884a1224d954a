"""The subcommands of `raas-jax`, one file each.

A command is a dataclass whose fields are its options, with a method `run` that returns the exit
code. A new one is a file here and a line in `raas_jax.cli.main.COMMANDS`. What is slow to import is
imported in `run`, so that `--help` answers at once.
"""
