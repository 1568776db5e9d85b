"""The process in which math_verify runs: pairs of answers in, verdicts out, a line each. Run as a file, so that it needs nothing of ours.

math_verify's own time limits are signals, which only reach a main thread between two steps of the interpreter: a power with a million
digits is one step. Here the kernel ends the process when a pair took too much processor time or memory, wherever it is.
"""

import json
import logging
import os
import resource
import signal
import sys


def main() -> None:
    limit_s, memory_bytes = float(sys.argv[1]), int(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no reply
    logging.disable(logging.WARNING)
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    boxed = LatexExtractionConfig(boxed_match_priority=0)
    print("ready", file=replies, flush=True)
    for stream in (1, 2):  # nobody reads them from here on
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        wanted = parse(f"\\boxed{{{gold}}}", [boxed], parsing_timeout=None)
        found = parse(f"\\boxed{{{answer}}}", [boxed, ExprExtractionConfig()], parsing_timeout=None)
        is_equal = verify(wanted, found, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(bool(is_equal)), file=replies, flush=True)


if __name__ == "__main__":
    main()
