"""Answers for eyes: figures, tables and a summary of a run and its ledgers."""

from explaind.report.report import Written, report, report_tables

__all__ = ["Written", "report", "report_tables"]
