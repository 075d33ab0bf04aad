"""Tensors in nested containers: tuples, lists, dictionaries, dataclasses, and objects whose attributes hold tensors.

PyTorch's pytree takes every type that is not registered with it for a leaf. Models and loaders also give fastcore's
`L`, subclasses of `OrderedDict`, `UserDict`, dataclasses, and objects such as torchvision's `ImageList`."""
import copyreg
from collections import deque
from copy import copy
from types import ModuleType

from torch import Tensor

__all__ = ['leaves_of', 'tensors_of', 'map_tensors', 'first_half']

SEQUENCES = tuple, list, deque
OPAQUE = Tensor, str, bytes, type, ModuleType


def _items(x) -> dict:
    "The elements of a container, by key or position."
    return dict(x) if isinstance(x, dict) else dict(enumerate(x)) if isinstance(x, SEQUENCES) else {}


def _attributes(x) -> dict:
    "The attributes that an object itself holds. Callables (modules, Learners, functions) are no containers."
    if isinstance(x, OPAQUE) or callable(x): return {}
    slots = {k: getattr(x, k) for k in copyreg._slotnames(type(x)) if hasattr(x, k)}
    return {**getattr(x, '__dict__', {}), **slots}


# no closures that call themselves: such a cycle would keep tensors alive until the garbage collector runs

def leaves_of(x) -> list:
    "All that is no container in `x`, tensors and others, in order. An object that occurs twice is walked once."
    _walk(x, found := [], set())
    return found


def _walk(x, found, seen):
    parts = [*_items(x).values(), *_attributes(x).values()]
    if not parts and not isinstance(x, (dict, *SEQUENCES)): found.append(x)
    if not parts or id(x) in seen: return
    seen.add(id(x))
    for o in parts: _walk(o, found, seen)


def tensors_of(x) -> list:
    "The tensors in `x`, in order."
    return [t for t in leaves_of(x) if isinstance(t, Tensor)]


def map_tensors(
    f, # Function of a tensor
    x, # A tensor, or containers of them, nested as you like
):
    """`x` with `f(t)` in place of each tensor `t`. Containers keep their type; those in which nothing changes stay the
    same objects, the others are copied."""
    return _map(f, x, {})


def _map(f, x, known):
    if id(x) not in known:
        known[id(x)] = x  # of a container that holds itself
        known[id(x)] = f(x) if isinstance(x, Tensor) else _mapped(f, x, known)
    return known[id(x)]


def _mapped(f, x, known):
    "A container with `f` of each of its tensors."
    parts = _items(x), _attributes(x)
    items, attributes = ({k: _map(f, v, known) for k, v in d.items()} for d in parts)
    new_items, new_attributes = ({k: v for k, v in new.items() if v is not old[k]}
                                 for new, old in zip((items, attributes), parts))
    if not new_items and not new_attributes: return x
    if isinstance(x, tuple): new = _rebuild_tuple(x, items.values())
    else:
        new = copy(x)
        for k, v in new_items.items(): new[k] = v
    for k, v in new_attributes.items(): object.__setattr__(new, k, v)  # frozen dataclasses too
    return new


def _rebuild_tuple(x, items):
    "A tuple of the type of `x`, whatever arguments the type takes."
    try: new = tuple.__new__(type(x), items)
    except TypeError: return type(x)(items)  # `torch.return_types`
    if hasattr(x, '__dict__'): vars(new).update(vars(x))
    return new


def first_half(
    batch, # Tensors, nested as you like; or a tuple of lists, as detectors take them
    bs, # Number of its items
):
    """The first half of the items: of each tensor whose first dimension has that size, or, where there is none, of each
    list of that length. The batch itself, where neither is found."""
    half = map_tensors(lambda t: t[:bs//2] if t.dim() and len(t) == bs else t, batch)
    if half is not batch or not isinstance(batch, SEQUENCES): return half
    if not any(isinstance(o, SEQUENCES) and len(o) == bs for o in batch): return batch
    return tuple(o[:bs//2] if isinstance(o, SEQUENCES) and len(o) == bs else o for o in batch)
