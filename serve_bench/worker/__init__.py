"""The process that runs one arm, and the libraries it may run it with."""
