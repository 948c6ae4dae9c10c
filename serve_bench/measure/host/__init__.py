"""The machine: what it is, how fast it can be, and whether something disturbs it."""
