"Temporary changes to modules and dictionaries, each with its undo."
from copy import copy

__all__ = ['ForwardPatch', 'restore_dict']


class ForwardPatch:
    "Other forwards for some modules, on the instances alone, from `apply()` to `undo()`; also a context manager."
    def __init__(self,
        modules=(),
        wrap=None, # `wrap(module, forward)` makes the new forward
        cache=None, # New forwards made before: for a new function, a compiled model would compile again
    ):
        self.modules, self.wrap, self.cache, self.replaced = list(modules), wrap, {} if cache is None else cache, []

    def apply(self):
        self.undo()
        self.replaced = [(m, vars(m).get('forward')) for m in self.modules]
        for m in self.modules:
            key = m, m.forward
            if key not in self.cache: self.cache[key] = self.wrap(m, m.forward)
            vars(m)['forward'] = self.cache[key]

    def undo(self):
        for m, forward in self.replaced:
            if forward is None: vars(m).pop('forward', None)
            else: vars(m)['forward'] = forward
        self.replaced = []

    def __enter__(self): self.apply()
    def __exit__(self, *exc): self.undo()


def restore_dict(undo, d):
    "Have `undo` restore a dictionary and, one level down, the dictionaries, lists and sets in it."
    saved, inner = dict(d), [(v, copy(v)) for v in d.values() if isinstance(v, (dict, list, set))]
    def _restore():
        d.clear(); d.update(saved)
        for v, old in inner:
            if isinstance(v, list): v[:] = old
            else: v.clear(); v.update(old)
    undo.callback(_restore)
