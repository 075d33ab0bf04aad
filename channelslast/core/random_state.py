"Restore random states, and make runs repeatable."
import random
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from fastai.torch_core import set_seed


def python_state() -> tuple:
    "The random states of Python and NumPy. Compiled code would repeat its first draw from them."
    return random.getstate(), str(np.random.get_state())


def generators_of(objects) -> list: # Functions that set, and the states
    "How to restore the random generators among objects: Python's, NumPy's and PyTorch's."
    objects = [*objects]
    states = [(o.setstate, o.getstate()) for o in objects if isinstance(o, random.Random) and not isinstance(o, random.SystemRandom)]
    states += [(o.set_state, o.get_state()) for o in objects if isinstance(o, (torch.Generator, np.random.RandomState))]
    bits = [o.bit_generator for o in objects if isinstance(o, np.random.Generator)]
    return states + [(partial(setattr, o, 'state'), o.state) for o in bits]


@contextmanager
def restore_random_states():
    """Restore the states of `random`, NumPy and PyTorch (all devices) and cuDNN's flags on exit, also after an error.

    This starts no device, since a process that forks later could not use it. A device that was not used before gets
    the CPU's seed, as `torch.manual_seed` gave it."""
    cudnn = torch.backends.cudnn
    states = random.getstate(), np.random.get_state(), torch.get_rng_state(), cudnn.deterministic, cudnn.benchmark
    devices = [m for m in (torch.cuda, torch.xpu) if m.is_available()]
    device_states = [m.get_rng_state_all() if m.is_initialized() else None for m in devices]
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try: yield
    finally:
        random.setstate(states[0]); np.random.set_state(states[1]); torch.set_rng_state(states[2])
        cudnn.deterministic, cudnn.benchmark = states[3:]
        for m, s in zip(devices, device_states):
            if s is None: m.manual_seed_all(torch.initial_seed())
            else: m.set_rng_state_all(s)
        if mps is not None: torch.mps.set_rng_state(mps)


@contextmanager
def less_random(
    seed: int = 42, # For `random`, NumPy and PyTorch on every device
    deterministic: bool = None, # cuDNN's `deterministic`; None: unchanged
    benchmark: bool = None, # cuDNN's `benchmark`; None: unchanged
):
    """Context manager: two runs on one machine give the same losses if data, model and Learner are created inside it.

    It seeds everything, and restores all random states and flags on exit, also after an exception. Use it instead of
    fastai's `no_random`, which turns `cudnn.benchmark` off and `deterministic` on. With these flags
    (https://docs.pytorch.org/docs/stable/notes/randomness.html), convolutions in channels last are reported to fail.
    Some kernels, mostly on CUDA, add in any order: losses then agree only to rounding.

    >>> import torch
    >>> from channelslast import less_random
    >>> with less_random(): a = torch.rand(3)
    >>> with less_random(): b = torch.rand(3)
    >>> torch.equal(a, b)
    True"""
    with restore_random_states():
        set_seed(seed)
        if deterministic is not None: torch.backends.cudnn.deterministic = deterministic
        if benchmark is not None: torch.backends.cudnn.benchmark = benchmark
        yield
