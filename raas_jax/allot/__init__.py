"""Finds an allotment: how much of a budget each layer and head of a model should have."""

from raas_jax.allot.losses import allot as allot
