"A mode that sees each operation of its thread, one in the process at a time."
from torch.utils._python_dispatch import TorchDispatchMode  # no public name

from .module_hooks import LOCK


class DispatchMode(TorchDispatchMode):
    """Other threads wait with their modes and compilations. PyTorch notes for the whole process that a mode is on, and
    restores at the end what it found: of two modes that overlap, the second leaves the note, and 2.8 compiles nothing then."""
    def __enter__(self):
        LOCK.acquire()
        try: return super().__enter__()
        except BaseException:
            LOCK.release()
            raise

    def __exit__(self, *exc):
        try: return super().__exit__(*exc)
        finally: LOCK.release()
