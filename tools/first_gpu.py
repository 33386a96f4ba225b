"""`python -m benchmarks.first_gpu`, as a script."""

import sys
from pathlib import Path

# The benchmarks are not installed: they are found next to this directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.first_gpu.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
