"""Answers for eyes: figures, tables and a summary of a run and its ledgers."""

from explaind.report.report import Written, report

__all__ = ["Written", "report"]
