"""`python -m megatron_taopd COMMAND …` is `taopd COMMAND …`, under torchrun too."""

import sys

from megatron_taopd.cli import main

if __name__ == "__main__":
    sys.exit(main())
