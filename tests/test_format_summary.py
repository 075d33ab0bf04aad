"`format_summary`: which modules lose channels last, in which pass, and how many bytes that moves; nothing changes."
import re
from collections import defaultdict
from functools import cache, partial

import pytest
import torch
import torchvision.models as tv
from fastai.vision.all import (ConvLayer, CrossEntropyLossFlat, DataLoader, DataLoaders, DynamicUnet, Hook, Learner, OptimWrapper,
                               unet_learner, xresnet18)
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader as TorchDL

from channelslast import ChannelsLast, FormatSummary
from channelslast.summary.format_trace import Conversion, layout_of
from .helpers import Bomb, convnet, difference, find, learner, learner_state, loaders

CL = {4: torch.channels_last, 5: torch.channels_last_3d}


def head(c): return [nn.Flatten(), nn.Linear(c, 4)]


def between(layer, c=8, conv=nn.Conv2d, pool=nn.AdaptiveAvgPool2d):
    "A layer between two convolutions."
    return nn.Sequential(conv(3, 8, 3, padding=1), layer, conv(c, 8, 3, padding=1), nn.ReLU(), pool(1), *head(8))


def summary_of(model, shape=(3, 16, 16), n=2):
    "The summary of a step on a batch of two, in channels last, fp32."
    ds = [(torch.randn(shape), torch.tensor(i % 4)) for i in range(n)]
    dl = DataLoader(ds, bs=n)
    learn = Learner(DataLoaders(dl, dl, device=torch.device('cpu')), model, CrossEntropyLossFlat())
    return learn.to_channelslast(to_fp16=False).format_summary()


def lost(s, backward): return [(r.module, r.op) for r in s.lost if r.backward == backward]


# architectures, checked by hooks

class MainOutput(nn.Module):
    "A segmentation model's main output."
    def __init__(self, m): super().__init__(); self.m = m
    def forward(self, x): return self.m(x)['out'].mean((2, 3))


get = partial(tv.get_model, weights=None, num_classes=4)
# exact number of forward losses, maximum number of backward losses, shape of the images
ARCHITECTURES = dict(
    resnet18=(partial(get, 'resnet18'), 0, 0, (3, 32, 32)), densenet121=(partial(get, 'densenet121'), 0, 0, (3, 32, 32)),
    regnet=(partial(get, 'regnet_y_400mf'), 0, 0, (3, 32, 32)), mnasnet=(partial(get, 'mnasnet0_5'), 0, 0, (3, 64, 64)),
    googlenet=(partial(get, 'googlenet', aux_logits=False, init_weights=False), 0, 0, (3, 64, 64)),
    squeezenet=(partial(get, 'squeezenet1_1'), 0, 0, (3, 32, 32)),
    vit=(partial(get, 'vit_b_32', image_size=64), 0, 0, (3, 64, 64)), swin=(partial(get, 'swin_t'), 0, 0, (3, 64, 64)),
    r3d=(partial(get, 'r3d_18'), 0, 0, (3, 4, 32, 32)),
    efficientnet=(partial(get, 'efficientnet_b0'), 0, 1, (3, 64, 64)), mobilenet=(partial(get, 'mobilenet_v3_small'), 0, 1, (3, 64, 64)),
    convnext=(partial(get, 'convnext_tiny'), 0, 6, (3, 64, 64)),
    shufflenet=(partial(get, 'shufflenet_v2_x0_5'), 16, 16, (3, 64, 64)), vgg=(partial(get, 'vgg11_bn'), 1, 0, (3, 64, 64)),
    maxvit=(lambda: tv.MaxVit((112, 112), 16, 7, [16, 16], [2, 2], 8, 0.1, num_classes=4), 4, 20, (3, 112, 112)),
    deeplab=(lambda: MainOutput(tv.segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)), 1, 9, (3, 64, 64)),
    attention=(partial(xresnet18, n_out=4, sa=True), 3, 6, (3, 32, 32)),
    instance_norm=(lambda: between(nn.InstanceNorm2d(8)), 1, 1, (3, 16, 16)),
    instance_norm_3d=(lambda: between(nn.InstanceNorm3d(8), conv=nn.Conv3d, pool=nn.AdaptiveAvgPool3d), 1, 1, (3, 4, 8, 8)),
    softmax=(lambda: between(nn.Softmax2d()), 1, 1, (3, 16, 16)),
    fractional=(lambda: between(nn.FractionalMaxPool2d(2, output_ratio=.5)), 1, 1, (3, 16, 16)),
    bicubic=(lambda: between(nn.Upsample(scale_factor=2, mode='bicubic')), 0, 1, (3, 16, 16)),
    glu=(lambda: between(nn.GLU(1), 4), 0, 1, (3, 16, 16)), lrn=(lambda: between(nn.LocalResponseNorm(2)), 0, 2, (3, 16, 16)),
    layer_norm=(lambda: between(LayerNorm2d(8)), 0, 0, (3, 16, 16)))


