"""The parts of `tools/bench_step.py`."""
