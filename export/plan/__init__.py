"""Sizes of graphs that are not made yet."""
