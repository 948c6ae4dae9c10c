"""What each stage writes down, as frozen dataclasses: one module a kind of artifact."""
