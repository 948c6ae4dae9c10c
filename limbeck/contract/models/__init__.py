"""Models, adapters and tokenizers as they lie in folders."""