FAST = {'resnet18', 'efficientnet', 'shufflenet', 'attention', 'instance_norm', 'instance_norm_3d', 'softmax', 'fractional', 'bicubic', 'glu', 'lrn',
        'layer_norm'}


class LayerNorm2d(nn.LayerNorm):
    "As in ConvNeXt: views only."
    def forward(self, x): return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FormatHooks:
    "An independent check: hooks call `is_contiguous` on each module's inputs and outputs and on the gradients."
    def __init__(self, model):
        self.leaf_lost, self.grad_lost, self.outs, self.ins = set(), set(), {}, defaultdict(list)
        self.names = {m: n for n, m in model.named_modules()}
        self.handles = [h for m in self.names for h in (m.register_forward_pre_hook(self.before), m.register_forward_hook(self.after))]

    @staticmethod
    def plain(t):
        "True if channels last, False if contiguous, None if both are the same or `t` is a slice."
        if not isinstance(t, torch.Tensor) or t.dim() not in CL or t.shape[1] == 1 or t[0, 0].numel() == 1: return None
        if t.is_contiguous(memory_format=CL[t.dim()]): return True
        return False if t.is_contiguous() else None

    def before(self, m, args):
        self.ins[self.names[m]] += [self.plain(a) for a in args]
        if len(list(m.children())): return
        for a in args:
            if isinstance(a, torch.Tensor) and a.requires_grad: a.register_hook(partial(self.grad, self.names[m], 'in'))

    def after(self, m, args, out):
        n, o = self.names[m], self.plain(out)
        self.outs[n] = o
        if len(list(m.children())): return
        def _memory(t): return t.untyped_storage().data_ptr()
        own = isinstance(out, torch.Tensor) and all(_memory(out) != _memory(a) for a in args if isinstance(a, torch.Tensor))
        if any(self.plain(a) for a in args) and o is False and own: self.leaf_lost.add(n)
        if isinstance(out, torch.Tensor) and out.requires_grad: out.register_hook(partial(self.grad, n, 'out'))

    def grad(self, name, side, g):
        if side == 'out': self.last = name if self.plain(g) else None
        elif self.plain(g) is False and getattr(self, 'last', None) == name: self.grad_lost.add(name)


@cache
def checked(name) -> tuple: # The model, what its hooks read, the summary
    model = ARCHITECTURES[name][0]()
    hooks = FormatHooks(model)
    s = summary_of(model, ARCHITECTURES[name][3])
    for h in hooks.handles: h.remove()
    return model, hooks, s


def is_inside(name, parent): return name != parent and (not parent or name.startswith(f'{parent}.'))


@pytest.mark.parametrize('name', [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES])
def test_format_summary_of_an_architecture_agrees_with_hooks_on_its_modules(name):
    (_, forward, backward, _), (model, r, s) = ARCHITECTURES[name], checked(name)
    assert len(lost(s, False)) == forward and len(lost(s, True)) <= backward and s.holds == (not s.lost)
    if backward and name != 'maxvit': assert lost(s, True) or name == 'deeplab'
    modules = dict(model.named_modules())
    leaves_of = {n for n, m in modules.items() if not len(list(m.children()))}
    rearranged = {n for n in leaves_of if n.endswith('partition_op')}  # windows keep channels innermost, which hooks can't see
    assert {o.module for o in s.lost if not o.backward and o.module in leaves_of and len(o.shape) > 3} - rearranged == r.leaf_lost - rearranged
    for n in {n for n, _ in lost(s, False)} - leaves_of: # lost in a function of its forward: an input or a child's output is channels last, the result is not
        inside = [c for c in modules if is_inside(c, n)]
        assert True in r.ins[n] or any(r.outs.get(c) for c in inside)
        assert r.outs[n] in (False, None) or any(False in r.ins[c] for c in inside)
    for n in modules: # the reverse: a loss that hooks see has a row
        inside = [c for c in modules if c == n or is_inside(c, n)]
        permutes = any(type(modules[c]).__name__ in ('Permute', 'WindowPartition', 'ASPPPooling') for c in inside)  # as above, or ambiguous at spatial size 1×1
        if n not in leaves_of and not permutes and r.ins[n] == [True] and r.outs[n] is False:
            assert any(m in inside for m, _ in lost(s, False)), n
    if not lost(s, True): assert not r.grad_lost
    assert r.grad_lost <= {n for n, _ in lost(s, True)} | {n for n in r.grad_lost if name in ('attention', 'deeplab', 'maxvit', 'shufflenet')}
    assert all(row.module in modules or row.module == 'loss' for row in s.rows)


