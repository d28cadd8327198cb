"""Living the run again."""
