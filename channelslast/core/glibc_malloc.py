"Keep freed memory in the process (glibc only)."
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # as in glibc's malloc.h
KEEP = (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)
# glibc raises its thresholds while a process runs: these are their values after it has freed large tensors
DEFAULT = (M_MMAP_MAX, 65536), (M_MMAP_THRESHOLD, 32*2**20), (M_TRIM_THRESHOLD, 64*2**20)


def keep_memory(
    keep:bool=True, # False: restore glibc's thresholds and release free memory now
) -> bool: # True if the C library supports this: glibc does (Linux, except Alpine)
    """Let the process reuse the memory of freed tensors. Steps on a CPU get faster if tensors are large.

    By default, glibc returns large freed blocks and the free end of its heap to the system. A block is large from
    128 KiB, a limit that grows up to 32 MiB (https://man7.org/linux/man-pages/man3/mallopt.3.html). The next large
    tensor costs a page fault per 4 KiB. The setting holds for the whole process, which then keeps the most memory that
    it ever needed. Environment variables do the same from its start: `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1`.
    Without glibc, nothing changes.

    >>> from channelslast import keep_memory
    >>> supported = keep_memory()
    >>> keep_memory(False) == supported
    True"""
    if not (libc := _glibc()): return False
    for name, value in KEEP if keep else DEFAULT: libc.mallopt(name, value)
    if not keep: libc.malloc_trim(0)
    return True


def _glibc():
    try: libc = ctypes.CDLL(None)
    except TypeError: return None  # Windows
    return libc if hasattr(libc, 'mallopt') else None
