"""The HTTP server and its engine."""
