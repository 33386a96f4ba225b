"""Says of pairs of answers whether they are equal as mathematics; a process of its own.

Reads a JSON pair [answer, gold] a line, writes true or false. Some answers would take for ever
(9^{9^{9^9}}), in code that no Python exception reaches: the system ends the process over one that
takes more than CPU_S, with a signal, and whoever has started it goes on behind that one.
"""

import json
import resource
import signal
import sys

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

CPU_S = 5.0  # of one pair
MEMORY = 4 << 30


def equal(answer: str, gold: str) -> bool:
    """Tell whether both are expressions, and those are equal."""
    parsed = [
        parse(f"${text}$", [LatexExtractionConfig(), ExprExtractionConfig()], parsing_timeout=None)
        for text in (gold, answer)
    ]
    return verify(*parsed, timeout_seconds=None)


def main() -> None:
    """Answer every line of stdin with a line of stdout, until stdin ends.

    What a parser raises counts as not equal. A pair that takes more than CPU_S ends the process.
    """
    answers, sys.stdout = sys.stdout, sys.stderr  # for what the libraries may print
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_S)  # nobody handles it: it kills
        try:
            verdict = equal(*json.loads(line))
        except Exception:  # what a parser makes of arbitrary text
            verdict = False
        print(json.dumps(bool(verdict)), file=answers, flush=True)


if __name__ == "__main__":
    main()
