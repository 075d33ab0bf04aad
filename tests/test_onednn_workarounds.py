"Convolutions that PyTorch computes wrongly on a CPU: strided 1×1 ones with few channels, and padded ones with AVX-512."
import json
import os
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from fastai.vision.all import Callback, CrossEntropyLossFlat, Learner, load_learner
from torch import nn
from torch.utils.checkpoint import checkpoint

from channelslast.core import onednn_workarounds as workarounds
from channelslast.core.memory_format import convert_module, convert_nested
from channelslast.core.onednn_workarounds import (
    hits_onednn_6035, is_misread, misreads_padding, misses_input, pads_in_kernel, safe_forward, slice_first)
from channelslast.core.undo import ForwardPatch
from .conftest import convnet, learner, loaders
from .test_channels_last import image_folder

conv = nn.Conv2d


@pytest.mark.parametrize('m, risky', [
    (conv(3, 8, 1, stride=2), True), (conv(15, 8, 1, stride=(1, 2)), True), (conv(3, 8, 1, stride=2, padding='valid'), True),
    (conv(16, 8, 1, stride=2), False), (conv(3, 8, 1), False), (conv(3, 8, 3, stride=2), False), (conv(3, 8, (1, 3), stride=2), False),
    (conv(3, 8, 1, stride=2, padding=1), False), (conv(4, 8, 1, stride=2, groups=2), False), (nn.Conv3d(3, 8, 1, stride=2), False),
    (nn.ConvTranspose2d(3, 8, 1, stride=2), False), (nn.Linear(3, 8), False)])
def test_which(m, risky): assert hits_onednn_6035(m) == risky


class Doubled(nn.Conv2d):
    "A subclass that computes its weights, as weight standardization does."
    def forward(self, x): return self._conv_forward(x, self.weight*2, self.bias)


@pytest.mark.parametrize('cls', [nn.Conv2d, Doubled])
@pytest.mark.parametrize('stride', [2, 3, (1, 2), (2, 1)])
@pytest.mark.parametrize('shape', [(2, 3, 8, 8), (2, 3, 7, 9), (3, 5, 5), (1, 3, 1, 1)])
def test_same_numbers(cls, stride, shape):
    m = cls(3, 4, 1, stride=stride).double()
    a = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    b = a.detach().clone().requires_grad_()
    x, y = m(a), slice_first(m, m.forward)(b)
    torch.testing.assert_close(x, y)
    g = torch.randn_like(x)
    for one, two in zip(torch.autograd.grad(x, (a, m.weight), g), torch.autograd.grad(y, (b, m.weight), g)): torch.testing.assert_close(one, two)
    assert m.stride == (stride if isinstance(stride, tuple) else (stride, stride))


def stem(): return nn.Sequential(conv(3, 16, 1, stride=2), nn.ReLU(), conv(16, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def test_trains_where_pytorch_crashes():
    "✗ PyTorch crashes or writes outside its memory here, so this runs in its own process."
    code = """
from tests.test_onednn_workarounds import *
for size in 64, 128:
    torch.manual_seed(0)
    model, grads, dls = stem(), [], loaders((3, size, size), n=2, bs=2)
    for last in False, True:
        learn = learner(deepcopy(model), dls, lr=0.)
        if last: learn.to_channelslast(to_fp16=False)
        class Keep(Callback):
            def before_step(self): grads.append([p.grad.clone() for p in self.model.parameters()])
        learn.fit(3, cbs=Keep())
    for g in grads:
        for a, b in zip(g, grads[0]): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
print('equal', len(grads))"""
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=__file__.rsplit('tests', 1)[0])
    assert out.returncode == 0 and 'equal 6' in out.stdout, (out.returncode, out.stderr[-500:])


def test_in_force_for_the_batch_alone():
    learn, seen = learner(stem()).to_channelslast(to_fp16=False), []
    class Look(Callback):
        order = 50
        def before_batch(self): seen.append('forward' in vars(self.model[0]))
    learn.fit(1, cbs=Look())
    assert seen and all(seen) and 'forward' not in vars(learn.model[0]) and learn.model[0].stride == (2, 2)


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_no_trace_after_an_error(error):
    class Raises(nn.Module):
        def forward(self, x): raise error
    learn = learner(nn.Sequential(stem()[0], Raises())).to_channelslast(to_fp16=False)
    with pytest.raises(error): learn.fit(1)
    assert 'forward' not in vars(learn.model[0]) and learn.model[0].stride == (2, 2)


class Interrupt(Callback):
    order = 60
    def after_backward(self): raise KeyboardInterrupt


@pytest.mark.filterwarnings('ignore')
def test_exports_after_an_interruption(has, tmp_path):
    "The state of a fit, which includes functions, is not exported."
    has('bf16')
    learn = learner(stem(), image_folder(tmp_path), path=tmp_path).to_channelslast(amp_mode='bf16', fp32_layers='0')
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Interrupt())
    learn.remove_cb(Interrupt)
    learn.export('e.pkl')
    loaded = load_learner(tmp_path/'e.pkl', cpu=False)
    assert not {'_patch', '_entered'} & {*vars(loaded.channels_last), *vars(loaded.mixed_precision)}


