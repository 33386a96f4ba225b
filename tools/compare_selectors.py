"""`taopd compare selectors`, as a script."""

import sys

from megatron_taopd.cli.compare.selectors import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