@pytest.mark.parametrize('name, module, cls, op', [
    ('efficientnet', 'features.8.2', 'SiLU', 'aten.silu_backward'),
    pytest.param('mobilenet', 'features.12.2', 'Hardswish', 'aten.hardswish_backward', marks=pytest.mark.slow)])
def test_format_summary_of_a_torchvision_model_names_its_last_activation(name, module, cls, op):
    s = checked(name)[2]
    assert lost(s, True) == [(module, op)] and s.lost[0].cls == cls


def test_format_summary_of_shufflenet_names_the_copies_of_its_channel_shuffle():
    "The format is lost where the first shuffle of each stage copies a 5-D view of channels-last memory."
    s = checked('shufflenet')[2]
    for b in False, True: assert sum(op == 'aten.cat' for _, op in lost(s, b)) == 13
    assert [m for m, op in lost(s, False) if op == 'aten.clone'] == ['stage2.0', 'stage3.0', 'stage4.0']


def small_unet(dls):
    encoder = nn.Sequential(ConvLayer(3, 8, stride=2), ConvLayer(8, 16, stride=2))
    return Learner(dls, DynamicUnet(encoder, 2, (16, 16)), CrossEntropyLossFlat(axis=1))
def resnet_unet(dls): return unet_learner(dls, tv.resnet18, n_out=2, pretrained=False, normalize=False, loss_func=CrossEntropyLossFlat(axis=1))


@pytest.mark.parametrize('converts_batches', [True, False])
@pytest.mark.parametrize('make, size', [(small_unet, 16), pytest.param(resnet_unet, 64, marks=pytest.mark.slow)], ids=['small', 'resnet18'])
def test_format_summary_of_a_unet_leaves_its_hooks_and_names_every_module(make, size, converts_batches):
    "The last `cat` loses the format only while the batch is contiguous."
    ds = [(torch.randn(3, size, size), torch.randint(0, 2, (size, size))) for _ in range(2)]
    learn = make(DataLoaders(*[DataLoader(ds, bs=2)]*2))
    if converts_batches: learn.to_channelslast(to_fp16=False)
    else: learn.model.to(memory_format=torch.channels_last)
    def _stored(): return [id(m.hook.stored) for m in learn.model.modules() if isinstance(getattr(m, 'hook', None), Hook)]
    held = _stored()
    s = learn.format_summary()
    assert held and _stored() == held
    names = dict(learn.model.named_modules())
    assert all(r.module in names and r.cls == type(names[r.module]).__name__ for r in s.rows if r.module != 'loss')
    assert [(r.cls, r.op) for r in s.lost] == ([] if converts_batches else [('MergeLayer', 'aten.cat')]) and s.holds == converts_batches


# names

class Losing(nn.Module):
    "Loses channels last in the forward and in the backward pass."
    def forward(self, x): return Away.apply(x)


class Away(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.contiguous()
    @staticmethod
    def backward(ctx, g): return g.contiguous()


def conv(): return nn.Conv2d(8, 8, 3, padding=1)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.loses, self.b = conv(), Losing(), conv()
        self.again = self.loses
    def forward(self, x): return self.b(self.again(self.b(self.loses(self.a(x)))))


class Functional(nn.Module):
    def __init__(self): super().__init__(); self.c = conv()
    def forward(self, x): return self.c(x).contiguous()


class Checkpointed(nn.Module):
    def __init__(self, inner): super().__init__(); self.inner = inner
    def forward(self, x): return checkpoint(self.inner, x, use_reentrant=False)


def body(*ls): return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *ls, nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), *head(8))

PLANTED = dict(
    start=(lambda: body(Losing(), conv(), conv()), ['1']), middle=(lambda: body(conv(), Losing(), conv()), ['2']),
    end=(lambda: body(conv(), conv(), Losing()), ['3']),
    nested=(lambda: body(nn.Sequential(conv(), nn.ModuleDict(dict(x=Losing()))['x'], conv())), ['1.1']),
    shared=(lambda: body(Shared()), ['1.loses', '1.loses']), function=(lambda: body(Functional(), conv()), ['1']),
    two=(lambda: body(Losing(), conv(), Losing()), ['1', '3']))


@pytest.mark.parametrize('name', PLANTED)
def test_format_summary_names_the_module_that_loses_the_format(name):
    make, where = PLANTED[name]
    s = summary_of(make())
    assert [r.module for r in s.lost if not r.backward] == where
    if name != 'function': assert [r.module for r in s.lost if r.backward] == where[::-1]
    assert all(r.cls == ('Functional' if name == 'function' else 'Losing') for r in s.lost)


