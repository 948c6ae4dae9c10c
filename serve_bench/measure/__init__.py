"""Timing: arms, workers and the loop over blocks."""
