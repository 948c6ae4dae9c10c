"""Text and examples, as token rows."""
