"""Models: loading, cutting, adapters."""
