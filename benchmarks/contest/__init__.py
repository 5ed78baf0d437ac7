"""The parts of ``benchmarks/pruners.py``: tasks, methods, peers, the page."""
