"Restore dictionaries and modules after a block."
import signal
import threading
from contextlib import ExitStack, contextmanager
from copy import copy
from operator import is_

import torch

from .random_state import restore_random_states


class Saved:
    "What a dictionary holds now, and the dictionaries, lists and sets in it. `restore()` puts it back, as often as needed."
    def __init__(self, d, skipped=()): # Keys whose containers need not be restored
        self.dict, self.skipped, self.items = d, skipped, {}
        self.take()
    def take(self):
        "Take what it holds now. Few new objects, since the garbage collector counts them."
        if len(self.dict) != len(self.items) or not all(map(is_, self.dict.values(), self.items.values())):
            self.items = dict(self.dict)
        self.containers = [(v, copy(v)) for k, v in self.items.items() if isinstance(v, (dict, list, set)) and k not in self.skipped]
    def restore(self):
        self.dict.clear(); self.dict.update(self.items)
        for v, old in self.containers:
            if isinstance(v, list): v[:] = old
            else: v.clear(); v.update(old)


def restore_dict(undo, d):
    "Register on `undo`, an `ExitStack`, to restore a dictionary and the dictionaries, lists and sets in it."
    undo.callback(Saved(d).restore)


@contextmanager
def uninterrupted():
    "Ctrl-C takes effect at the end of the block. Python delivers it to the main thread."
    own = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if not callable(own):
        yield
        return
    seen = []
    signal.signal(signal.SIGINT, lambda *args: seen.append(args))
    try: yield
    finally:
        signal.signal(signal.SIGINT, own)
        if seen: own(*seen[0])


@contextmanager
def undo_on_error(model):
    "Restore the model's buffers, the attributes of its modules and the random states if the block raises."
    buffers = [(b, b.clone()) for b in model.buffers()]
    with ExitStack() as undo:
        for m in model.modules(): restore_dict(undo, vars(m))
        undo.enter_context(restore_random_states())
        try: yield
        except BaseException:
            with torch.no_grad():
                for b, saved in buffers: b.copy_(saved)
            raise
        undo.pop_all()
