"""Ahead of time: what compilers say of devices that are not at hand."""
