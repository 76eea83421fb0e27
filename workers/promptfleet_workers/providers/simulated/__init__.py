"""A provider that answers nothing real: for development, tests and benchmarks."""
