"""One step's operations replayed in another: the same values in the forward pass, so that rounding is not amplified.

Plain PyTorch. Two steps of a deep network in two precisions differ by far more than one operation rounds: activations
fall on the other side of a kink, and all that follows differs. Where each operation of the second step goes on with the
first step's value, the gradients of both differ by the rounding of the operations on their way alone."""
from collections import defaultdict

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.nested_tensors import map_tensors, tensors_of

__all__ = ['Record', 'Replay']

PRODUCTS = {'convolution', 'addmm', 'mm', 'bmm', 'baddbmm'}  # operations that autocast runs in half precision
REPLAYED = PRODUCTS | {'native_batch_norm', 'native_layer_norm', 'native_group_norm', 'add', 'add_'}


def _relative(a, b) -> float:
    "Of tensors: the norm of the difference over the norm of `b`."
    return ((a - b).norm()/b.norm().clamp_min(torch.finfo(b.dtype).tiny)).item()


def _owner(op, names) -> str:
    "The module that an operation's parameters belong to; the operation, where there are none."
    return (names[0].rpartition('.')[0] or names[0]) if names else op


class Pass(TorchDispatchMode):
    "Context manager: follows the operations of a forward pass. Set `.backward` when it is over."
    def __init__(self,
        model, # Its parameters name the operations
    ):
        super().__init__()
        self.names, self.casts = {self._memory(p): n for n, p in model.named_parameters()}, []
        self.backward = False

    def _memory(self, t): return t.untyped_storage()._cdata if t.layout is torch.strided else id(t)

    def _names(self, args) -> tuple:
        "The parameters among an operation's arguments; views and what autocast casts are named as their source."
        return *(self.names[k] for t in tensors_of(args) if (k := self._memory(t)) in self.names),

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if self.backward: return self.run(func, args, kwargs)
        replayed = name in REPLAYED
        out = func(*args, **kwargs) if replayed else self.run(func, args, kwargs)
        names = self._names(args)
        if name == '_to_copy' and names:
            self.names[self._memory(out)] = names[0]
            self.casts.append(out)  # whose memory no later tensor gets
        if replayed and (made := tensors_of(out)[0]).is_floating_point():
            self.look((name, names, made.shape), made, func, args, kwargs)
        return out

    def run(self, func, args, kwargs): return func(*args, **kwargs)


class Record(Pass):
    "A pass whose results are kept, in main memory; or only counted."
    def __init__(self, model, keep=True):
        super().__init__(model)
        self.values, self.keep = defaultdict(list), keep

    def look(self, key, made, *call):
        self.values[key].append(made.detach().to('cpu', copy=True) if self.keep else None)


class Replay(Pass):
    """A pass whose operations give the values that a `Record` holds of them. `.wrong` names the products that came out
    differently, by the modules whose weights they take. With `rounded`, all other operations take and give nudged
    numbers."""
    def __init__(self, model,
        record: Record, # Of the step to replay
        plain: Record, # Of this step as it is: operations that do not occur as often in both are left alone
        perturb, # Function of a tensor: the same with rounding errors
        most, # Relative difference of a product that needs no explanation
        explained, # Times the difference that rounding errors of the factors make: such a product is right
        rounded=False,
    ):
        super().__init__(model)
        self.values = {k: iter(v) for k, v in record.values.items() if len(v) == len(plain.values[k])}
        self.perturb, self.most, self.explained, self.rounded, self.wrong = perturb, most, explained, rounded, []

    def look(self, key, made, *call):
        if (value := next(self.values.get(key, iter(())), None)) is None: return
        value = value.to(made)
        if key[0] in PRODUCTS and self._differs(value, made, *call): self.wrong.append(_owner(*key[:2]))
        made.copy_(value)

    def _differs(self, value, made, func, args, kwargs) -> bool:
        "True if a product is further from the recorded value than rounding explains."
        if (off := _relative(value, made)) <= self.most: return False
        rounded = func(*map_tensors(self.perturb, args), **kwargs)
        return not off <= self.explained*_relative(rounded, made)

    def run(self, func, args, kwargs):
        "An operation whose result is not replayed."
        views = any(r.alias_info is not None for r in func._schema.returns)
        if not self.rounded or views: return func(*args, **kwargs)
        return map_tensors(self.perturb, func(*map_tensors(self.perturb, args), **kwargs))
