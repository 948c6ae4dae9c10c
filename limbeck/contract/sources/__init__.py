"""Find models and text on this machine, and say what is missing."""
