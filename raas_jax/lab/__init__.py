"""The laboratory: tasks, runs and benchmarks that prove the library, which never imports it."""
