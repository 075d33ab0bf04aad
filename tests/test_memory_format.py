"Convert tensors, modules and optimizers, in plain PyTorch."
from collections import namedtuple
from copy import deepcopy
from functools import partial

import pytest
import torch
from fastai.optimizer import Adam, Lamb, OptimWrapper, RAdam, ranger
from fastai.optimizer import SGD as FastaiSGD
from fastai.vision.core import TensorImage
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from channelslast.core.memory_format import align_optimizer, convert, convert_module, convert_nested, group_by_memory, can_be_channels_last
from .helpers import Mixed, convnet

CL, CL3 = torch.channels_last, torch.channels_last_3d


def holds(check, examples, n):
    "Check this many examples, the same in every run."
    settings(max_examples=n, deadline=None, derandomize=True)(given(examples)(check))()


def is_last(t): return t.stride() == torch.empty(t.shape, memory_format={4: CL, 5: CL3}[t.dim()]).stride()


def holder(**shapes):
    "A module of an unknown type with parameters of these shapes."
    m = nn.Module()
    for name, shape in shapes.items(): m.register_parameter(name, nn.Parameter(torch.randn(shape)))
    return m


# tensors


@pytest.mark.parametrize('shape', [(2, 3, 4, 5), (8, 16, 1, 1), (8, 1, 3, 3), (1, 1, 1, 1), (8, 1, 1, 1), (0, 3, 4, 4),
                                   (2, 3, 4, 5, 6), (4, 8, 1, 1, 1), (4, 1, 3, 3, 3)])
def test_convert_gives_pytorchs_own_strides_and_back(shape):
    x = torch.randn(shape)
    last = convert(x)
    assert last.stride() == torch.empty(shape, memory_format=CL if len(shape) == 4 else CL3).stride()
    assert torch.equal(last, x) and convert(last) is last
    assert convert(last, False).stride() == x.stride() and convert(x, False) is x
    one_order = shape[1] == 1 or set(shape[2:]) == {1}
    assert not x.numel() or all((o.data_ptr() == x.data_ptr()) == one_order for o in (last, convert(convert(x), False)))


def test_a_converted_pointwise_weight_makes_the_output_channels_last():
    "`is_contiguous` is True for both formats of such a weight, but a contiguous image still comes out in channels last."
    conv = nn.Conv2d(8, 16, 1)
    convert_module(conv)
    assert conv(torch.randn(2, 8, 4, 4)).is_contiguous(memory_format=CL)


@pytest.mark.parametrize('x', [torch.randn(3, 4), torch.randn(2, 3, 4), torch.ones(2, 3, 4, 5, dtype=torch.int64), 'text',
                               None, torch.randn(1, 1, 2, 2, 2, 2), torch.eye(4).reshape(2, 2, 2, 2).to_sparse(),
                               torch.randn(2, 3, 4, 5, dtype=torch.complex64),
                               torch.nested.nested_tensor([torch.ones(3, 4, 4), torch.ones(3, 5, 5)]), nn.UninitializedParameter()], ids=range(10))
def test_convert_returns_what_cannot_be_channels_last_as_it_is(x):
    assert not can_be_channels_last(x) and convert(x) is x and convert(x, False) is x


def test_convert_to_contiguous_leaves_strides_that_are_not_channels_last():
    x = torch.randn(4, 5, 2, 3).permute(1, 0, 3, 2)
    assert convert(x, False) is x


def test_convert_nested_keeps_the_types_of_containers_and_tensors():
    pair, x, n = namedtuple('pair', 'a b'), torch.randn(2, 3, 4, 4), torch.ones(2)
    img = TensorImage(torch.randn(2, 3, 4, 4))
    img.img_size = (4, 4)
    out = convert_nested((x, [n, dict(a=img)], pair(n, x), 'text'))
    assert out[0].is_contiguous(memory_format=CL) and out[1][0] is n and type(out[2]) is pair
    converted = out[1][1]['a']
    assert type(converted) is TensorImage and converted.img_size == (4, 4) and converted.is_contiguous(memory_format=CL)
    clip = torch.randn(2, 3, 4, 4, 4)
    assert convert_nested(clip, {4}) is clip and convert_nested(clip, {5}) is not clip
    same = (n, [n])
    assert convert_nested(same) is same and convert_nested(out) is out


