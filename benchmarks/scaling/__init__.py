"""The cost of a step on many GPUs: `__main__` has the command, docs/scaling.md the figures."""
