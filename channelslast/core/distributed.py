"Exchange values between the processes of a distributed run. In a single process, each function returns at once."
from contextlib import contextmanager

from fastai import torch_core
from torch import distributed


def is_single_process() -> bool: return not (distributed.is_available() and distributed.is_initialized())


def broadcast_from_rank0(x):
    "`x` of rank 0, so that all processes do the same; in a single process, `x` itself. `x` must be picklable."
    if is_single_process(): return x
    shared = [x]
    distributed.broadcast_object_list(shared, src=0)
    return shared[0]


def gather_from_ranks(x) -> list:
    "`x` of each process, in the order of ranks, so that all can react to what happened in one of them."
    if is_single_process(): return [x]
    gathered = [None]*distributed.get_world_size()
    distributed.all_gather_object(gathered, x)
    return gathered


@contextmanager
def without_gathering():
    "Context manager: fastai's metrics and `Recorder` read the values of their own process, and do not wait for the others."
    own = torch_core.maybe_gather
    if not is_single_process(): torch_core.maybe_gather = lambda x, axis=0: x
    try: yield
    finally: torch_core.maybe_gather = own


def together(f, describe=repr):
    """`f()`. If it raises in one process of a distributed run, all others raise `RuntimeError`, whose `reason` is
    `describe(error)`. All processes must call this in the same order, and `f` must not communicate: the others would
    wait forever."""
    result = error = None
    try: result = f()
    except Exception as e: error = e
    notes = gather_from_ranks(error and describe(error))
    if not any(notes): return result
    result = None
    if error is None:
        rank, reason = next((i, o) for i, o in enumerate(notes) if o)
        error = RuntimeError(f'Process {rank} of {len(notes)}: {reason}')
        error.reason = reason
    try: raise error
    finally: error = None  # its traceback holds the tensors of `f`