def test_format_summary_names_checkpointed_modules_in_the_backward_pass_too():
    "They run again there."
    s = summary_of(body(Checkpointed(nn.Sequential(conv(), Losing(), conv()))))
    assert [(r.module, r.backward) for r in s.lost] == [('1.inner.1', False), ('1.inner.1', True), ('1.inner.1', True)]


def test_format_summary_names_the_loss_function():
    ds = [(torch.randn(3, 8, 8), torch.randn(8, 8, 8)) for _ in range(2)]
    def loss(p, y): return (p.contiguous() - y).abs().mean()
    learn = Learner(DataLoaders(*[DataLoader(ds, bs=2)]*2), nn.Conv2d(3, 8, 3, padding=1), loss).to_channelslast(to_fp16=False)
    s = learn.format_summary()
    assert [(r.module, r.cls, r.op, r.backward) for r in s.lost] == [('loss', 'loss', 'aten.clone', False)]


# bytes

def test_bytes_of_conversions_are_as_computed_by_hand():
    """Batch 2×3×16×16 → conv → 2×8×16×16 → contiguous → conv, fp32: conversion of the batch 2·3·256·4 = 6144, lost 2·8·256·4
    = 16384, regained 16384; backward: the pooled gradient of 2×8×16×16 enters and is lost by `Losing` (the first
    convolution passes no gradient on)."""
    s = summary_of(body(Losing()))
    act = 2*8*16*16*4
    rows = [(r.kind, r.backward, r.shape, r.bytes) for r in s.rows]
    assert rows[:3] == [('entry', False, (2, 3, 16, 16), 2*3*256*4), ('lost', False, (2, 8, 16, 16), act),
                        ('regained', False, (2, 8, 16, 16), act)]
    assert rows[3:] == [('entry', True, (2, 8, 16, 16), act), ('lost', True, (2, 8, 16, 16), act)]
    assert s.bytes_moved == 6144 + 4*act and s.regained == [r for r in s.rows if r.kind == 'regained']


def test_bytes_in_half_precision_are_half_as_many(has):
    has('bf16')
    learn = learner(body(Losing()), loaders((3, 16, 16), bs=2)).to_channelslast(amp_mode='bf16')
    r = learn.format_summary().lost[0]
    assert r.bytes == 2*8*256*2


# which copies count

@pytest.mark.parametrize('x, layout', [
    (torch.randn(2, 3, 4, 5), 'other'), (torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), 'channels_last'),
    (torch.randn(2, 8, 4, 5).to(memory_format=torch.channels_last)[:, ::2, 1:], 'channels_last'),
    (torch.randn(1, 3, 4, 5).to(memory_format=torch.channels_last), 'channels_last'), (torch.randn(1, 3, 4, 5), 'other'),
    (torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d), 'channels_last'), (torch.randn(2, 3, 4, 5, 6), 'other'),
    (torch.randn(2, 1, 4, 5), None), (torch.randn(2, 3, 1, 1), None), (torch.randn(2, 3, 1, 1).expand(2, 3, 4, 5), None),
    (torch.randn(3, 4), None), (torch.ones(2, 3, 4, 5, dtype=torch.int64), None), (torch.randn(0, 3, 4, 5), None),
    (torch.randn(2, 3, 4, 1), 'other'), (torch.randn(60).as_strided((1, 3, 4, 5), (1, 1, 15, 3)), 'channels_last')],
    ids=lambda o: f'{tuple(o.shape)}' if isinstance(o, torch.Tensor) else str(o))
def test_layout_of_a_tensor_follows_its_strides(x, layout): assert layout_of(x) == layout


@pytest.mark.parametrize('f', [lambda x: x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2), lambda x: torch.cat([x[:, 4:], x[:, :4]], 1),
                               lambda x: x.unsqueeze(2).squeeze(2), lambda x: x * x.mean((2, 3), keepdim=True),
                               lambda x: x * x.mean(1, keepdim=True), lambda x: x + torch.arange(16.)],
                         ids=['permuted', 'shuffled slices', 'squeezed', 'spatial mean', 'channel mean', 'expanded'])
def test_views_and_ambiguous_shapes_are_no_losses(f):
    class F(nn.Module):
        def forward(self, x): return f(x)
    assert not [r for r in summary_of(body(F())).lost if not r.backward]


