"""Time and memory, measured beside what the machine allows."""