# modules

def test_convert_module_with_convolutions_of_all_dimensions_converts_each_once():
    "`model.to(memory_format=torch.channels_last)` raises `required rank 4 tensor` here."
    m = Mixed()
    with pytest.raises(RuntimeError): Mixed().to(memory_format=CL)
    ids = [id(p) for p in m.parameters()]
    m(torch.randn(2, 3, 8, 8)).sum().backward()
    m.register_buffer('b', torch.randn(2, 3, 4, 4)); m.register_buffer('i', torch.ones(2, 3, 4, 4, dtype=torch.int64))
    convert_module(m)
    assert m.c3.weight.is_contiguous(memory_format=CL3) and m.c2.weight.is_contiguous(memory_format=CL)
    assert m.c1.weight.is_contiguous() and m.b.is_contiguous(memory_format=CL) and m.i.is_contiguous()
    assert all(p.grad.stride() == p.stride() for p in m.parameters())
    assert ids == [id(p) for p in m.parameters()]
    ptrs = [t.data_ptr() for p in m.parameters() for t in (p, p.grad)]
    convert_module(m)
    assert ptrs == [t.data_ptr() for p in m.parameters() for t in (p, p.grad)]


@pytest.mark.parametrize('share', ['parameter', 'memory'])
def test_tied_weights_stay_tied_when_converted_and_back(share):
    m = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    if share == 'parameter': m[1].weight = m[0].weight
    else: m[1].weight.data = m[0].weight.data
    for last in True, False:
        convert_module(m, last)
        assert m[0].weight.data_ptr() == m[1].weight.data_ptr()


class Tied(nn.Module):
    "A convolution and another layer whose weights share memory, as `tie` makes them. Both are used."
    def __init__(self, tie, conv):
        super().__init__()
        self.conv, self.flat = conv, nn.Linear(1, 1)
        self.first, self.bn = nn.Conv2d(3, self.conv.in_channels, 3, bias=False), nn.BatchNorm2d(self.conv.in_channels)
        self.double()
        self.flat.weight.data = tie(self.conv)
        self.flat.bias.data = self.flat.weight.new_zeros(len(self.flat.weight))
    def forward(self, x):
        x = self.conv(self.bn(self.first(x)))
        w = self.flat.weight.flatten(1)
        return torch.cat([x.mean((2, 3)).flatten(), nn.functional.linear(x.flatten()[:w.shape[1]], w, self.flat.bias)])


def from_matrix(conv, each=1):
    "The reverse: some rows of a matrix become the convolution's weight."
    w = torch.randn(4*conv.out_channels, conv.in_channels, dtype=conv.weight.dtype)/10
    conv.weight.data = w[conv.out_channels::each, :, None, None][:conv.out_channels]
    return w


def tied(tie, *args, **kwargs): return lambda: Tied(tie, nn.Conv2d(*args, **kwargs))


TIES = dict(
    view=tied(lambda c: c.weight.data.view(6, 4), 4, 6, 1), transposed=tied(lambda c: c.weight.data.view(6, 4).t(), 4, 6, 1),
    part=tied(lambda c: c.weight.data.view(6, 4)[1:3], 4, 6, 1), column=tied(lambda c: c.weight.data.view(6, 4)[:, 1:2], 4, 6, 1),
    kernel=tied(lambda c: c.weight.data[2:], 4, 6, 1), rows=tied(from_matrix, 4, 6, 1),
    cubic=tied(lambda c: c.weight.data[..., None], 4, 6, 1), depthwise=tied(lambda c: c.weight.data.view(4, 9), 4, 4, 3, groups=4))
