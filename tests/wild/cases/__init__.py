"""Models, adapters and inputs of the wild tests, and the tables that `make test-wild` prints."""
