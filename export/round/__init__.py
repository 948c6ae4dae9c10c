"""Rounding of weights and activations."""
