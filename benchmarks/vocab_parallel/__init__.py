"""The cost of scores and losses: `__main__` has the command, docs/vocab_parallel.md the figures."""
