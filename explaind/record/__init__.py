"""Watching a training."""
