"""Another process that takes the machine's time in bursts, as on a shared one: run by `channelslast bench --busy`.

Computes on all cores for 0.1 to 1.5 s, rests as long, and ends with whoever started it, or after an hour."""
import os
import random
import sys
import threading
import time

import numpy as np

HOUR = 3600


def end_with_parent():
    "Standard input closes when the process that started this one is gone."
    sys.stdin.buffer.read()
    os._exit(0)


def burst(a, seconds):
    until = time.perf_counter() + seconds
    while time.perf_counter() < until: a @ a


if __name__ == '__main__':
    threading.Thread(target=end_with_parent, daemon=True).start()
    a, start, rnd = np.ones((1000, 1000), np.float32), time.perf_counter(), random.Random(0)
    while time.perf_counter() - start < HOUR:
        burst(a, rnd.uniform(0.1, 1.5))
        time.sleep(rnd.uniform(0.1, 1.5))