def test_contiguous_copies_of_weights_are_no_losses():
    "Weight standardization makes each weight and its gradient contiguous; activations keep their format."
    class WS(nn.Conv2d):
        def forward(self, x):
            w = self.weight.contiguous()
            w = (w - w.mean((1, 2, 3), keepdim=True)).contiguous()
            return self._conv_forward(x, w, self.bias)
    s = summary_of(body(WS(8, 8, 3, padding=1)))
    assert s.holds and not s.regained


def test_losses_are_found_in_a_batch_of_one(): assert summary_of(body(Losing()), n=1).lost and summary_of(body(conv()), n=1).holds


def test_writing_into_a_contiguous_tensor_is_a_loss():
    class Canvas(nn.Module):
        def forward(self, x):
            out = torch.zeros(x.shape)
            out[:, :4] = x[:, :4]
            return out
    assert ('1', 'aten.copy_') in lost(summary_of(body(Canvas())), False)


@pytest.mark.parametrize('f, seen', [
    (lambda x: nn.functional.layer_norm(x.flatten(2).transpose(1, 2), (8,)).transpose(1, 2).contiguous().view(x.shape), True),
    (lambda x: (x.flatten(2).transpose(1, 2) + 1).transpose(1, 2).contiguous().view(x.shape), True),
    (lambda x: nn.functional.gelu(x.flatten(2)).contiguous().view_as(x), True),
    (lambda x: torch.stack([o.relu() for o in x.unbind(0)]), False), (lambda x: x.view(2, 2, 4, 16, 16).sum(1).repeat(1, 2, 1, 1), False)],
    ids=['attention', 'addition in 3-D', 'gelu in 3-D', 'items', 'groups'])
def test_losses_in_tensors_that_are_not_4D_name_the_module_or_where_the_format_is_regained(f, seen):
    class F(nn.Module):
        def forward(self, x): return f(x)
    s = summary_of(body(F()))
    assert not s.holds and bool([r for r in s.lost if r.module == '1' and not r.backward]) == seen
    s = FormatSummary([r for r in s.rows if r.kind != 'lost'], s.counts)
    assert not s.holds and 'Channels last does not hold' in s.verdict and 'regained once in the forward pass, first in 2:' in s.verdict


# printed results

def test_remedies_for_CPUs_are_printed_on_CPUs_only():
    "PyTorch's group norm gives contiguous results on CUDA (`aten/src/ATen/native/group_norm.cpp`)."
    s = learner(nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.Conv2d(8, 8, 1), nn.Softmax2d(), nn.Conv2d(8, 4, 1),
                              nn.AdaptiveAvgPool2d(1), nn.Flatten())).to_channelslast(to_fp16=False).format_summary()
    assert s.device == 'cpu' and 'nn.GroupNorm' in repr(s) and 'movedim' in repr(s)
    s.device = 'cuda'
    assert 'nn.GroupNorm' not in repr(s) and 'movedim' in repr(s)


class Remedy(nn.Module):
    "The code of a printed remedy: a module, or statements on `x`, of which the last is the result."
    def __init__(self, code): super().__init__(); self.code, self.module = code, eval(code, dict(nn=nn, C=8)) if code.startswith('nn.') else None
    def forward(self, x):
        if self.module: return self.module(x)
        *statements, result = self.code.split('; ')
        names = dict(x=x)
        for o in statements: exec(o, names)
        return eval(result, names)


REPLACED = dict(InstanceNorm2d=(nn.InstanceNorm2d(8), 8, 2), InstanceNorm3d=(nn.InstanceNorm3d(8), 8, 3),
                Softmax2d=(nn.Softmax2d(), 8, 2), GLU=(nn.GLU(1), 4, 2))


@pytest.mark.parametrize('cls', REPLACED)
def test_a_printed_remedy_removes_the_loss_and_computes_the_same(cls):
    layer, c, d = REPLACED[cls]
    kw = dict(conv=nn.Conv3d, pool=nn.AdaptiveAvgPool3d) if d == 3 else {}
    x, shape = torch.randn(2, 8, *[6]*d), (3, *[6]*d)
    s = summary_of(between(layer, c, **kw), shape)
    remedy = Remedy(re.search(f'\n{cls}: `(.*?)` computes the same', repr(s))[1])
    assert s.lost and summary_of(between(remedy, c, **kw), shape).holds
    torch.testing.assert_close(layer(x), remedy(x))


def test_no_other_layer_of_PyTorch_has_a_remedy():
    layers = [k for k, v in vars(nn).items() if isinstance(v, type) and issubclass(v, nn.Module)]
    assert {c for c in layers if 'Remedies' in repr(FormatSummary(rows('a', cls=c), {False: [1, 9], True: [0, 0]}))} == {*REPLACED}


def rows(*names, **kw): return [Conversion(**{**dict(module=n, cls='Conv2d', op='aten.cat', backward=False, kind='lost',
                                                     shape=(1, 2, 3, 4), bytes=1000), **kw}) for n in names]