class Checkpointed(nn.Module):
    "Recomputes its layers in the backward pass."
    def __init__(self):
        super().__init__()
        self.net, self.strides = stem(), []
        self.net[0].register_forward_pre_hook(lambda m, args: None)
        real = self.net[0]._conv_forward
        self.net[0]._conv_forward = lambda *a: (self.strides.append(self.net[0].stride), real(*a))[1]
    def forward(self, x): return checkpoint(self.net, x, use_reentrant=False)


def test_in_force_in_the_backward_pass_too():
    learn = learner(Checkpointed()).to_channelslast(to_fp16=False)
    learn.fit(1)
    assert set(learn.model.strides[:8]) == {(1, 1)} and len(learn.model.strides) >= 8


@pytest.mark.filterwarnings('ignore')
def test_fp32_layers_under_checkpointing(has):
    "Layers recomputed in the backward pass run as in the forward pass."
    has('bf16')
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = convnet()
        def forward(self, x): return checkpoint(self.net, x, use_reentrant=False)
    learn = learner(Net()).to_channelslast(amp_mode='bf16', fp32_layers='net.0')
    learn.fit(1)
    assert torch.isfinite(learn.recorder.losses[-1])


def test_with_fp32_layers_both_come_off(has):
    has('bf16')
    learn = learner(stem()).to_channelslast(amp_mode='bf16', fp32_layers='0')
    learn.fit(1)
    assert 'forward' not in vars(learn.model[0])


@pytest.mark.filterwarnings('ignore')
def test_a_fit_inside_a_batch_leaves_no_forward(has):
    "✗ Both callbacks patch the same layer. The inner fit undoes both patches, in any order."
    has('bf16')
    learn = learner(stem()).to_channelslast(amp_mode='bf16', fp32_layers='0')
    learn.create_opt()
    learn._split(learn.dls.one_batch())
    learn('before_fit'); learn('before_batch')
    learn.fit(1)
    assert 'forward' not in vars(learn.model[0])


def test_made_once():
    "A compiled model would recompile for each new function."
    m = stem()[0]
    patch = ForwardPatch([m], slice_first)
    with patch: first = m.forward
    assert 'forward' not in vars(m)
    with patch: assert m.forward is first


def test_contiguous_learners_are_left_alone():
    learn, seen = Learner(loaders(), stem(), CrossEntropyLossFlat()), []
    class Look(Callback):
        def before_batch(self): seen.append('forward' in vars(self.model[0]))
    learn.fit(1, cbs=Look())
    assert not any(seen)


# convolutions that oneDNN misreads on CPUs with AVX-512

WRONG = [ # kernel, stride, padding, size; from public models: R3D-18 and R(2+1)D-18 with 8 frames, ResNet-18 and MobileNetV2 at 16 px
    ((3, 3, 3), (1, 1, 1), (1, 1, 1), (2, 7, 7)), ((3, 1, 1), (1, 1, 1), (1, 0, 0), (2, 14, 14)), ((3, 3, 3), (1, 1, 1), (1, 1, 1), (2, 1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)), ((1, 3, 3), (1, 2, 2), (0, 1, 1), (2, 1, 1)), ((3,), (2,), (1,), (1,)), ((3, 3), (1, 2), (1, 1), (9, 1)),
    ((5, 5), (1, 1), (2, 2), (1, 9)), ((7, 7), (1, 1), (3, 3), (2, 2)), ((3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 4, 4)),
    ((5, 1, 1), (1, 1, 1), (2, 0, 0), (2, 3, 3)), ((7, 3, 3), (2, 1, 1), (3, 1, 1), (3, 4, 4)), ((1, 7, 1), (1, 1, 1), (0, 3, 0), (2, 3, 3))]
