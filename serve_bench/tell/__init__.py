"""The report and the terminal table."""
