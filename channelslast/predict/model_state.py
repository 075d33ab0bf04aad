"All that a copy of a model depends on: its structure, compared for each batch, and its values, for each prediction."
from collections import deque
from functools import partial
from itertools import chain
from operator import is_
from types import FunctionType, MethodType, ModuleType

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.utils.hooks import RemovableHandle

__all__ = ['ATOMS', 'HOOKS', 'INTERNAL', 'CantCopy', 'ModelState', 'children_of', 'has_global_hooks', 'hooks_of',
           'is_plain', 'own_dicts', 'versions_of']

INTERNAL = {*vars(nn.Module())}  # attributes that each module has
GLOBAL_HOOKS = '_global_forward_pre_hooks', '_global_forward_hooks'  # no public name lists them
HOOKS = '_forward_pre_hooks', '_forward_hooks'  # likewise
ATOMS = bool, int, float, complex, str, bytes, type(None), type, FunctionType, ModuleType, Tensor, torch.dtype
SAMPLE = 8  # elements of each tensor that are compared


class CantCopy(Exception):
    "Raised for a model that can't be copied, with the reason."


def own_dicts(m) -> tuple: # The public methods take ten times as long
    "A module's own parameters, buffers and submodules, by name."
    return m._parameters, m._buffers, m._modules


def hooks_of(modules) -> list: return [h for m in modules for k in HOOKS for h in vars(m)[k].values()]
def has_global_hooks() -> bool: return any(getattr(global_hooks, k) for k in GLOBAL_HOOKS)


def is_plain(t) -> bool:
    "True for tensors with strides whose changes are counted."
    return type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided and not t.is_inference()


def versions_of(tensors) -> list: # No public name has the counters
    "PyTorch's counters of changes. It does not count changes through `.data`, or by fused optimizers."
    return [0 if t.is_inference() else t._version for t in tensors]


def children_of(o) -> tuple:
    "The objects that an object holds. Functions, classes and Python modules are parts of the program."
    if isinstance(o, ATOMS): return ()
    attributes = getattr(o, '__dict__', {}).values()
    if isinstance(o, dict): return *o.keys(), *o.values(), *attributes
    if isinstance(o, (list, tuple, set, frozenset, deque)): return *o, *attributes
    if isinstance(o, partial): return o.func, o.args, o.keywords, *attributes
    if isinstance(o, MethodType): return o.__self__,
    return *attributes,


class ModelState:
    """Snapshot of a model: its modules, modes, hooks and attributes by identity; the counters, the memory and a sample
    of the elements of its tensors. A change through `.data` that leaves all sampled elements as they are is not seen.
    Raises `CantCopy`."""
    def __init__(self, model: nn.Module):
        self.model, self.modules, self.tensors, self.owned, self.classes = model, [], [], {}, {}
        self._reach(model)
        if any(isinstance(m, (nn.DataParallel, nn.parallel.DistributedDataParallel)) for m in self.modules):
            raise CantCopy('it is wrapped for several devices')
        compiled = any('_orig_mod' in own_dicts(m)[2] or m._compiled_call_impl for m in self.modules)
        if compiled or any(isinstance(m, torch.jit.ScriptModule) for m in self.modules):
            raise CantCopy('it is compiled or scripted already')
        if not all(map(is_plain, self.weights())): raise CantCopy('its weights are inference tensors or not plain ones')
        self.dicts = [d for m in self.modules for d in (vars(m), *own_dicts(m), *(vars(m)[k] for k in HOOKS))]
        self.structure, self.hooks = self._structure(), [*map(id, hooks_of(self.modules))]
        self.program = self._program()
        self.take_values()

    def _reach(self, model):
        "Find the modules, tensors, objects and classes that the model holds. Activations in hooks are no part of it."
        stack = [model]
        while stack:
            o = stack.pop()
            if id(o) in self.owned: continue
            self.owned[id(o)] = o
            if isinstance(o, Tensor): self.tensors.append(o)
            if isinstance(o, ATOMS): continue
            self.classes.update(dict.fromkeys(type(o).__mro__))
            if isinstance(o, nn.Module):
                self.modules.append(o)
                for k, v in vars(o).items():
                    if k not in HOOKS: stack.append(v)
            elif not any(isinstance(c, RemovableHandle) for c in children_of(o)): stack += children_of(o)

    def weights(self) -> list:
        "All parameters and buffers."
        return [t for m in self.modules for d in own_dicts(m)[:2] for t in d.values() if t is not None]

    def _structure(self) -> list: # References, so that no address is used again
        return [*chain.from_iterable(d.values() for d in self.dicts)]

    def _memory(self) -> list: return [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in self.watched]

    def take_values(self):
        "Take the values that the tensors have now."
        self.watched = [t for t in self.tensors if is_plain(t)]
        self.versions, self.memory, groups = versions_of(self.watched), self._memory(), {}
        for t in self.watched:
            if not t.numel(): continue
            span = 1 + sum((n - 1)*s for n, s in zip(t.shape, t.stride()))
            step = max(1, (span - 1)//(SAMPLE - 1))
            sample = t.detach().as_strided((1 + min(SAMPLE - 1, (span - 1)//step),), (step,))
            groups.setdefault((t.device, t.dtype), []).append(sample)
        self.samples = [*groups.values()]
        self.values = self._values()

    def _values(self) -> list: # As bytes: NaN equals itself
        return [torch.cat(samples).view(torch.uint8) for samples in self.samples]

    def same_structure(self) -> bool:
        now = self._structure()
        return len(now) == len(self.structure) and all(map(is_, now, self.structure))

    def has_more_hooks(self) -> bool: return any(id(h) not in self.hooks for h in hooks_of(self.modules))
    def same_versions(self) -> bool: return versions_of(self.watched) == self.versions
    def same_memory(self) -> bool: return self._memory() == self.memory

    def same_values(self):
        "True or a tensor: reading it waits for the device. Valid if the memory is the same."
        same = [(a == b).all() for a, b in zip(self._values(), self.values)]
        return torch.stack([o.to(same[0].device) for o in same]).all() if same else True

    def is_unchanged(self) -> bool:
        "True if nothing changed, except that tensors in attributes were computed again. Takes these."
        def _equal(a, b): return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
        now = self._structure()
        if len(now) != len(self.structure): return False
        if not all(a is b or _equal(a, b) for a, b in zip(now, self.structure)): return False
        self.structure = now
        return self.same_versions() and self.same_memory() and bool(self.same_values())

    def foreign_hooks(self, functions=False) -> bool:
        """True if hooks must see the user's modules. A model owns methods of its modules and of objects in its
        attributes (the skip connections of fastai's U-Net), PyTorch's hooks and this library's, and functions, unless
        `functions`."""
        def _is_foreign(h):
            if isinstance(h, FunctionType): return functions
            library = type(h).__module__.partition('.')[0] in ('torch', __name__.partition('.')[0])
            return not library and id(getattr(h, '__self__', h)) not in self.owned
        return any(map(_is_foreign, hooks_of(self.modules)))

    def same_program(self) -> bool:
        "True if no method and no attribute of the classes in the model was defined again, as notebooks do."
        now = self._program()
        return len(now) == len(self.program) and all(map(is_, now, self.program))

    def _program(self) -> list: # Without PyTorch's classes
        own = [vars(c) for c in self.classes if c.__module__.partition('.')[0] not in ('torch', 'builtins')]
        return [getattr(v, '__code__', v) for d in own for v in d.values()]
