"""Training the small reasoner of `raas_jax.lab.tasks.lemma`."""
