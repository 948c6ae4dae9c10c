"""Models, adapters and tokenizers as they are found in the wild, held to transformers and peft."""
