"""Teachers: run in this process, or read from a cache."""
