"""One question again and again from a node of `namespaces.py`, and what became of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from namespaces import Node

#: Prints when it asked, the status (0: no answer) and the seconds it took.
_LOAD = """
import json, sys, time, urllib.request
body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": int(sys.argv[2])}
while True:
    began = time.time()
    try:
        asked = urllib.request.Request(sys.argv[1], json.dumps(body).encode(), {"Content-Type": "application/json"})
        status = urllib.request.urlopen(asked, timeout=120).status
    except Exception as error:
        status = getattr(error, "code", 0)
    print(json.dumps([began, status, round(time.time() - began, 3)]), flush=True)
    time.sleep(0.2)
"""


def ask_on(node: Node, port: int, log: Path, max_tokens: int = 4) -> subprocess.Popen[bytes]:
    """Ask the endpoint at a port of this node until the process is killed."""
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    return node.start(sys.executable, "-c", _LOAD, url, str(max_tokens), log=log)


def asked(log: Path, since: float = 0) -> list[tuple[float, int, float]]:
    """Start, status and seconds of each question."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    found = [tuple(json.loads(line)) for line in lines if line.endswith("\n")]
    return [one for one in found if one[0] >= since]