RIGHT = [((3, 3), (1, 1), (1, 1), (1, 1)), ((3, 3), (2, 2), (1, 1), (2, 2)), ((7, 7), (2, 2), (3, 3), (16, 16)), ((5, 5), (1, 1), (2, 2), (4, 4)),
         ((3, 3, 3), (1, 1, 1), (1, 1, 1), (3, 7, 7)), ((3, 3, 3), (2, 2, 2), (1, 1, 1), (4, 8, 8)), ((1, 3, 3), (1, 1, 1), (0, 1, 1), (1, 7, 7)),
         ((3, 3, 3), (1, 1, 1), (0, 0, 0), (3, 3, 3)), ((1, 1), (2, 2), (0, 0), (1, 1)), ((3,), (2,), (1,), (2,)), ((3, 3), (2, 1), (1, 1), (1, 1))]


@pytest.mark.parametrize('cases, wrong', [(WRONG, True), (RIGHT, False)])
def test_what_bf16_misreads(cases, wrong): assert [misreads_padding(*c, half=True) for c in cases] == [wrong]*len(cases)


@pytest.mark.parametrize('depth', range(1, 12))
def test_what_fp32_misreads(depth):
    "Depth 7, stride 2, padding 3 is misread at depths 5 to 7 (the condition includes all below 9). Common sizes are not."
    assert misreads_padding((7, 3, 3), (2, 1, 1), (3, 1, 1), (depth, 4, 4), half=False) == (depth < 9)
    for k, s in (3, 1), (3, 2), (5, 1), (7, 1): assert not misreads_padding((k,)*3, (s,)*3, (k//2,)*3, (depth,)*3, half=False)


RECORDED = json.loads((Path(__file__).parent/'recorded/onednn-avx512-bf16.json').read_text())


def test_recorded_convolutions():
    "Random convolutions, run on an AVX512-BF16 CPU emulated by Bochs. Each wrong one is found; padded first, each was right."
    wrong = [c for c in RECORDED['cases'] if c[5]]
    assert len(RECORDED['cases']) > 500 and len(wrong) > 100
    assert [c for c in wrong if not misreads_padding(*c[:4], half=c[4] == 'bf16')] == []
    free = [c for c in RECORDED['cases'] if not misreads_padding(*c[:4], half=c[4] == 'bf16')]
    assert len(free) > len(RECORDED['cases'])/3 and not any(c[5] for c in free)


NATIVE = json.loads((Path(__file__).parent/'recorded/onednn-avx512-native.json').read_text())['cases']
DILATION = json.loads((Path(__file__).parent/'recorded/onednn-dilation.json').read_text())['cases']


def recorded(case):
    "The layer and the shape of the input of a recorded case."
    kwargs = {k: case[k] for k in ('stride', 'padding', 'dilation')}
    return getattr(nn, case['layer'])(*case['channels'], case['kernel'], **kwargs), case['input']


@pytest.fixture
def avx512(monkeypatch): monkeypatch.setattr(torch.cpu, '_is_avx512_supported', lambda: True)


@pytest.fixture
def always(monkeypatch, avx512): monkeypatch.setattr(workarounds, 'misreads_padding', lambda *args: True)


LAYERS = [
    (nn.Conv1d(3, 4, 3, padding=1), (2, 3, 5)), (nn.Conv2d(3, 4, 3, padding=1, stride=2), (2, 3, 1, 1)), (nn.Conv2d(3, 4, 3, padding=1), (3, 5, 5)),
    (nn.Conv2d(4, 4, (2, 5), padding='same', groups=4), (2, 4, 4, 4)), (nn.Conv2d(3, 4, 3, padding=(0, 2), dilation=2), (2, 3, 9, 9)),
    (nn.Conv3d(3, 4, 3, padding=1), (2, 3, 2, 5, 5)), (nn.Conv3d(3, 4, (3, 1, 2), padding=(2, 0, 1), stride=(1, 2, 1)), (1, 3, 1, 4, 4)),
    (nn.ConvTranspose1d(3, 4, 3, padding=1, stride=2), (2, 3, 4)), (nn.ConvTranspose2d(3, 4, 3, padding=1, stride=2, output_padding=1), (2, 3, 4, 4)),
    (nn.ConvTranspose2d(4, 4, 3, padding=(1, 0), groups=2, dilation=2), (2, 4, 4, 4)), (nn.ConvTranspose3d(3, 4, 3, padding=1), (2, 3, 2, 3, 3)),
    (nn.ConvTranspose2d(3, 4, 3, padding=1), (3, 4, 4)), (Doubled(3, 4, 3, padding=1), (2, 3, 4, 4))]


@pytest.mark.parametrize('m, shape', LAYERS)
@pytest.mark.parametrize('last', [False, True])
def test_padded_first_and_cropped_after_is_the_same(always, m, shape, last):
    "The result, its memory format and each gradient are the same."
    m = deepcopy(m).double()
    a = torch.randn(shape, dtype=torch.float64)
    if last: convert_module(m); a = convert_nested(a)
    b = a.clone().requires_grad_()
    a.requires_grad_()
    assert pads_in_kernel(m)
    padding, calls, real = m.padding, [], m._conv_forward if not m.transposed else None
    if real: m._conv_forward = lambda *args: (calls.append(m.padding), real(*args))[1]
    x = type(m).forward(m, a)
    y = safe_forward(m, m.forward)(b)
    torch.testing.assert_close(x, y)
    assert x.stride() == y.stride() and m.padding == padding
    if calls: assert calls == [padding, (0,)*len(m.kernel_size)]
    g = torch.randn_like(x)
    for one, two in zip(torch.autograd.grad(x, (a, *m.parameters()), g), torch.autograd.grad(y, (b, *m.parameters()), g)): torch.testing.assert_close(one, two)


def assert_same(m, shape, last=True):
    "The layer's result and gradients are the same with and without the workaround, in float64."
    m, a = deepcopy(m).double(), torch.randn(shape, dtype=torch.float64)
    if last: convert_module(m); a = convert_nested(a)
    b = a.clone().requires_grad_()
    a.requires_grad_()
    x, y = type(m).forward(m, a), safe_forward(m, m.forward)(b)
    torch.testing.assert_close(x, y)
    g = torch.randn_like(x)
    for one, two in zip(torch.autograd.grad(x, (a, *m.parameters()), g), torch.autograd.grad(y, (b, *m.parameters()), g)): torch.testing.assert_close(one, two)


@pytest.mark.parametrize('case', NATIVE, ids=str)
def test_recorded_on_a_cpu_with_avx512(avx512, case):
    m, shape = recorded(case)
    assert pads_in_kernel(m) and is_misread(m, torch.randn(shape))
    assert_same(m, shape)


ONE_CHANNEL = [  # first layers of common networks for gray images, and the sizes of their inputs
    (conv(1, 64, 7, stride=2, padding=3), (2, 1, 28, 28)), (conv(1, 64, 7, stride=2, padding=3), (2, 1, 224, 224)), (conv(1, 32, 3, stride=2, padding=1), (2, 1, 28, 28)),
    (conv(1, 8, 5, stride=2, padding=2), (2, 1, 28, 28)), (conv(1, 6, 5, padding=2), (2, 1, 28, 28)), (conv(1, 64, 3, stride=1, padding=1), (2, 1, 28, 28)),
    (conv(1, 64, 4, stride=2, padding=1), (2, 1, 64, 64)), (conv(1, 96, 4, stride=4), (2, 1, 32, 32)), (conv(1, 768, 16, stride=16), (2, 1, 224, 224)),
    (conv(1, 32, (11, 41), stride=(1, 2), padding=(5, 20)), (2, 1, 200, 161)), (conv(1, 8, (3, 4), stride=(1, 4)), (2, 1, 3, 4)), (nn.Conv1d(1, 512, 10, stride=5), (2, 1, 4000)),
    (nn.Conv3d(1, 32, 3, stride=2, padding=1), (2, 1, 16, 64, 64)), (conv(64, 128, 3, stride=2, padding=1), (2, 64, 2, 2)), (conv(3, 64, 7, stride=2, padding=3), (2, 3, 64, 64)),
    (conv(16, 16, 3, stride=2, padding=1, groups=16), (2, 16, 8, 2)), (conv(8, 8, 3, padding=2, dilation=2), (2, 8, 8, 8)), (conv(8, 8, 3, stride=2, padding=2, dilation=2), (2, 8, 8, 8)),
    (nn.ConvTranspose2d(64, 1, 4, stride=2, padding=1), (2, 64, 14, 14)), (nn.ConvTranspose2d(100, 512, 4), (2, 100, 1, 1)), (nn.ConvTranspose2d(16, 1, 2, stride=2), (2, 16, 14, 14))]


@pytest.mark.parametrize('m, shape', ONE_CHANNEL, ids=str)
def test_common_layers_run_as_they_are(avx512, m, shape): assert not is_misread(m, torch.empty(shape))


@pytest.mark.parametrize('m, shape', [
    (conv(1, 4, 3, stride=2), (2, 1, 4, 4)), (conv(1, 4, (2, 3), stride=(1, 3), padding='valid'), (2, 1, 4, 5)), (conv(1, 4, (2, 3), stride=(1, 2)), (3, 1, 6, 4)),
    (conv(1, 4, (3, 2), stride=(1, 3), padding=(1, 1), dilation=(2, 3), bias=False), (2, 1, 5, 2)), (nn.Conv3d(1, 3, (1, 2, 3), stride=(2, 1, 2), padding=(0, 1, 1)), (2, 1, 2, 3, 2)),
    (nn.ConvTranspose2d(3, 1, 3, stride=(1, 2), padding=(0, 1), output_padding=(0, 1)), (2, 3, 4, 1)), (nn.ConvTranspose3d(3, 1, (1, 2, 3), stride=(2, 1, 3)), (2, 3, 2, 4, 1)),
    (conv(3, 8, 1, stride=2, padding=(0, 1), dilation=2), (2, 3, 8, 1)), (conv(4, 4, (3, 2), stride=(2, 4), padding=3, dilation=(1, 2), groups=4), (2, 4, 8, 1))], ids=str)
@pytest.mark.parametrize('last', [False, True])
def test_one_column_and_no_input(avx512, m, shape, last): assert_same(m, shape, last)


def test_recorded_crashes_of_dilated_layers():
    "Each layer that crashed is found, and few that ran."
    found = [misses_input(*((v,) for v in c[:5])) for c in DILATION]
    assert all(f for f, c in zip(found, DILATION) if c[5]) and sum(c[5] for c in DILATION) > 20
    assert sum(found) < 1.7*sum(c[5] for c in DILATION)


def test_a_dilated_layer_that_crashes_trains():
    "✗ No column of the result reads the input: PyTorch crashes, with AVX2 too."
    code = """
from tests.test_onednn_workarounds import *
net = nn.Sequential(conv(12, 16, 1, stride=2, padding=(0, 1), dilation=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
for last in False, True:
    learn = learner(deepcopy(net), loaders((12, 17, 1), n=10, bs=5))
    if last: learn.to_channelslast(to_fp16=False)
    learn.fit(1)
print('trained')"""
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert out.returncode == 0 and 'trained' in out.stdout, (out.returncode, out.stderr[-500:])


@pytest.mark.parametrize('size', [(7, 8), [8, 7]])
def test_transposed_with_an_output_size(always, size):
    m, x = nn.ConvTranspose2d(3, 4, 3, padding=1, stride=2).double(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    y = safe_forward(m, m.forward)(x, output_size=size)
    torch.testing.assert_close(y, m(x, output_size=size))
    assert y.shape[2:] == torch.Size(size)


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_padding_is_back_after_an_error(always, error):
    m = nn.Conv2d(3, 4, 3, padding=1)
    def _raises(*args): raise error
    with pytest.raises(error): safe_forward(m, _raises)(torch.randn(1, 3, 4, 4))
    assert m.padding == (1, 1)


@pytest.mark.parametrize('m', [nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3, padding='valid'), nn.Conv2d(3, 4, 3, padding=1, padding_mode='reflect'),
                               nn.Linear(3, 4), nn.Conv2d(3, 4, 1, padding='same')])
def test_not_padded(avx512, m): assert not pads_in_kernel(m)


class Numbers(nn.Conv2d):
    "A subclass that keeps plain numbers and has its own forward."
    def __init__(self):
        super().__init__(3, 8, 1, stride=2, padding=0)
        self.kernel_size, self.stride, self.padding = 1, 2, 1


def test_subclasses_with_plain_numbers_are_left_alone(avx512): assert not pads_in_kernel(Numbers()) and not hits_onednn_6035(Numbers())


def test_on_other_cpus_nothing_is_replaced(monkeypatch):
    monkeypatch.setattr(torch.cpu, '_is_avx512_supported', lambda: False)
    assert not pads_in_kernel(nn.Conv2d(3, 4, 3, padding=1))


class Shallow(nn.Module):
    "Depth 2 with a kernel of depth 3, spatial size 1 with stride 2, and a convolution that is wrong in fp32."
    def __init__(self):
        super().__init__()
        self.stem, self.deep = nn.Conv3d(3, 4, (7, 1, 1), stride=(2, 1, 1), padding=(3, 0, 0)), nn.Conv3d(4, 8, 3, padding=1)
        self.last, self.head = nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Linear(8, 4)
    def forward(self, x):
        x = self.deep(self.stem(x)[:, :, :2])
        return self.head(self.last(x.mean((2, 3, 4))[..., None, None])[..., 0, 0])


USES = {  # layers that must run without padding
    'plain': (lambda learn: learn, {'stem'}), 'channels last': (lambda learn: learn.to_channelslast(to_fp16=False), {'stem'}),
    'bf16': (lambda learn: learn.to_bf16(), {'stem', 'deep', 'last'}),
    'both': (lambda learn: learn.to_channelslast(amp_mode='bf16'), {'stem', 'deep', 'last'}),
    'deep in fp32': (lambda learn: learn.to_channelslast(amp_mode='bf16', fp32_layers='deep'), {'stem', 'last'}),
    'stem in fp32': (lambda learn: learn.to_channelslast(amp_mode='bf16', fp32_layers='stem'), {'stem', 'deep', 'last'})}


@pytest.mark.parametrize('use', USES)
@pytest.mark.parametrize('checkpointed', [False, True])
@pytest.mark.filterwarnings('ignore')
def test_each_learner_avoids_what_is_misread(has, avx512, use, checkpointed):
    "✗ In training, validation and recomputation, also contiguous in mixed precision. No patch remains afterwards."
    has('bf16')
    change, wanted = USES[use]
    model = Shallow()
    seen = {n: set() for n in ('stem', 'deep', 'last')}
    for n, s in seen.items():
        m = getattr(model, n)
        def _forward(x, w, b, real=m._conv_forward, m=m, s=s):
            s.add(m.padding)
            return real(x, w, b)
        m._conv_forward = _forward
    class Again(nn.Module):
        def __init__(self): super().__init__(); self.net = model
        def forward(self, x): return checkpoint(self.net, x, use_reentrant=False)
    if checkpointed and 'fp32' in use: pytest.skip('the layer has another name there')
    learn = change(learner(Again() if checkpointed else model, loaders((3, 5, 6, 6), n=4, bs=2)))
    if use == 'bf16': learn.to_channelslast(amp_mode='bf16').to_contiguous()
    learn.fit(1)
    assert {n for n, s in seen.items() if s == {(0,)*len(getattr(model, n).kernel_size)}} == wanted, seen
    assert all(s == {getattr(model, n).padding} for n, s in seen.items() if n not in wanted)
    assert not any('forward' in vars(m) for m in model.modules())


@pytest.mark.skipif(sys.platform == 'win32', reason='no os.fork')
def test_random_convolutions():
    "Independent of the conditions: all that this CPU computes with the workarounds is right."
    env = {**os.environ, 'MALLOC_PERTURB_': '165', 'MALLOC_MMAP_MAX_': '0'}
    out = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'tests.conv_fuzz', '0', '150', '60'], capture_output=True, text=True, env=env,
                         cwd=Path(__file__).parent.parent)
    assert out.returncode == 0 and re.search(r'^\d+ convolutions, 0 wrong$', out.stdout, re.M), out.stdout[-2000:] + out.stderr[-500:]
