"""The parts of `tools/scaling.py`."""
