"Tensors in nested containers of all kinds are found and replaced; the containers keep their types."
import gc
import weakref
from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from fastcore.basics import fastuple
from fastcore.foundation import L

from channelslast.core.autocast import HALF_DTYPES
from channelslast.core.nested_tensors import leaves_of, map_tensors, tensors_of

Pair = namedtuple('Pair', 'a b')

@dataclass
class Data: a: object; b: object = 's'

@dataclass(frozen=True)
class Frozen: a: object; b: int = 1

@dataclass(slots=True)
class Slots: a: object; b: int = 1

class ModelOutput(OrderedDict):
    "A dictionary whose items are also its attributes, as in Hugging Face's."
    def __init__(self, **kw):
        super().__init__()
        for k, v in kw.items(): self[k] = v
    def __setitem__(self, k, v): super().__setitem__(k, v); object.__setattr__(self, k, v)

class Boxes:
    "An object that holds tensors, like torchvision's `ImageList`, and may hold another such object."
    def __init__(self, t, inner=None): self.tensors, self.sizes, self.inner = t, [(1, 2)], inner

def half(): return torch.ones(2, 3, dtype=torch.bfloat16)

MAKE = dict(
    tensor=half, tuple=lambda: (half(), 1, None, 's'), list=lambda: [half(), [half()]], dict=lambda: dict(a=half(), b=3), named=lambda: Pair(half(), 2),
    ordered=lambda: OrderedDict(a=half()), default=lambda: defaultdict(list, a=[half()]), output=lambda: ModelOutput(a=half(), b=None),
    user=lambda: UserDict(a=half()), deque=lambda: deque([half()], 3), L=lambda: L(half(), 's'), fastuple=lambda: fastuple((half(), 2)),
    data=lambda: Data(half()), frozen=lambda: Frozen(half()), slots=lambda: Slots([half()]), object=lambda: Boxes(half(), Boxes(half())),
    space=lambda: SimpleNamespace(a=dict(b=half())), returned=lambda: (torch.max(half(), 1), 2), packed=lambda: torch.nn.utils.rnn.pack_sequence([half()]))


@pytest.mark.parametrize('name', MAKE)
def test_map_tensors_replaces_tensors_and_keeps_the_types_of_containers(name):
    x = MAKE[name]()
    before = [(id(o), o.dtype) if isinstance(o, torch.Tensor) else o for o in leaves_of(x)]
    y = map_tensors(lambda t: t.float() if t.dtype in HALF_DTYPES else t, x)
    assert type(y) is type(x) and y is not x and len(tensors_of(y)) == len(tensors_of(x)) > 0
    assert not {t.dtype for t in tensors_of(y)} & {*HALF_DTYPES} and [type(o) for o in leaves_of(y)] == [type(o) for o in leaves_of(x)]
    assert before == [(id(o), o.dtype) if isinstance(o, torch.Tensor) else o for o in leaves_of(x)]  # the original stays
    assert map_tensors(lambda t: t, x) is x
    if isinstance(x, deque): assert y.maxlen == 3
    if isinstance(x, defaultdict): assert y.default_factory is list
    if isinstance(x, ModelOutput): assert y.a is y['a']


@pytest.mark.parametrize('x', [None, 3, 's', b'b', torch.nn.Linear(1, 1), torch.float16, {}, (), [], L(), object(), print, torch.Size([2, 3])],
                         ids=lambda x: type(x).__name__)
def test_an_object_without_tensors_is_returned_as_it_is(x):
    assert tensors_of(x) == [] and map_tensors(lambda t: t + 1, x) is x


def test_map_tensors_maps_an_object_that_occurs_twice_to_one():
    t, l = half(), [half()]
    a, b, c, d = map_tensors(torch.Tensor.float, (t, t, l, l))
    assert a is b and c is d


def test_map_tensors_of_an_object_that_holds_itself_ends():
    b = Boxes(half())
    b.inner = b
    assert len(tensors_of(b)) == 1 and map_tensors(torch.Tensor.float, b).tensors.dtype == torch.float32


def test_tensors_are_freed_without_the_garbage_collector():
    gc.collect(); gc.disable()
    try:
        t = torch.ones(2)
        ref = weakref.ref(t)
        leaves_of([t]); map_tensors(lambda t: t + 1, dict(a=[t]))
        del t
        assert ref() is None
    finally: gc.enable()
