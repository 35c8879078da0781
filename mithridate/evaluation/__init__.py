"""What numbers are worth."""

from mithridate.evaluation.statistics import Interval, percentile, wilson_interval

__all__ = ["Interval", "percentile", "wilson_interval"]
