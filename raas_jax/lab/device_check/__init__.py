"""What a device does, all of it by one command: `raas-jax device-check`.

Each section is a process of its own with a time limit, and every figure is on disk the moment it
exists, so that a crash, a hang or the end of the memory costs one section.
"""
