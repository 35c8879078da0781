"""The files of an evaluation: JSON, one line an image, JUnit, and one self-contained page."""

from mithridate.evaluation.report.files import write_report

__all__ = ["write_report"]
