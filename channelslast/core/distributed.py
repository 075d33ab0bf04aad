"Agreement between the processes of a distributed run. In a single process each function returns at once."
from torch import distributed

__all__ = ['broadcast_from_rank0', 'gather_from_ranks']


def _alone() -> bool: return not (distributed.is_available() and distributed.is_initialized())


def broadcast_from_rank0(x):
    "Rank 0's `x`, so that all processes do the same; in a single process `x`. `x` can be anything that pickles."
    if _alone(): return x
    distributed.broadcast_object_list(shared := [x], src=0)
    return shared[0]


def gather_from_ranks(x) -> list:
    "The `x` of each process, in the order of ranks, so that all can act on what happened in one of them."
    if _alone(): return [x]
    distributed.all_gather_object(found := [None]*distributed.get_world_size(), x)
    return found
