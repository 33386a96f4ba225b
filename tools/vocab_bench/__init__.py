"""The parts of `tools/bench_vocab_parallel.py`."""
