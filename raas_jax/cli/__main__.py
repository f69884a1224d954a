"""`python -m raas_jax.cli`, where the script `raas-jax` is not on the path."""

import sys

from raas_jax.cli.main import main

sys.exit(main())