TORN = dict(
    view=tied(lambda c: c.weight.data.view(6, 36), 4, 6, 3), kernel=tied(lambda c: c.weight.data[2:], 4, 6, 3),
    transposed=tied(lambda c: c.weight.data.transpose(0, 1), 4, 4, 3), pointwise=tied(lambda c: c.weight.data[:, :, :1, :1], 4, 6, 3),
    each_second_row=tied(partial(from_matrix, each=2), 4, 6, 1))
TIES |= {f'torn {k}': v for k, v in TORN.items()}


def overlap(m):
    "True if a change of either weight also changes the other one."
    a, b = m.conv.weight.data, m.flat.weight.data
    def _changes(t, other):
        for value in 1., 2.:
            t.fill_(value)
            if not (other == value).any(): return False
        return True
    return _changes(a, b) and _changes(b, a)


@pytest.mark.parametrize('name', TIES)
def test_weights_of_two_shapes_in_one_memory_stay_tied_and_keep_their_values(name):
    "A converted copy of the convolution's weight would no longer be tied. Reordering in place would mix up the other weight's values."
    m, torn = TIES[name](), name.startswith('torn')
    weights = lambda: [(t.data_ptr(), t.stride(), t.tolist()) for t in (m.conv.weight, m.flat.weight)]
    before = weights()
    assert convert_module(m) and is_last(m.first.weight) and is_last(m.conv.weight) != torn
    assert [o[::2] for o in weights()] == [o[::2] for o in before]
    assert not torn or weights() == before
    assert convert_module(m, False) and weights() == before
    convert_module(m)
    assert overlap(m)


TIED_OPTIMIZERS = dict(sgd=partial(torch.optim.SGD, momentum=0.9), adam=torch.optim.Adam, adam_fused=partial(torch.optim.Adam, fused=True),
                       adam_foreach=partial(torch.optim.Adam, foreach=True), fastai_sgd=partial(FastaiSGD, mom=0.9), fastai_adam=Adam)


@pytest.mark.parametrize('optimizer', TIED_OPTIMIZERS)
@pytest.mark.parametrize('name', TIES)
def test_tied_weights_train_as_without_a_switch(name, optimizer):
    runs = []
    for switch in False, True:
        torch.manual_seed(0)
        m, x = TIES[name](), torch.randn(4, 3, 6, 6, dtype=torch.float64)
        opt = TIED_OPTIMIZERS[optimizer](list(m.parameters()), lr=1e-3)
        for to_last in False, True, False:
            if switch: convert_module(m, to_last); align_optimizer(opt)
            for _ in range(2): step(m, opt, x)
        runs.append([p.detach().clone() for p in m.parameters()])
        assert overlap(m)
    for a, b in zip(*runs): torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize('dtype', [torch.float32, torch.int32, torch.int8])
def test_a_weight_in_the_memory_of_a_buffer_of_any_dtype_stays_there(dtype):
    m = nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 3))
    for c in m: c.register_buffer('raw', c.weight.data.view(-1).view(dtype))
    ptrs = [c.weight.data_ptr() for c in m]
    convert_module(m)
    assert [is_last(c.weight) for c in m] == [True, False] and ptrs == [c.weight.data_ptr() for c in m]


def test_a_kernel_that_two_modules_hold_is_converted_for_both():
    "A kernel converted for its convolution is also converted for another module that holds it, so they stay tied."
    h = holder(kernel=(4, 3, 3, 3, 3))
    m = nn.Sequential(h, nn.Conv3d(3, 4, 3), nn.Conv2d(3, 4, 3))
    h.kernel.data = m[1].weight.data
    convert_module(m)
    assert is_last(h.kernel) and h.kernel.data_ptr() == m[1].weight.data_ptr()


def test_slices_of_one_storage_are_converted_separately():
    "Flat optimizers keep all parameters in one storage, but no two parameters share memory."
    m = convnet()
    want = [p.detach().clone() for p in m.parameters()]
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(m.parameters()), m.parameters())
    assert len({p.untyped_storage().data_ptr() for p in m.parameters()}) == 1
    convert_module(m)
    assert all(is_last(p) for p in m.parameters() if p.dim() == 4)
    for a, b in zip(m.parameters(), want): assert torch.equal(a, b)


