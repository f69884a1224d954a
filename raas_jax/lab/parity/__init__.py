"""Every family beside transformers, on small random models: `python -m raas_jax.lab.parity`."""
