"Temporary changes to modules and dictionaries, and their undo."
from contextlib import ExitStack, contextmanager
from copy import copy
from types import FunctionType

import torch

from .random_state import restore_random_states

__all__ = ['ForwardPatch', 'restore_dict', 'undo_on_error']


class ForwardPatch:
    "Replaces the forwards of module instances from `apply()` to `undo()`. Also a context manager."
    def __init__(self,
        modules=(),
        wrap=None, # `wrap(module, forward)` returns the new forward
        cache=None, # Dictionary of new forwards to reuse: a compiled model would recompile for a new function
    ):
        self.modules, self.wrap, self.replaced = list(modules), wrap, []
        self.cache = {} if cache is None else cache

    def apply(self):
        self.undo()
        self.replaced = [(m, vars(m).get('forward')) for m in self.modules]
        for m in self.modules:
            key = m, m.forward
            if key not in self.cache:
                self.cache[key] = self.wrap(m, m.forward)
                if isinstance(self.cache[key], FunctionType): self.cache[key].replaced = vars(m).get('forward')
            vars(m)['forward'] = self.cache[key]

    def undo(self):
        for m, forward in self.replaced:
            if forward is None: vars(m).pop('forward', None)
            else: vars(m)['forward'] = forward
        self.replaced = []

    def renew(self, modules, wrap):
        "A patch of other modules, whose next `apply()` or `undo()` also undoes this one."
        new = ForwardPatch(modules, wrap)
        new.replaced = self.replaced
        return new

    def __enter__(self): self.apply()
    def __exit__(self, *exc): self.undo()


def restore_dict(undo, d):
    "Register on `undo`, an `ExitStack`, to restore a dictionary and the dictionaries, lists and sets in it."
    saved = dict(d)
    saved_values = [(v, copy(v)) for v in d.values() if isinstance(v, (dict, list, set))]
    def _restore():
        d.clear(); d.update(saved)
        for v, old in saved_values:
            if isinstance(v, list): v[:] = old
            else: v.clear(); v.update(old)
    undo.callback(_restore)


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
