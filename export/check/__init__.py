"""Checks of a graph against the student."""
