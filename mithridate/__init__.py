"""Mithridate: a run-time defence for image classifiers, and the red team that measures it.

Importing this package is free: torch, FAISS and the rest load with the module that needs them.
"""

__version__ = "0.1.0"
