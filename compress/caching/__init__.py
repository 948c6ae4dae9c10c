"""Teacher caches made ahead of the training, in one process or on Ray."""
