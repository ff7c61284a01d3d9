"""One process of a `harness.Process`: `python -m benchmarks.worker SOCKET SIDE OPTIONS`.

It reports how much memory it starts with, builds the side, and then answers every number of steps with the seconds
that they took and the peak of memory, a JSON object a line, until its input ends.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback

import torch

from benchmarks.harness import memory
from trajshift.utils.imports import load_object


def main(address: str, side: str, options: str) -> int:
    """Serves; the exit status is 1 if the side failed."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        with connection.makefile("rw") as stream:
            try:
                load_all_of_torch()
                print(json.dumps({"resident": memory("VmRSS")}), file=stream, flush=True)
                steps = load_object(side, "side")(**json.loads(options))
                for line in stream:
                    began = time.perf_counter()
                    steps(int(line))
                    answer = {"seconds": time.perf_counter() - began, "peak": memory("VmHWM")}
                    print(json.dumps(answer), file=stream, flush=True)
            except Exception as error:
                traceback.print_exc()
                reason = str(error).strip().splitlines()
                text = f"{type(error).__name__}: {reason[0] if reason else 'no reason given'}"
                print(json.dumps({"error": text}), file=stream, flush=True)
                return 1
    return 0


def load_all_of_torch() -> None:
    """PyTorch imports 70 MB of itself when the first optimizer is made; no side should be charged for that."""
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # PyTorch would need most of a second to shut down
