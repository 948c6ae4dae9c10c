"""Memory and operations of a training, computed without weights."""
