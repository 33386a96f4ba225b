"""`taopd compare teachers`, as a script."""

import sys

from megatron_taopd.cli.compare.teachers import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
