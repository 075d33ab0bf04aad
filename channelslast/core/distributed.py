"Exchange values between the processes of a distributed run. In a single process, each function returns at once."
from torch import distributed

__all__ = ['is_single_process', 'broadcast_from_rank0', 'gather_from_ranks']


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
