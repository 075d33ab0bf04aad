"A model's structure and values, compared with those of a moment ago, and private copies of it."
from collections import deque
from copy import deepcopy
from functools import partial
from itertools import chain
from operator import is_
from types import FunctionType, MethodType, ModuleType

import numpy as np
import torch
from fastai.learner import Learner
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.utils.hooks import RemovableHandle

from .onednn_workarounds import pause_safe_convolutions

INTERNAL = {*vars(nn.Module())}  # attributes that each module has
GLOBAL_HOOKS = '_global_forward_pre_hooks', '_global_forward_hooks'  # no public name lists hooks
HOOKS = '_forward_pre_hooks', '_forward_hooks'  # likewise
ALL_HOOKS = *HOOKS, '_backward_pre_hooks', '_backward_hooks'
ATOMS = bool, int, float, complex, str, bytes, type(None), type, FunctionType, ModuleType, Tensor, torch.dtype
LIBRARY = __name__.partition('.')[0]
SAMPLE = 8  # elements of each tensor that are compared


class CantCopy(Exception):
    "Raised for a model that can't be copied, with the reason."


def top_package(cls) -> str: return cls.__module__.partition('.')[0]


def own_dicts(m) -> tuple: # The public methods take ten times as long
    "A module's own parameters, buffers and submodules, by name."
    return m._parameters, m._buffers, m._modules


def hooks_of(modules) -> list: return [h for m in modules for k in HOOKS for h in vars(m)[k].values()]
def has_global_hooks() -> bool: return any(getattr(global_hooks, k) for k in GLOBAL_HOOKS)
def all_hooks_of(modules) -> list: return [h for m in modules for k in ALL_HOOKS for h in vars(m)[k].values()]


def all_is(a, b) -> bool:
    "True if the elements are the same objects, or equal numbers."
    if len(a) != len(b): return False
    return all(map(is_, a, b)) or all(x is y or type(x) is type(y) in (int, float) and x == y for x, y in zip(a, b))


def program_of(classes) -> list:
    "Methods and attributes of classes, except PyTorch's. Notebooks define them again."
    own = [vars(c) for c in classes if top_package(c) not in ('torch', 'builtins')]
    return [getattr(v, '__code__', v) for d in own for k, v in d.items() if k != '__slotnames__']  # set by copies


def is_plain(t) -> bool:
    "True for tensors with strides whose changes are counted."
    return type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided and not t.is_inference()


def versions_of(tensors) -> list: # No public name has the counters
    "PyTorch's counters of changes. It does not count changes through `.data`, or by fused optimizers."
    return [0 if t.is_inference() else t._version for t in tensors]


def _array(t) -> np.ndarray:
    "A NumPy array on the memory of `t`: it is read in a fifth of the time. `t.numpy()` would forbid to resize the memory."
    return np.from_dlpack(t.view({1: torch.int8, 2: torch.int16}.get(t.element_size(), t.dtype)))  # NumPy has no bf16


def children_of(o) -> tuple:
    "The objects that an object holds. Functions, classes and Python modules are parts of the program."
    if isinstance(o, ATOMS): return ()
    if isinstance(o, MethodType): return o.__self__,
    if isinstance(o, nn.Module):
        own = chain.from_iterable(d.values() for d in own_dicts(o))
        return *own, *(v for k, v in vars(o).items() if k not in INTERNAL)
    own = (*o.keys(), *o.values()) if isinstance(o, dict) else ()
    if isinstance(o, (list, tuple, set, frozenset, deque)): own = *o,
    if isinstance(o, partial): own = o.func, o.args, o.keywords
    return *own, *getattr(o, '__dict__', {}).values()


