"""Recording in training loops that a library runs: one file a library, imported only by those who have it."""
