"""Tensors in nested containers: tuples, lists, dictionaries, dataclasses, and objects whose attributes hold tensors.

PyTorch's pytree treats each type that is not registered with it as a leaf. Models and DataLoaders also use fastcore's
`L`, subclasses of `OrderedDict`, `UserDict`, dataclasses, and objects such as torchvision's `ImageList`."""
import copyreg
from collections import deque
from copy import copy
from types import ModuleType

from torch import Tensor

SEQUENCES = tuple, list, deque
OPAQUE = Tensor, str, bytes, type, ModuleType


def _items(x) -> dict:
    "The elements of a container, by key or position."
    return dict(x) if isinstance(x, dict) else dict(enumerate(x)) if isinstance(x, SEQUENCES) else {}


def _attributes(x) -> dict:
    "The attributes stored in an object. Callables (modules, Learners, functions) are not containers."
    if isinstance(x, OPAQUE) or callable(x): return {}
    slots = {k: getattr(x, k) for k in copyreg._slotnames(type(x)) if hasattr(x, k)}
    return {**getattr(x, '__dict__', {}), **slots}


def leaves_of(x) -> list:
    "Everything in `x` that is not a container, in order. A container that occurs twice is visited once."
    leaves, visited, stack = [], {}, [x]
    while stack:
        o = stack.pop()
        children = [*_items(o).values(), *_attributes(o).values()]
        if not children and not isinstance(o, (dict, *SEQUENCES)): leaves.append(o)
        if id(o) not in visited: stack += reversed(children)
        visited[id(o)] = o
    return leaves


def tensors_of(x) -> list: return [t for t in leaves_of(x) if isinstance(t, Tensor)]


def map_tensors(f, x):
    """`x`, a tensor or nested containers of tensors, with `f(t)` in place of each tensor `t`. Containers with changes
    are copied and keep their type. Others stay the same objects."""
    return _map(f, x, {})


# not a recursive closure: its reference cycle would keep tensors alive until the garbage collector runs
def _map(f, x, mapped): # `mapped` holds the results by the id of the original
    if id(x) not in mapped:
        mapped[id(x)] = x  # for a container that holds itself
        mapped[id(x)] = f(x) if isinstance(x, Tensor) else _map_container(f, x, mapped)
    return mapped[id(x)]


def _map_container(f, x, mapped):
    items = _items(x)
    new_items, new_attributes = _new_values(f, items, mapped), _new_values(f, _attributes(x), mapped)
    if not new_items and not new_attributes: return x
    if isinstance(x, tuple): new = _rebuild_tuple(x, {**items, **new_items}.values())
    else:
        new = copy(x)
        for k, v in new_items.items(): new[k] = v
    for k, v in new_attributes.items(): object.__setattr__(new, k, v)  # frozen dataclasses too
    return new


def _new_values(f, values, mapped) -> dict: # Only the values that change
    new = {k: _map(f, v, mapped) for k, v in values.items()}
    return {k: v for k, v in new.items() if v is not values[k]}


def _rebuild_tuple(x, items):
    "A tuple of the type of `x`, whatever arguments that type takes."
    try: new = tuple.__new__(type(x), items)
    except TypeError: return type(x)(items)  # `torch.return_types`
    if hasattr(x, '__dict__'): vars(new).update(vars(x))
    return new


def copied(x):
    "`x` with copies of its tensors, for a pass that may write into them."
    def _copy(t):
        new = t.detach().clone().requires_grad_(t.requires_grad)
        for k, v in vars(t).items(): vars(new).setdefault(k, v)  # subclasses may copy inner tensors
        return new
    return map_tensors(_copy, x)


def first_items(batch, bs: int, n: int):
    """The first `n` items of a batch of `bs`: of each tensor whose first dimension is `bs`. If there is none, of lists
    of that length, as detectors take them. A batch without either is returned as it is."""
    part = map_tensors(lambda t: t[:n] if t.dim() and len(t) == bs else t, batch)
    if part is not batch or not isinstance(batch, SEQUENCES): return part
    def _has_all_items(o): return isinstance(o, SEQUENCES) and len(o) == bs
    if not any(map(_has_all_items, batch)): return batch
    return tuple(o[:n] if _has_all_items(o) else o for o in batch)
