"""What a first day on a GPU has to show: `__main__` has the command, docs/gpu.md how to read it."""