VIEWS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5)), max_size=7)


def check_groups(views):
    "Two tensors are in one group only if a chain of overlapping memory ranges links them."
    base = [torch.zeros(64), torch.zeros(64)]
    ts = [base[i % 2].as_strided((n, n), (s, s), start) for i, (start, n, s, _) in enumerate(views)]
    span = lambda t: {*range(t.data_ptr(), t.data_ptr() + 4*(1 + sum((n - 1)*s for n, s in zip(t.shape, t.stride()))))}
    want = []
    for t in ts:
        linked = [g for g in want if any(span(t) & span(o) for o in g)]
        want = [g for g in want if not any(g is o for o in linked)] + [[t, *(o for g in linked for o in g)]]
    ids = lambda groups: {frozenset(map(id, g)) for g in groups}
    odd = [torch.empty(0, 3), torch.empty(0, 3), torch.empty(2, device='meta'), torch.eye(3).to_sparse(), nn.UninitializedParameter()]
    assert ids(group_by_memory([*ts, *odd, *ts])) == ids(want + [[t] for t in odd])


def test_group_by_memory_groups_tensors_that_overlap(): holds(check_groups, VIEWS, 40)


@pytest.mark.slow
def test_group_by_memory_groups_tensors_that_overlap_in_many_examples(): holds(check_groups, VIEWS, 1000)


def test_the_gradient_of_a_pointwise_weight_keeps_its_memory():
    "A gradient may be part of a bucket, as in `DistributedDataParallel`."
    conv = nn.Conv2d(4, 6, 1)
    conv.weight.grad = torch.randn(30)[6:].view(6, 4, 1, 1)
    ptr, value = conv.weight.grad.data_ptr(), conv.weight.grad.clone()
    convert_module(conv)
    assert conv.weight.grad.data_ptr() == ptr and is_last(conv.weight.grad) and torch.equal(conv.weight.grad, value)


def test_sharded_weights_are_converted_and_back():
    "`as_strided` raises for sharded weights, which have no memory of their own."
    dist = torch.distributed
    if not dist.is_available(): pytest.skip('no torch.distributed')
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        m, mesh = nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 3)), init_device_mesh('cpu', (1,))
        for c in m: c.weight = nn.Parameter(distribute_tensor(c.weight.data, mesh, [Shard(0)]))
        for to_last in True, False:
            convert_module(m, to_last)
            assert [is_last(c.weight) for c in m] == [to_last]*2
    finally: dist.destroy_process_group()


def test_unusual_parameters_are_converted():
    "Parameters in half precision, frozen, empty, on the meta device, and overlapping themselves."
    m = nn.Module()
    m.h = nn.Parameter(torch.randn(2, 3, 4, 4, dtype=torch.float16), requires_grad=False)
    m.e = nn.Parameter(torch.empty(0, 3, 4, 4))
    m.m, m.m2 = nn.Parameter(torch.empty(2, 3, 4, 4, device='meta')), nn.Parameter(torch.empty(2, 3, 4, 4, device='meta'))
    m.o = nn.Parameter(torch.randn(3, 1, 1).expand(2, 3, 4, 4), requires_grad=False)
    m.lazy = nn.LazyConv2d(3, 3)
    convert_module(m)
    assert all(p.is_contiguous(memory_format=CL) for p in (m.h, m.m, m.m2, m.o)) and m.m is not m.m2


CONVS = {1: (nn.Conv1d, nn.ConvTranspose1d, nn.LazyConv1d), 2: (nn.Conv2d, nn.ConvTranspose2d, nn.LazyConv2d),
         3: (nn.Conv3d, nn.ConvTranspose3d, nn.LazyConv3d)}


