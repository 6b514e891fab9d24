"""10,000 generated requests, valid and invalid, to ``rayswift deploy``: none may fail inside, hang or end a process.

The test of the same name in ``tests/slow/test_bad_requests.py`` with more cases than CI has time for. The line of JSON
has what was asked; the test's own lines above it say how the requests were answered, by status.

    python benchmarks/fuzz_endpoint.py [--cases 10000]
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from harness.environments import REPOSITORY
from harness.measure import print_line, versions
from harness.options import by_size, parser


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--cases", type=int, help="requests to generate (10,000; --quick: 500; --full: 50,000)")
    given = options.parse_args()
    cases = given.cases or by_size(given, 500, 10_000, 50_000)
    began = time.perf_counter()
    test = REPOSITORY / "tests" / "slow" / "test_bad_requests.py"
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-m", "slow", str(test), "-k", "generated"]
    done = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "RAYSWIFT_FUZZ_CASES": str(cases)})
    if done.returncode:
        sys.exit(f"fuzz_endpoint: pytest ended with status {done.returncode}")
    seconds = round(time.perf_counter() - began, 1)
    print_line(
        "fuzz_endpoint",
        {"cases": cases, "failed": 0, "seconds_with_start": seconds, "versions": versions("rayswift", "schemathesis")},
    )


if __name__ == "__main__":
    main()
