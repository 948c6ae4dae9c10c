"""Load of other kinds than one stream."""
