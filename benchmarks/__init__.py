"""What is timed and measured: `python -m benchmarks.step --help`, from the repository's root."""
