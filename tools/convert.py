"""`taopd convert`, as a script."""

import sys

from megatron_taopd.cli.convert import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
