"""The GPU tests and benchmarks as a folder for a machine without network."""
