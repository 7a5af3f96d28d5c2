"""`cme eval text A B`: what training did to the text."""

from cme.evaluation.text_report.cli import main

__all__ = ["main"]
