"Hooks on all modules that one thread runs, and the lock that they share with compilations."
import threading
from contextlib import contextmanager

from torch.nn.modules import module as hooks

# Held while hooks on all modules exist, which a compilation in another thread would trace, during dispatch modes, which
# PyTorch notes for the process, and while a model compiles or a compiled step runs, which change settings of the process:
# log level, warnings, PyTorch's configuration and stance.
LOCK = threading.RLock()


@contextmanager
def module_hooks(enter, leave, **kwargs):
    """Call `enter` before and `leave` after each module that this thread runs, also after an error. Other threads may
    run modules meanwhile. `kwargs` are those of `register_module_forward_hook`."""
    thread = threading.get_ident()
    def _own(hook): return lambda *args: hook(*args) if threading.get_ident() == thread else None
    with LOCK:
        handles = [hooks.register_module_forward_pre_hook(_own(enter)),
                   hooks.register_module_forward_hook(_own(leave), always_call=True, **kwargs)]
        try: yield
        finally:
            for h in handles: h.remove()
