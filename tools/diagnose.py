"""`taopd diagnose`, as a script."""

import sys

from megatron_taopd.cli.diagnose import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
