"""The subcommands of `raas-jax`, one file each.

A command is a dataclass whose fields are its options, with a method `run` that returns the exit
code. A new one is a file here and a line in `raas_jax.cli.main.COMMANDS`. All that needs jax is
imported in functions, so that `--help` answers at once; errors name arguments, as the library's do.
"""
