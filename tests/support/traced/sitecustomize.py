"""Lets ranks tell in which phase they are, whatever starts them: the newest, in a file each.

    TAOPD_TRACE=DIR PYTHONPATH=tests/support/traced … examples/launch/node.sh …

Python imports a module of this name at its start. The line of a file is a count, the phase and the
step. It begins when the rank's watchdog does; before that there is no file.
"""

import os
import sys
import threading
import time

WIDTH = 64  # bytes of the line in a rank's file


def trace() -> None:
    """Wait until the watchdog is there; let it write where the rank is whenever that changes."""
    while not hasattr(watchdog := sys.modules.get("megatron_taopd.parallel.watchdog"), "Watchdog"):
        time.sleep(0.05)
    path = os.path.join(os.environ["TAOPD_TRACE"], f"rank_{os.environ['RANK']}")
    begin, move = watchdog.Watchdog.__init__, watchdog.Place.move
    file = None

    def tell(place) -> None:
        if file is not None:
            line = f"{place.moves} {place.name.replace(' ', '_')} {place.step}"
            os.pwrite(file, line.ljust(WIDTH).encode(), 0)

    def traced_begin(self, *args) -> None:
        nonlocal file
        begin(self, *args)
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        tell(watchdog._here)

    def traced_move(self, name: str) -> None:
        move(self, name)
        tell(self)

    watchdog.Watchdog.__init__, watchdog.Place.move = traced_begin, traced_move


if "TAOPD_TRACE" in os.environ and "RANK" in os.environ:
    threading.Thread(target=trace, daemon=True).start()
