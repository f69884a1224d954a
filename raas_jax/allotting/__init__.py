"""Finds an allotment: how much of a budget each layer and head of a model should have."""

from raas_jax.allotting.find import allot as allot
from raas_jax.allotting.losses import room as room
from raas_jax.allotting.simulate import simulated as simulated
