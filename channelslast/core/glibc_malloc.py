"What becomes of freed tensors' memory on a CPU: the C library gives it back, and gets it anew in each step."
import ctypes

__all__ = ['keep_memory']

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # as in glibc's malloc.h
KEPT = (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)
# glibc's own thresholds move: here they end once a process has freed large tensors
USUAL = (M_MMAP_MAX, 65536), (M_MMAP_THRESHOLD, 32*2**20), (M_TRIM_THRESHOLD, 64*2**20)


def keep_memory(
    keep:bool=True, # False: as usual again, and what is free goes back at once
) -> bool: # Can this machine's C library? glibc can: Linux, but for Alpine
    """Let the process keep freed tensors' memory for the next ones: steps on a CPU get faster, if tensors are large.

    As usual, glibc gives a freed block above 32 MiB, and the end of its heap, back to the system; the next such tensor
    costs a page fault for each 4 KiB (https://man7.org/linux/man-pages/man3/mallopt.3.html). For the whole process,
    which then holds the most memory that it ever needed. Environment variables do the same from its start:
    `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1`. Elsewhere it does nothing."""
    try: libc = ctypes.CDLL(None)
    except TypeError: return False  # Windows
    if not hasattr(libc, 'mallopt'): return False
    for name, value in KEPT if keep else USUAL: libc.mallopt(name, value)
    if not keep: libc.malloc_trim(0)
    return True