def test_the_table_groups_conversions_that_differ_only_in_numbers():
    s = FormatSummary(rows('layer1.0.conv2', 'layer1.1.conv2') + rows('stage2.0', 'stage3.1', bytes=9e6) + rows('x', kind='regained'),
                      {False: [10, 14], True: [3, 3]}, max_rows=2)
    lines = repr(s).splitlines()
    assert lines[0] == ('Channels last is lost 4 times (kept by 10 of 14 activations forward, 3 of 3 backward), all in Conv2d. '
                        '5 conversions move 18.0 MB per step.')
    assert 'stage*.* ×2' in lines[2] and '18.0 MB' in lines[2] and 'layer1.*.conv2 ×2' in lines[3]
    assert lines[4] == '… and 1 more row: `max_rows=3` shows all.' and len({len(o) for o in lines[1:4]}) == 1
    assert '<table' in s._repr_html_() and 'layer1.*.conv2' in s._repr_html_()
    assert list(s.to_frame().columns) == list(vars(s.rows[0])) and len(s.to_frame()) == 5
    assert repr(FormatSummary([], {False: [4, 4], True: [3, 3]})) == (
        'Channels last holds: 4 of 4 activations forward, 3 of 3 backward. 0 conversions move 0 B per step.')
    with pytest.raises(AttributeError): s.rows[0].bytes = 1


def test_remedies_are_under_the_table_once_per_class():
    "Also those of classes in hidden rows; nothing is wider than 160 characters."
    classes = dict(InstanceNorm2d=3, InstanceNorm3d=3, GLU=2, Softmax2d=1)
    s = FormatSummary([r for c, n in classes.items() for r in rows(*(f'{c}.a{"b"*i}' for i in range(n)), cls=c)], {False: [1, 9], True: [0, 0]}, max_rows=2)
    lines = repr(s).splitlines()
    assert [c for c in classes if sum(o.startswith(f'{c}: ') for o in lines[5:]) != 1] == [] and len(lines) == 10 and max(map(len, lines)) <= 160
    assert 'Remedies are under the table.' in lines[1] and lines[2].split() == ['module', 'class', 'op', 'pass', 'kind', 'shape', 'moved']
    page = s._repr_html_()
    assert page.count('<p>InstanceNorm2d: <code>nn.GroupNorm(C, C, affine=False)</code> computes the same') == 1 and 'Remedies are under the table.' in page
    assert page.index('</table>') < page.index('… and 7 more rows') < page.index('<p>InstanceNorm2d') and 'Remedies' not in s.verdict
    assert 'Remedies' not in repr(FormatSummary(rows('a'), s.counts))


