"""Leaves one key after the other out of the run that is to see its effect, and sees the test fail.

    python tests/faults/lost_keys.py               # every key; exit status 1 if one is not missed
    python tests/faults/lost_keys.py rollout data  # those of some sections

So that a test of `tests/support/keys.py` does not only run with a key, but looks at it. Tests that
do not take their overrides from there are left to the planted mistakes of mutants.py.
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
sys.path.insert(0, str(TESTS))

from support import keys  # noqa: E402


def main(sections: list[str]) -> int:
    """Of these sections, or of all."""
    wanted = [
        (key, test)
        for key, values in keys.KEYS.items()
        for test in dict.fromkeys(values.values())
        if test.startswith("test_keys_") and key.startswith(tuple(sections) or "")
    ]
    unmissed = []
    for key, test in wanted:
        keys.LOST = key
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            failed = pytest.main(["-xq", "-p", "no:cacheprovider", str(TESTS / test)]) == 1
        print(f"{'missed' if failed else 'NOT MISSED':10} {key} by {test}", flush=True)
        unmissed += [] if failed else [key]
    print(f"{len(wanted) - len(unmissed)} of {len(wanted)} are missed")
    return int(bool(unmissed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