@pytest.mark.parametrize('kind', [0, 1, 2], ids=['plain', 'transposed', 'lazy'])
@pytest.mark.parametrize('dims,converted', [([1], ''), ([2], 'kernel'), ([3], 'bank'), ([1, 2], 'kernel'), ([1, 3], 'bank'),
                                            ([3, 2], 'kernel'), ([3, 2, 1], 'kernel')], ids=str)
def test_parameters_of_other_modules_are_converted_if_they_have_the_dimensions_of_the_models_kernels(kind, dims, converted):
    "A bank has one more dimension than a kernel, so a 1-D network's bank is not taken for 2-D kernels."
    h, args = holder(kernel=(4, 3, 3, 3), bank=(5, 4, 3, 3, 3)), (3,) if kind == 2 else (3, 3)
    convs = [CONVS[d][kind](*args, kernel_size=3) for d in dims]
    m = nn.DataParallel(nn.Sequential(*convs, h))
    convert_module(m)
    assert [k for k, p in h.named_parameters() if is_last(p)] == ([converted] if converted else [])
    if kind < 2: assert all(is_last(c.weight) for c in convs if c.weight.dim() in (4, 5))
    convert_module(m, False)
    assert all(p.is_contiguous() for p in m.parameters() if not nn.parameter.is_lazy(p))


@pytest.mark.parametrize('shapes,converted', [
    (dict(kernel=(4, 3, 3, 3)), {'kernel'}), (dict(bank=(4, 3, 3, 3, 3)), set()),
    (dict(kernel=(4, 3, 3, 3), bank=(5, 4, 3, 3, 3)), {'kernel'}), (dict(kernel=(4, 3, 1, 1), table=(1, 4, 8, 8)), {'kernel', 'table'}),
    (dict(linear=(4, 3), table=(1, 4, 8, 8)), set()), (dict(bank=(4, 3, 3, 3, 3), table=(1, 4, 8, 8)), set())],
    ids=['2-D', 'bank', '2-D and a bank', '2-D and a table', 'linear and a table', 'bank and a table'])
def test_without_convolution_modules_the_parameters_decide_what_is_converted(shapes, converted):
    "They pass their kernels to `F.conv2d`. A table that is added to a batch is not a kernel. Five dimensions may be a bank that `view` takes apart."
    m = nn.Sequential(holder(**shapes), nn.Linear(3, 4))
    m.register_buffer('mean', torch.randn(1, 3, 1, 1))
    convert_module(m)
    assert {k for k, p in m[0].named_parameters() if p.dim() > 2 and is_last(p)} == converted


def pruned(c): return prune.random_unstructured(c, 'weight', 0.5)


@pytest.mark.parametrize('wrap', [weight_norm, parametrizations.weight_norm, spectral_norm, parametrizations.spectral_norm, pruned],
                         ids=lambda f: f'{f.__module__}.{f.__name__}')
def test_tensors_from_which_a_weight_is_computed_are_converted(wrap):
    "They count as their convolution's, even if other convolutions have fewer dimensions."
    m = nn.Sequential(*(wrap(c(3, 4, 3)) for d in (1, 2, 3) for c in CONVS[d][:2]))
    before = {k: t.stride() for k, t in (*m.named_parameters(), *m.named_buffers())}
    convert_module(m)
    found = [t for t in (*m.parameters(), *m.buffers()) if t.dim() in (4, 5)]
    assert len(found) >= 4 and all(map(is_last, found))
    convert_module(m, False)
    assert before == {k: t.stride() for k, t in (*m.named_parameters(), *m.named_buffers())}


class Dynamic(nn.Conv2d):
    "A convolution whose kernel is mixed from a bank, read with `view`."
    def __init__(self, i, o, k, n=3):
        super().__init__(i, o, k)
        self.bank, self.attend = nn.Parameter(torch.randn(n, o, i, k, k)), nn.Linear(i, n)
        self.kernel_size = k  # its own forward needs no tuple
    def forward(self, x):
        w = self.attend(x.mean((0, 2, 3))).softmax(0) @ self.bank.view(len(self.bank), -1)
        return nn.functional.conv2d(x, self.weight + w.view_as(self.weight), self.bias)


