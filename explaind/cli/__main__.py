"""``python -m explaind.cli``."""

from explaind.cli import script

script()
