"""`taopd compare students`, as a script."""

import sys

from megatron_taopd.cli.compare.students import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