def words(n): return '.'.join(['block' + 'x'*(n % 7)]*(n//6))


@pytest.mark.parametrize('texts', [dict(module=words(400)), dict(cls='C'*300), dict(op='aten.' + 'o'*200),
                                   dict(module=words(150), cls='C'*90, op='aten.' + 'o'*90), dict(shape=(1024,)*40),
                                   dict(module=words(400), kind='regained'), dict(cls='C'*300, kind='regained', module='m'*999)],
                         ids=['module', 'class', 'op', 'all three', 'shape', 'regained module', 'regained class'])
def test_no_line_is_wider_than_160_characters(texts):
    "Long texts lose their middle; `to_frame` keeps them whole."
    first = rows('a', 'b', cls='InstanceNorm2d') if 'kind' not in texts else []
    s = FormatSummary(first + [Conversion(**{**vars(r), **texts}) for r in rows('layer12', 'layer13')], {False: [1000, 10**6], True: [10**6, 10**6]},
                      ' Only the forward pass was traced: the batch has no labels.')
    lines = repr(s).splitlines()
    assert max(map(len, lines)) <= 160 and '…' in repr(s) and '…' in s._repr_html_()
    assert ('…' in s.verdict) == ('cls' in texts or 'kind' in texts)
    assert '×2' in repr(s) and len({len(o) for o in lines if ' kind ' in o or '1×2×3×4' in o}) == 1
    assert all(s.to_frame()[k].iloc[-1] == v for k, v in texts.items())


def test_a_module_name_that_fits_is_printed_whole():
    s = FormatSummary(rows('m'*80), {False: [1, 9], True: [0, 0]})
    assert 'm'*80 in repr(s) and 'm'*80 in s._repr_html_() and '…' not in repr(s)


@pytest.mark.parametrize('classes, where', [('A', 'lost once (kept by 1 of 9 activations forward, 0 of 0 backward), in A. '),
                                            ('AA', 'lost 2 times (kept by 1 of 9 activations forward, 0 of 0 backward), all in A. '),
                                            ('AAAB', ', mostly in A (3 of 4), B (1). '), ('AAABBCD', ', mostly in A (3 of 7), B (2), C (1). ')])
def test_the_verdict_counts_losses_by_class(classes, where):
    s = FormatSummary([r for c in classes for r in rows('m', cls=c)], {False: [1, 9], True: [0, 0]})
    assert where in s.verdict
    assert ('1 conversion moves 1.0 kB per step.' if len(classes) == 1 else f'{len(classes)} conversions move {len(classes)}.0 kB per step.') in s.verdict


def test_format_summary_of_a_contiguous_learner_says_to_switch_first():
    s = learner().format_summary()
    assert not s.holds and not s.rows and 'call `learn.to_channelslast()` first' in repr(s)


# nothing changes

class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g): raise ArithmeticError('boom')


ERRORS = dict(nowhere=None, model=RuntimeError, interrupt=KeyboardInterrupt, loss=ZeroDivisionError, backward=ArithmeticError)
CASES = [(w, a, o) for w in ERRORS for a in ('ours', 'fastai', None) for o in (None, 'fastai', 'torch')]
FAST_CASES = [('nowhere', 'ours', 'fastai'), ('nowhere', 'fastai', None), ('nowhere', None, 'torch'), ('model', 'ours', 'fastai'),
              ('model', 'fastai', 'fastai'), ('interrupt', None, None), ('interrupt', 'ours', 'torch'), ('loss', 'fastai', 'torch'), ('loss', 'ours', None),
              ('backward', 'ours', 'fastai'), ('backward', None, 'torch')]


@pytest.mark.parametrize('where, amp, opt', [o if o in FAST_CASES else pytest.param(*o, marks=pytest.mark.slow) for o in CASES])
def test_format_summary_leaves_everything_as_it_was_even_after_an_error(has, where, amp, opt):
    has('bf16')
    kw = dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)) if opt == 'torch' else {}
    learn, error = learner(Bomb(), loaders(shuffle=True), **kw), ERRORS[where]
    if opt:
        learn.fit(1)
        learn.model.c.weight.grad = torch.randn(8, 3, 3, 3)
    learn.model.bn.weight.requires_grad_(False)
    learn.add_cb(ChannelsLast())
    if amp == 'ours': learn.to_channelslast(amp_mode='bf16')
    if amp == 'fastai': # which works on CUDA only
        mp = learn.to_bf16().mixed_precision
        mp.before_fit = lambda: setattr(mp, 'autocast', torch.autocast('cpu')) or setattr(learn, 'scaler', torch.amp.GradScaler('cpu', enabled=False))
    if where in ('model', 'interrupt'): learn.model.arm(1, error)
    if where == 'loss': learn.loss_func = lambda p, y: 1/0
    if where == 'backward': learn.loss_func = lambda p, y: FailsBackward.apply(p.sum())
    torch.manual_seed(1)
    before = learner_state(learn)
    if error:
        with pytest.raises(error) as e: learn.format_summary()
        assert where == 'loss' or e.value.args == ('boom',)
    else: learn.format_summary()
    assert difference(before, learner_state(learn)) == ''
    learn.model.arm(0)
    learn.loss_func = CrossEntropyLossFlat()
    if amp != 'fastai': learn.fit(1)  # and it still trains


class Centre(nn.Module):
    "Tensors that are plain attributes, updated in place."
    def __init__(self): super().__init__(); self.n, self.center, self.d = convnet(), torch.zeros(4), dict(a=torch.zeros(4))
    def forward(self, x):
        out = self.n(x)
        self.center.add_(out.detach().mean(0)); self.d['a'].add_(1)
        return out


class PlainLoss:
    "Not a module, but with a parameter and a counter."
    def __init__(self): self.n, self.w = 0, nn.Parameter(torch.ones(1))
    def __call__(self, p, y): self.n += 1; return nn.functional.cross_entropy(p, y)*self.w


@pytest.mark.parametrize('call', [Learner.format_summary, partial(find, num_it=1)], ids=['format_summary', 'format_find'])
def test_plain_attributes_of_models_losses_and_generators_stay_as_they_were(call):
    g, ds = torch.Generator().manual_seed(0), [(torch.randn(3, 8, 8), i % 4) for i in range(16)]
    learn = Learner(DataLoaders(*[TorchDL(ds, batch_size=4, shuffle=True, generator=g)]*2), Centre(), PlainLoss(), cbs=ChannelsLast())
    state = g.get_state()
    call(learn)
    assert torch.equal(g.get_state(), state) and not learn.model.center.any() and not learn.model.d['a'].any()
    assert learn.loss_func.n == 0 and learn.loss_func.w.grad is None


