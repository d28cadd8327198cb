"""The secant path rule: exact by construction. Read pair.py first, then any file of rules, then secant.py."""

from explaind.kernel.secant.rules import NoSecant
from explaind.kernel.secant.secant import Secant

__all__ = ["NoSecant", "Secant"]
