"""Another process that computes in bursts, as on a shared machine. `channelslast bench --busy` runs it.

It computes on all cores for 0.1 to 1.5 s, then sleeps for 0.1 to 1.5 s, until its parent process ends, or an hour."""
import os
import random
import sys
import threading
import time

import numpy as np


def end_with_parent():
    "End this process when standard input closes, which it does when the parent process is gone."
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == '__main__':
    threading.Thread(target=end_with_parent, daemon=True).start()
    a, start, rnd = np.ones((1000, 1000), np.float32), time.perf_counter(), random.Random(0)
    while time.perf_counter() - start < 3600:
        until = time.perf_counter() + rnd.uniform(0.1, 1.5)
        while time.perf_counter() < until: a @ a
        time.sleep(rnd.uniform(0.1, 1.5))
