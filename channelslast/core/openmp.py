"""PyTorch's OpenMP threads, which wait actively for a few milliseconds after each parallel operation.

Meanwhile they take a core from a runtime with threads of its own. On two cores, with 3×224×224 values normalized by PyTorch
just before, OpenVINO took 8.6 ms for MobileNetV3-L instead of 5.2, and 27.6 instead of 24.0 for ResNet-18."""
import ctypes
from functools import cache
from pathlib import Path

import torch

SOFT = 1  # OpenMP's `omp_pause_soft`: settings stay


@cache
def _pause():
    "OpenMP's `omp_pause_resource_all` in the libgomp of PyTorch's Linux wheels; None elsewhere."
    libraries = sorted((Path(torch.__file__).parent/'lib').glob('libgomp*'))
    try: return ctypes.CDLL(str(libraries[0])).omp_pause_resource_all
    except (IndexError, OSError, AttributeError): return None


def end_waiting_threads():
    "End the OpenMP threads that work for this thread. The next parallel operation starts new ones, in about 0.1 ms."
    pause = _pause()
    if pause: pause(SOFT)