class Clips(nn.Module):
    "A 3-D convolution, then a dynamic 2-D one over its frames."
    def __init__(self): super().__init__(); self.c3, self.c2 = nn.Conv3d(3, 4, 3, padding=1), Dynamic(4, 8, 3)
    def forward(self, x): return self.c2(self.c3(x[:, :, None]).mean(2))


@pytest.mark.parametrize('make', [lambda: Dynamic(3, 4, 3), Clips], ids=['2-D', '3-D and 2-D'])
def test_a_bank_of_kernels_read_with_view_still_runs(make):
    "A converted bank would raise in `view`."
    m, x = make().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    want = m(x)
    convert_module(m)
    torch.testing.assert_close(m(x), want)
    assert all(is_last(c.weight) for c in m.modules() if isinstance(c, (nn.Conv2d, nn.Conv3d)))


def test_a_scripted_module_is_converted():
    m = torch.jit.script(convnet())
    convert_module(m)
    assert all(is_last(p) for p in m.parameters() if p.dim() == 4)


layers = st.deferred(lambda: st.one_of(
    st.builds(lambda d, i, o, k: (nn.Conv1d, nn.Conv2d, nn.Conv3d)[d](i, o, k), st.integers(0, 2), st.integers(1, 3),
              st.integers(1, 3), st.integers(1, 3)),
    st.builds(lambda d, n: (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[d](n), st.integers(0, 2), st.integers(1, 3)),
    st.builds(nn.Linear, st.integers(1, 3), st.integers(1, 3)),
    st.lists(layers, max_size=4).map(lambda ls: nn.Sequential(*ls))))


def check_round_trip(m):
    "Converting to channels last and back keeps each value, stride and identity."
    for p in m.parameters(): p.grad = torch.randn_like(p)
    tensors = lambda: [t for p in m.parameters() for t in (p, p.grad)] + list(m.buffers())
    before = [(id(t), t.stride(), t.detach().clone()) for t in tensors()]
    convert_module(m)
    assert all(t.is_contiguous(memory_format={4: CL, 5: CL3}.get(t.dim(), torch.contiguous_format)) for t in tensors())
    assert all(p.grad.stride() == p.stride() for p in m.parameters())
    convert_module(m, False)
    for t, (i, stride, value) in zip(tensors(), before):
        assert id(t) == i and t.stride() == stride and torch.equal(t, value)


def test_a_module_converted_and_back_is_as_before(): holds(check_round_trip, layers, 20)


@pytest.mark.slow
def test_a_module_converted_and_back_is_as_before_in_many_examples(): holds(check_round_trip, layers, 300)


# optimizers

def wrap(opt, **kwargs): return partial(OptimWrapper, opt=partial(opt, **kwargs))

OPTIMIZERS = dict(
    adamw=wrap(torch.optim.AdamW), adamw_fused=wrap(torch.optim.AdamW, fused=True),
    adamw_foreach=wrap(torch.optim.AdamW, foreach=True), amsgrad=wrap(torch.optim.Adam, amsgrad=True),
    sgd_fused=wrap(torch.optim.SGD, momentum=0.9, fused=True), sgd=wrap(torch.optim.SGD, momentum=0.9),
    rmsprop=wrap(torch.optim.RMSprop, momentum=0.9), adagrad=wrap(torch.optim.Adagrad), fastai_adam=Adam,
    fastai_sgd=partial(FastaiSGD, mom=0.9), radam=RAdam, lamb=Lamb, ranger=ranger)


def step(m, opt, x):
    opt.zero_grad()
    m(x).square().sum().backward()
    opt.step()


def states(opt):
    opt = getattr(opt, 'opt', opt)
    return [(p, s) for p in opt.state for s in opt.state[p].values() if isinstance(s, torch.Tensor) and s.shape == p.shape]


@pytest.mark.parametrize('name', OPTIMIZERS)
@pytest.mark.parametrize('load', [False, True], ids=['switched', 'loaded'])
def test_an_aligned_optimizer_trains_as_without_a_switch(name, load):
    """Without `align_optimizer`, fused AdamW is off by 5e-2 here. Two contiguous, two channels-last and two contiguous
    steps are compared with six contiguous ones, in float64, so that Adam can't amplify rounding errors."""
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    base = convnet().double()
    runs = []
    for switch in False, True:
        m = deepcopy(base)
        opt = OPTIMIZERS[name](list(m.parameters()), lr=1e-2)
        for to_last in False, True, False:
            saved = deepcopy(opt.state_dict())
            if switch:
                convert_module(m, to_last)
                if load: opt.load_state_dict(saved)  # saved in the other format
                align_optimizer(opt)
                assert all(s.stride() == p.stride() for p, s in states(opt))
            for _ in range(2): step(m, opt, x)
        runs.append([p.detach() for p in m.parameters()])
    for a, b in zip(*runs): torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_align_optimizer_aligns_lookaheads_slow_weights():
    m = convnet()
    opt = ranger(list(m.parameters()), lr=1e-2)
    step(m, opt, torch.randn(4, 3, 8, 8))
    convert_module(m); align_optimizer(opt)
    assert [s.stride() for pg in opt.slow_weights for s in pg] == [p.stride() for p in m.parameters()]


def test_align_optimizer_keeps_identity_values_scalars_and_dtypes():
    "The identity of state, scalars, and dtypes other than the parameter's stay. `None` is accepted."
    p = nn.Parameter(torch.randn(2, 3, 4, 4))
    opt = torch.optim.SGD([p], lr=1)
    a, b, n = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.ones(2, 3, 4, 4, dtype=torch.uint8), torch.tensor(3.)
    opt.state[p] = dict(a=a, more=[b], step=n, none=None)
    value = a.clone()
    p.data = convert(p.data)
    align_optimizer(opt)
    s = opt.state[p]
    assert s['a'] is a and s['more'][0] is b and s['step'] is n and torch.equal(a, value)
    assert a.stride() == b.stride() == p.stride() and a.dtype == torch.float64 and b.dtype == torch.uint8
    align_optimizer(None)
    opt.opt = 'a name'
    align_optimizer(opt)


def test_align_optimizer_drops_8_bit_state_that_cannot_be_reordered_and_warns_once():
    "bitsandbytes keeps one scale per block of memory. Moved elements would get the scales of other blocks."
    convs = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 8)
    opt = torch.optim.SGD([p for m in convs for p in m.parameters()], lr=0.1)
    for p in opt.param_groups[0]['params']:
        opt.state[p] = dict(step=3, state1=torch.zeros_like(p, dtype=torch.uint8), absmax1=torch.ones(1), qmap1=torch.ones(256))
    model = nn.ModuleList(convs)
    convert_module(model)
    with pytest.warns(UserWarning, match='8-bit') as warned: align_optimizer(opt)
    assert len(warned) == 1 and not opt.state[convs[0].weight] and all(len(opt.state[p]) == 4 for p in list(model.parameters())[1:])
    opt.state[convs[0].weight] = dict(mask=torch.arange(8*8*9).remainder(7).to(torch.uint8).view(8, 8, 3, 3))
    was = opt.state[convs[0].weight]['mask'].clone()
    align_optimizer(opt)  # a mask has no blocks
    mask = opt.state[convs[0].weight]['mask']
    assert mask.stride() == convs[0].weight.stride() and torch.equal(mask, was)


def test_align_optimizer_leaves_state_of_other_tensor_types():
    class Blocks(torch.Tensor): pass
    conv = nn.Conv2d(8, 8, 3)
    opt = torch.optim.SGD(conv.parameters(), lr=0.1)
    opt.state[conv.weight] = dict(momentum=torch.zeros(8, 8, 3, 3).as_subclass(Blocks))
    convert_module(conv); align_optimizer(opt)
    assert opt.state[conv.weight]['momentum'].is_contiguous()