class ModelState:
    """Snapshot of a model: its modules, modes, hooks and attributes by identity; the counters, the memory and a sample
    of the elements of its tensors. A change through `.data` that leaves all sampled elements as they are is not seen.
    Raises `CantCopy`."""
    def __init__(self, model: nn.Module):
        self.model, self.modules, self.tensors, self.objects, self.owned, self.classes = model, [], [], [], {}, {}
        self._reach(model)
        if any(isinstance(m, (nn.DataParallel, nn.parallel.DistributedDataParallel)) for m in self.modules):
            raise CantCopy('it is wrapped for several devices')
        if any(isinstance(m, torch.jit.ScriptModule) or '_orig_mod' in own_dicts(m)[2] or m._compiled_call_impl
               for m in self.modules): raise CantCopy('it is compiled or scripted already')
        self.weights = [t for m in self.modules for d in own_dicts(m)[:2] for t in d.values() if t is not None]
        if not all(map(is_plain, self.weights)): raise CantCopy('its weights are inference tensors, or of other types')
        own = [d for m in self.modules for d in (vars(m), *own_dicts(m), *(vars(m)[k] for k in HOOKS))]
        self.empty, self.dicts = [d for d in own if not d], [d for d in own if d]
        self.structure, self.hooks = self._structure(), {*map(id, hooks_of(self.modules))}
        self.program = program_of(self.classes)
        self.take_values()

    def _reach(self, model):
        "Find the modules, tensors, objects and classes that the model holds. Activations in hooks are no part of it."
        stack = [model]
        while stack:
            o = stack.pop()
            if id(o) in self.owned: continue
            self.owned[id(o)], children = o, children_of(o)
            if isinstance(o, Tensor): self.tensors.append(o)
            if isinstance(o, ATOMS) or any(isinstance(c, RemovableHandle) for c in children): continue
            if isinstance(o, Learner): raise CantCopy('it holds a Learner')
            if isinstance(o, nn.Module): self.modules.append(o)
            elif not isinstance(o, (tuple, frozenset, MethodType)): self.objects.append(o)
            self.classes.update(dict.fromkeys(type(o).__mro__))
            stack += children

    def _structure(self) -> list: # References, so that no address is used again
        values = chain.from_iterable(map(dict.values, self.dicts))
        return [any(self.empty), *map(type, self.modules), *values, *chain.from_iterable(map(children_of, self.objects))]

    def _memory(self) -> list: # With the counters of changes
        return [(t._version, t.data_ptr(), t.shape, t.stride(), t.dtype) for t in self.watched]

    def _values(self) -> tuple: # Of the CPU and of other devices, as bytes: NaN equals itself
        return [a.tobytes() for a in self.arrays], [torch.cat(o).view(torch.uint8) for o in self.samples]

    def take_values(self):
        "Take the values that the tensors have now."
        self.watched, self.arrays, groups = [t for t in self.tensors if is_plain(t)], [], {}
        self.memory = self._memory()
        for t in (t for t in self.watched if t.numel()):
            last = sum((n - 1)*s for n, s in zip(t.shape, t.stride()))  # offset of the last element
            step = max(1, last//(SAMPLE - 1))
            sample = t.detach().as_strided((1 + min(SAMPLE - 1, last//step),), (step,))
            if t.is_cpu and not (t.is_conj() or t.is_neg()): self.arrays.append(_array(sample))
            else: groups.setdefault((t.device, t.dtype), []).append(sample)
        self.samples = [*groups.values()]
        self.values = self._values()

    def same_structure(self) -> bool: return all_is(self._structure(), self.structure)
    def same_program(self) -> bool: return all_is(program_of(self.classes), self.program)  # notebooks define methods again
    def has_more_hooks(self) -> bool: return any(id(h) not in self.hooks for h in hooks_of(self.modules))
    def same_memory(self) -> bool: return self._memory() == self.memory

    @pause_safe_convolutions()
    def same_values(self):
        "A bool, or a tensor: reading it waits for the device. To be called only if the memory is the same."
        (own, others), (old, old_others) = self._values(), self.values
        same = [(a == b).all() for a, b in zip(others, old_others)]
        return torch.stack([o.to(same[0].device) for o in same]).all() if same and own == old else own == old

    def is_unchanged(self) -> bool:
        "True if nothing changed, except that tensors in attributes were computed again. Takes these."
        def _equal(a, b): return isinstance(a, Tensor) and isinstance(b, Tensor) and a.device == b.device and torch.equal(a, b)
        old, self.structure = self.structure, self._structure()
        if len(old) != len(self.structure) or not all(a is b or _equal(a, b) for a, b in zip(old, self.structure)):
            return False
        return self.same_memory() and bool(self.same_values())

    def foreign_hooks(self) -> bool:
        """True if hooks must see the user's modules. A model owns methods of its modules and of objects in its
        attributes (the skip connections of fastai's U-Net), PyTorch's hooks and this library's."""
        def _is_own(h):
            if isinstance(h, FunctionType): return False
            return id(getattr(h, '__self__', h)) in self.owned or top_package(type(h)) in ('torch', LIBRARY)
        return not all(map(_is_own, hooks_of(self.modules)))


class ModelCopy:
    """`.model` is a copy whose parameters and buffers are other tensors on the same memory, without gradients.
    It shares all objects that hold no module: a change in a list, a counter in an object, a random generator.
    `.shared` lists these. Raises `CantCopy`."""
    def __init__(self, state: ModelState):
        def _alias(t): return nn.Parameter(t.detach(), requires_grad=False) if isinstance(t, nn.Parameter) else t.detach()
        memo = {id(t): _alias(t) for t in state.weights}
        self.tensors, self.shared = [(memo[id(t)], t) for t in {id(t): t for t in state.weights}.values()], []
        try:
            self._holds_modules(state.model, memo, {})
            self.model = deepcopy(state.model, memo)
        except Exception as e: raise CantCopy(f"it can't be copied ({type(e).__name__}: {e})") from None
        if not {*map(id, state.modules)}.isdisjoint(map(id, self.model.modules())): raise CantCopy('it shares its modules')
        for m in self.model.modules():  # what a finalizer closes or removes is the user's
            if hasattr(m, '__del__'): m.__class__ = type(type(m).__name__, (type(m),), {'__del__': lambda self: None})

    def _holds_modules(self, o, memo, visited) -> bool:
        "True if an object holds modules or the handle of a hook. All others are shared."
        if isinstance(o, Tensor): memo.setdefault(id(o), o)
        if isinstance(o, (*ATOMS, RemovableHandle)): return isinstance(o, RemovableHandle)
        if id(o) not in visited:
            visited[id(o)] = True  # until it is known, for objects that hold themselves
            holds = [self._holds_modules(c, memo, visited) for c in children_of(o)]
            visited[id(o)] = any(holds) or isinstance(o, nn.Module)
            if not visited[id(o)]:
                memo[id(o)] = o
                self.shared.append(o)
        return visited[id(o)]

    def follow(self):
        "Use the memory that the user's tensors have now."
        for own, t in self.tensors: own.data = t.detach()
