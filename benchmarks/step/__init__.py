"""The cost of one step: `__main__` has the command, docs/step_cost.md the figures."""
