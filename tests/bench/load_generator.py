"""Another process that computes on all cores in bursts, as on a shared machine. `python -m tests.bench --busy` runs it.

It computes for 0.1 to 1.5 s, then sleeps for 0.1 to 1.5 s, until standard input closes because its parent is gone, or an hour."""
import os
import random
import sys
import threading
import time

import numpy as np

if __name__ == '__main__':
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()
    a, start, rnd = np.ones((1000, 1000), np.float32), time.perf_counter(), random.Random(0)
    while time.perf_counter() - start < 3600:
        until = time.perf_counter() + rnd.uniform(0.1, 1.5)
        while time.perf_counter() < until: a @ a
        time.sleep(rnd.uniform(0.1, 1.5))