# models, batches and Learners of all kinds

class Dict(nn.Module):
    def __init__(self): super().__init__(); self.c = convnet()
    def forward(self, x, n=None): return dict(out=self.c(x), aux=(x,))


def test_format_summary_with_several_inputs_and_dict_outputs():
    ds = [(torch.randn(3, 8, 8), torch.ones(3), torch.tensor(i % 4)) for i in range(4)]
    dl = DataLoader(ds, bs=2, n_inp=2)
    dls = DataLoaders(dl, dl)
    dls.n_inp = 2
    learn = Learner(dls, Dict(), lambda p, y: nn.functional.cross_entropy(p['out'], y), cbs=ChannelsLast())
    assert learn.format_summary().holds


def test_format_summary_of_a_batch_without_labels_traces_the_forward_pass_only():
    learn = learner().to_channelslast(to_fp16=False)
    x, y = torch.randn(5, 3, 8, 8), torch.zeros(5, dtype=torch.int64)
    assert learn.format_summary((x, y)).rows[0].shape == (5, 3, 8, 8)
    s = learn.format_summary((x,))
    assert s.counts[True] == [0, 0] and 'Only the forward pass was traced: the batch has no labels' in s.verdict
    assert learn.format_summary(x).counts == s.counts
    no_labels = learner(dls=DataLoaders(*[DataLoader([(torch.randn(3, 8, 8),) for _ in range(4)], bs=2)]*2)).to_channelslast(to_fp16=False)
    assert 'Only the forward pass' in no_labels.format_summary().verdict


@pytest.mark.parametrize('compiled', ['model', 'part', 'in place'])
def test_format_summary_of_a_compiled_model_runs_it_uncompiled(compiled):
    plain, calls = convnet(), []
    def backend(gm, inputs):
        calls.append(1)
        return gm.forward
    if compiled == 'model': m = torch.compile(plain, backend=backend)
    if compiled == 'part': m = nn.Sequential(torch.compile(plain[:3], backend=backend), plain[3:])
    if compiled == 'in place': m = plain; m.compile(backend=backend)
    learn = learner(m).to_channelslast(to_fp16=False)
    s = learn.format_summary()
    assert s.holds and not calls and learn.model is m
    assert ('uncompiled' in s.verdict) == (compiled == 'model') and not any('_orig_mod' in r.module for r in s.rows if compiled == 'model')


def test_format_summary_with_a_PyTorch_loader_and_frozen_layers():
    ds = [(torch.randn(3, 8, 8), i % 4) for i in range(8)]
    learn = learner(dls=DataLoaders(*[TorchDL(ds, batch_size=4)]*2)).to_channelslast(to_fp16=False)
    learn.model[0].requires_grad_(False)
    assert learn.format_summary().holds


@pytest.mark.cuda
@pytest.mark.parametrize('name', ['resnet18', 'efficientnet', 'shufflenet', 'instance_norm'])
def test_format_summary_on_CUDA_names_modules_in_both_passes(name):
    make, _, _, shape = ARCHITECTURES[name]
    ds = [(torch.randn(shape), torch.tensor(i % 4)) for i in range(2)]
    dl = DataLoader(ds, bs=2)
    learn = Learner(DataLoaders(dl, dl, device=torch.device('cuda')), make(), CrossEntropyLossFlat()).to_channelslast()
    s = learn.format_summary()
    assert all(r.module in dict(learn.model.named_modules()) or r.module == 'loss' for r in s.rows) and s.counts[True][1]


def test_format_summary_of_a_contiguous_shufflenet_finds_nothing_to_lose():
    "A shuffled view of spatial size 1×1 looks channels last."
    s = Learner(loaders((3, 32, 32), n=8), tv.shufflenet_v2_x0_5(num_classes=4), CrossEntropyLossFlat()).format_summary()
    assert 'nothing to lose' in s.verdict and s.rows == []


def test_format_summary_does_not_advise_the_format_that_the_learner_has():
    "The model takes its images apart at once."
    verdict = learner(nn.Sequential(nn.Flatten(), nn.Linear(192, 4))).to_channelslast(to_fp16=False).format_summary().verdict
    assert verdict == 'No activation is channels last, although the Learner is: the model does not use the format.'


def test_the_first_format_summary_on_a_GPU_finds_the_losses(gpu):
    "The model and the batch move there before the step."
    def _model(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    expected = learner(_model()).to_channelslast(to_fp16=False).format_summary().lost
    learn = gpu('cuda:0').learner(_model(), loaders()).to_channelslast(to_fp16=False)
    assert learn.format_summary().lost == expected and expected
