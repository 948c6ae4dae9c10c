"""Statistics, figures, gates and verdicts."""
