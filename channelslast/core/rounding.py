"A pass in which each operation makes a rounding error: the change that rounding explains."
from .compare import SUM_ERROR, perturb
from .dispatch_mode import DispatchMode
from .nested_tensors import map_tensors

# These choose an element, or compare: a gradient looks for the maximum among the numbers it was chosen from
EXACT = {'amax', 'amin', 'max', 'min', 'median', 'nanmedian', 'eq', 'ne'}


class Rounding(DispatchMode):
    "Context manager: each operation takes and gives numbers that differ by up to the relative rounding error `eps`."
    def __init__(self, eps, generator=None): # `generator` leaves the pass's own random numbers alone
        super().__init__()
        self.eps, self.generator = eps, generator

    def perturb(self, x): return perturb(x, self.eps, self.generator)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        views, name = any(r.alias_info is not None for r in func._schema.returns), func.overloadpacket.__name__  # no public name
        if views or name in EXACT: return func(*args, **kwargs)
        if 'norm_backward' not in name: args = map_tensors(self.perturb, args)
        else: args = [self._perturb_saved(s.name, a) for s, a in zip(func._schema.arguments, args)]
        return map_tensors(self.perturb, func(*args, **kwargs))

    def _perturb_saved(self, name, x):
        "An argument of a normalization's backward pass: its input is that of the forward pass, and statistics are sums in fp32."
        if name.startswith('grad'): return self.perturb(x)
        return x if name == 'input' else perturb(x, SUM_ERROR, self.generator)
