"""The laboratory: tasks, runs, training and benchmarks that prove the library, never imported by it."""
