"Convolutions that PyTorch computes wrongly on a CPU, and `SafeConvolutions`, which computes them with correct kernels."
import copy
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fastai.vision.all import Adam, Callback, TensorImage, load_learner
from torch import nn
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from channelslast import CompilePredictions, CompileTraining, FoldBatchNorm, fused
from channelslast.core import onednn_workarounds as workarounds
from channelslast.core.memory_format import convert_module, convert_nested, unique_modules
from channelslast.core.misread_convolutions import hits_onednn_6035, misreads_column, misreads_padding, misses_input
from channelslast.core.model_copy import ModelState
from channelslast.core.onednn_workarounds import SafeConvolutions, needs_safe_convolutions, pause_safe_convolutions
from channelslast.predict.compile_predictions import FrozenModel
from channelslast.predict.folded_model import FoldedModel
from .conv_fuzz import errors
from .helpers import convnet, image_folder, learner, loaders, names_library

ROOT = Path(__file__).parent.parent
conv, aten = nn.Conv2d, torch.ops.aten


def recorded(name): return json.loads((ROOT/'tests'/'recorded'/f'{name}.json').read_text())['cases']


def run_python(code):
    "Output of `code`, run in its own process with this file's names: wrong kernels may crash it."
    code = f'from tests.test_onednn_workarounds import *\n{code}'
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, (out.returncode, out.stderr[-500:])
    return out.stdout


@pytest.fixture
def avx512(monkeypatch): monkeypatch.setattr(torch.cpu, '_is_avx512_supported', lambda: True)


@pytest.fixture
def padded_is_misread(monkeypatch, avx512):
    "Pretend that kernels misread each padded convolution, in float64 too."
    monkeypatch.setattr(workarounds, 'misreads_padding', lambda k, s, padding, size, half: any(padding))
    monkeypatch.setattr(workarounds, 'HALF', (torch.float64,))


@pytest.fixture
def avx2(monkeypatch): monkeypatch.setattr(torch.cpu, '_is_avx512_supported', lambda: False)


class Kernels(TorchDispatchMode):
    "Records weight, stride and padding of each convolution that PyTorch computes, in the backward pass too."
    def __init__(self): super().__init__(); self.calls = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten.convolution.default: self.calls.append((tuple(args[1].shape), tuple(args[3]), tuple(args[4])))
        return func(*args, **(kwargs or {}))


# conditions

@pytest.mark.parametrize('call, wrong', [
    (((1, 1), (2, 2), (0, 0), 3, 1), True), (((1, 1), (1, 2), (0, 0), 15, 1), True), (((1, 1), (2, 2), (0, 0), 16, 1), False),
    (((1, 1), (1, 1), (0, 0), 3, 1), False),
    (((3, 3), (2, 2), (0, 0), 3, 1), False), (((1, 3), (2, 2), (0, 0), 3, 1), False), (((1, 1), (2, 2), (1, 1), 3, 1), False),
    (((1, 1), (2, 2), (0, 0), 2, 2), False),
    (((1,), (2,), (0,), 3, 1), False), (((1, 1, 1), (2, 2, 2), (0, 0, 0), 3, 1), False)])
def test_hits_onednn_6035_strided_1x1_with_few_channels(call, wrong): assert hits_onednn_6035(*call) == wrong


WRONG = [ # kernel, stride, padding, size; from public models: R3D-18 and R(2+1)D-18 with 8 frames, ResNet-18 and MobileNetV2 at 16 px
    ((3, 3, 3), (1, 1, 1), (1, 1, 1), (2, 7, 7)), ((3, 1, 1), (1, 1, 1), (1, 0, 0), (2, 14, 14)), ((3, 3, 3), (1, 1, 1), (1, 1, 1), (2, 1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)), ((1, 3, 3), (1, 2, 2), (0, 1, 1), (2, 1, 1)), ((3,), (2,), (1,), (1,)), ((3, 3), (1, 2), (1, 1), (9, 1)),
    ((5, 5), (1, 1), (2, 2), (1, 9)), ((7, 7), (1, 1), (3, 3), (2, 2)), ((3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 4, 4)),
    ((5, 1, 1), (1, 1, 1), (2, 0, 0), (2, 3, 3)), ((7, 3, 3), (2, 1, 1), (3, 1, 1), (3, 4, 4)), ((1, 7, 1), (1, 1, 1), (0, 3, 0), (2, 3, 3))]
RIGHT = [((3, 3), (1, 1), (1, 1), (1, 1)), ((3, 3), (2, 2), (1, 1), (2, 2)), ((7, 7), (2, 2), (3, 3), (16, 16)), ((5, 5), (1, 1), (2, 2), (4, 4)),
         ((3, 3, 3), (1, 1, 1), (1, 1, 1), (3, 7, 7)), ((3, 3, 3), (2, 2, 2), (1, 1, 1), (4, 8, 8)), ((1, 3, 3), (1, 1, 1), (0, 1, 1), (1, 7, 7)),
         ((3, 3, 3), (1, 1, 1), (0, 0, 0), (3, 3, 3)), ((1, 1), (2, 2), (0, 0), (1, 1)), ((3,), (2,), (1,), (2,)), ((3, 3), (2, 1), (1, 1), (1, 1))]


@pytest.mark.parametrize('cases, wrong', [(WRONG, True), (RIGHT, False)])
def test_misreads_padding_in_bf16_on_small_maps(cases, wrong): assert [misreads_padding(*c, half=True) for c in cases] == [wrong]*len(cases)


@pytest.mark.parametrize('depth', range(1, 12))
def test_misreads_padding_in_fp32_of_deep_kernels_with_a_stride(depth):
    "Depth 7, stride 2, padding 3 is misread at depths 5 to 7 (the condition includes all below 9). Common sizes are not."
    assert misreads_padding((7, 3, 3), (2, 1, 1), (3, 1, 1), (depth, 4, 4), half=False) == (depth < 9)
    for k, s in (3, 1), (3, 2), (5, 1), (7, 1): assert not misreads_padding((k,)*3, (s,)*3, (k//2,)*3, (depth,)*3, half=False)


def test_misreads_padding_finds_each_recorded_wrong_one():
    "Random convolutions, run on an AVX512-BF16 CPU emulated by Bochs. Padded first, each was right."
    cases = recorded('onednn-avx512-bf16')
    wrong, free = [c for c in cases if c[5]], [c for c in cases if not misreads_padding(*c[:4], half=c[4] == 'bf16')]
    assert len(cases) > 500 and len(wrong) > 100 and not any(c[5] for c in free) and len(free) > len(cases)/3


def test_misses_input_finds_each_recorded_crash_and_few_others():
    cases = recorded('onednn-dilation')
    found = [misses_input(*((v,) for v in c[:5])) for c in cases]
    crashes = sum(c[5] for c in cases)
    assert all(f for f, c in zip(found, cases) if c[5]) and 20 < crashes < sum(found) < 1.7*crashes


def test_no_condition_holds_without_a_stride_in_fp32_nor_without_stride_and_padding():
    "`SafeConvolutions` relies on it to leave most calls at once."
    for n, k, p, size in itertools.product((1, 2, 3), (1, 2, 3, 7), (0, 1, 3), (1, 2, 5)):
        for half in [False] + [True]*(p == 0):
            same = [(v,)*n for v in (k, 1, p, size)]
            assert not misreads_padding(*same, half) and not misreads_column(same[0], same[1], same[3], True, half)
            assert not misses_input(same[0], same[1], same[2], (2,)*n, same[3]) and not hits_onednn_6035(same[0], same[1], same[2], 1, 1)


# the mode: which calls it computes in another way, and that they are the same

def calls_in_another_way(m, x, half=False) -> int:
    rewritten = []
    with torch.no_grad() if half else nullcontext(), SafeConvolutions(rewritten): m(x.bfloat16() if half else x)
    return len(rewritten)


def assert_same(m, shape, last=False, other=True):
    "Result, its strides and all gradients are the same in the mode, in float64. `other`: expect another way."
    m, a = copy.deepcopy(m).double(), torch.randn(shape, dtype=torch.float64)
    if last: convert_module(m); a = convert_nested(a)
    b, rewritten = a.clone().requires_grad_(), []
    a.requires_grad_()
    attributes = {k: v for k, v in vars(m).items() if k[0] != '_'}
    x = m(a)
    with SafeConvolutions(rewritten): y = m(b)
    def _strides(t): return [s for n, s in zip(t.shape, t.stride()) if n > 1]
    assert bool(rewritten) == other and _strides(x) == _strides(y) and {k: v for k, v in vars(m).items() if k[0] != '_'} == attributes
    torch.testing.assert_close(x, y)
    g = torch.randn_like(x)
    for one, two in zip(torch.autograd.grad(x, (a, *m.parameters()), g), torch.autograd.grad(y, (b, *m.parameters()), g)): torch.testing.assert_close(one, two)


class Doubled(nn.Conv2d):
    "A subclass that computes its weights, as weight standardization does."
    def forward(self, x): return self._conv_forward(x, self.weight*2, self.bias)


class Numbers(nn.Conv2d):
    "A subclass that keeps plain numbers, and has its own forward."
    def __init__(self):
        super().__init__(3, 8, 1, stride=2)
        self.kernel_size, self.stride, self.padding = 1, 2, 0
    def extra_repr(self): return ''
    def forward(self, x): return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class Functional(nn.Module):
    "A kernel and a function that gets it."
    def __init__(self, f, *shape): super().__init__(); self.f, self.kernel = f, nn.Parameter(torch.randn(shape))
    def forward(self, x): return self.f(x, self.kernel)


@pytest.mark.parametrize('last', [False, True])
@pytest.mark.parametrize('m', [cls(3, 4, 1, stride=s) for cls in (conv, Doubled) for s in (2, 3, (1, 2), (2, 1))] + [
    Numbers(), conv(3, 4, 1, stride=2, padding='valid'), conv(3, 4, 1, stride=2, dilation=3), Functional(lambda x, w: F.conv2d(x, w, stride=2), 4, 3, 1, 1),
    Functional(lambda x, w: torch.conv2d(weight=w, input=x, stride=[2]), 4, 3, 1, 1)], ids=str)
@pytest.mark.parametrize('shape', [(2, 3, 8, 8), (2, 3, 7, 9), (3, 5, 5), (1, 3, 1, 1)])
def test_mode_slices_strided_1x1_convolutions(avx2, m, shape, last): assert_same(m, shape, last)


def test_mode_leaves_strided_1x1_convolutions_without_weight_gradient():
    m, x = conv(3, 4, 1, stride=2), torch.randn(2, 3, 4, 4)
    assert calls_in_another_way(m, x) == 1
    with torch.no_grad(): assert calls_in_another_way(m, x) == 0
    assert calls_in_another_way(m.requires_grad_(False), x) == 0


LAYERS = [
    (nn.Conv1d(3, 4, 3, padding=1), (2, 3, 5)), (conv(3, 4, 3, padding=1, stride=2), (2, 3, 1, 1)), (conv(3, 4, 3, padding=1), (3, 5, 5)),
    (conv(4, 4, (2, 5), padding='same', groups=4), (2, 4, 4, 4)), (conv(3, 4, 3, padding=(0, 2), dilation=2), (2, 3, 9, 9)),
    (nn.Conv3d(3, 4, 3, padding=1), (2, 3, 2, 5, 5)), (nn.Conv3d(3, 4, (3, 1, 2), padding=(2, 0, 1), stride=(1, 2, 1)), (1, 3, 1, 4, 4)),
    (nn.ConvTranspose1d(3, 4, 3, padding=1, stride=2), (2, 3, 4)), (nn.ConvTranspose2d(3, 4, 3, padding=1, stride=2, output_padding=1), (2, 3, 4, 4)),
    (nn.ConvTranspose2d(4, 4, 3, padding=(1, 0), groups=2, dilation=2), (2, 4, 4, 4)), (nn.ConvTranspose3d(3, 4, 3, padding=1), (2, 3, 2, 3, 3)),
    (nn.ConvTranspose2d(3, 4, 3, padding=1), (3, 4, 4)), (Doubled(3, 4, 3, padding=1), (2, 3, 4, 4)),
    (Functional(lambda x, w: F.conv3d(x, w, None, 1, 1), 4, 3, 3, 3, 3), (2, 3, 2, 4, 4)),
    (Functional(lambda x, w: F.conv1d(x, weight=w, padding=(2,)), 4, 3, 3), (3, 5)),
    (Functional(lambda x, w: F.conv2d(x, w, padding='same', dilation=2), 4, 3, 2, 3), (2, 3, 4, 4)),
    (Functional(lambda x, w: F.conv_transpose2d(x, w, None, (2, 1), 1, 0, 1, 2), 3, 4, 3, 3), (2, 3, 4, 4)),
    (Functional(lambda x, w: F.conv_transpose2d(input=x, weight=w, padding=1, output_padding=(1, 0), stride=2), 3, 4, 3, 3), (3, 4, 4))]


@pytest.mark.parametrize('m, shape', LAYERS, ids=str)
@pytest.mark.parametrize('last', [False, True])
@pytest.mark.filterwarnings('ignore:Using padding')
def test_mode_pads_first_and_crops_last(padded_is_misread, m, shape, last): assert_same(m, shape, last)


@pytest.mark.parametrize('size', [(7, 8), [8, 7]])
def test_mode_crops_to_an_output_size(padded_is_misread, size):
    m, x = nn.ConvTranspose2d(3, 4, 3, padding=1, stride=2).double(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with SafeConvolutions(): y = m(x, output_size=size)
    torch.testing.assert_close(y, m(x, output_size=size))
    assert y.shape[2:] == torch.Size(size)


@pytest.mark.parametrize('m, shape', [
    (conv(1, 4, 3, stride=(1, 2)), (2, 1, 4, 4)), (conv(1, 4, (2, 3), stride=(1, 3), padding='valid'), (2, 1, 4, 5)),
    (conv(1, 4, (2, 3), stride=(1, 2)), (1, 6, 4)),
    (conv(1, 4, (3, 2), stride=(1, 3), padding=(1, 1), dilation=(2, 3), bias=False), (2, 1, 5, 2)),
    (nn.Conv3d(1, 3, (1, 2, 3), stride=(2, 1, 2), padding=(0, 1, 1)), (2, 1, 2, 3, 2)),
    (nn.ConvTranspose2d(3, 1, 3, stride=(1, 2), padding=(0, 1), output_padding=(0, 1)), (2, 3, 4, 1)),
    (nn.ConvTranspose3d(3, 1, (1, 2, 3), stride=(2, 1, 3)), (2, 3, 2, 4, 1)),
    (nn.ConvTranspose2d(3, 1, (1, 4), stride=(1, 3), output_padding=(0, 2)), (3, 4, 1))], ids=str)
@pytest.mark.parametrize('last', [False, True])
def test_mode_computes_one_column_without_a_stride(avx512, m, shape, last):
    assert_same(m, shape, last)
    with Kernels() as kernels, SafeConvolutions(): out = m(torch.randn(shape))
    (_, stride, padding), = kernels.calls
    assert padding[-1] == 0 and (stride[-1] == 1 or (m.transposed and out.shape[-1] < shape[-1] + stride[-1] + m.kernel_size[-1]))


@pytest.mark.parametrize('m, shape', [
    (nn.Conv1d(1, 4, 2, stride=3), (2, 1, 2)), (conv(1, 1, (3, 1), stride=(1, 3)), (2, 1, 4, 1)), (conv(20, 4, 1, stride=2), (2, 20, 1, 1)),
    (conv(4, 4, (5, 1), stride=(2, 3), padding=(1, 0), groups=4), (4, 5, 1)),
    (nn.Conv3d(2, 3, (3, 2, 2), stride=(1, 1, 5), padding=(1, 0, 0)), (2, 2, 3, 3, 4)),
    (nn.ConvTranspose3d(3, 1, (5, 3, 1), stride=(2, 1, 3), padding=(1, 1, 0)), (2, 3, 3, 4, 1)), (conv(3, 4, 1, stride=5, padding=1), (2, 3, 2, 2))], ids=str)
@pytest.mark.parametrize('last', [False, True])
def test_mode_computes_fewer_columns_than_the_stride_in_another_way(avx512, monkeypatch, m, shape, last):
    "✗ In bf16, NaN that happened to lie in free memory made the gradient of the weights NaN."
    assert_same(m, shape, last, other=False)
    monkeypatch.setattr(workarounds, 'HALF', (torch.float64,))  # half precision, without its rounding
    assert_same(m, shape, last)
    with Kernels() as kernels, SafeConvolutions(): m.double()(torch.randn(shape).double())
    assert [s[-1] == 1 or m.transposed for _, s, _ in kernels.calls] == [True]


@pytest.mark.parametrize('m, shape', [(conv(12, 16, 1, stride=2, padding=(0, 1), dilation=2), (2, 12, 9, 1)),
                                      (conv(4, 4, (3, 2), stride=(2, 4), padding=3, dilation=(1, 2), groups=4), (2, 4, 8, 1))], ids=str)
@pytest.mark.parametrize('last', [False, True])
def test_mode_pads_dilated_convolutions_that_read_only_padding(avx2, m, shape, last):
    "✗ The first one, padded first, is a strided 1×1 convolution with few channels, which is sliced."
    assert_same(m, shape, last)
    with Kernels() as kernels, SafeConvolutions(): m(torch.randn(shape))
    assert [(s, p) for _, s, p in kernels.calls] == [((1, 1) if m.in_channels == 12 else m.stride, (0, 0))]


@pytest.mark.parametrize('case', recorded('onednn-avx512-native'), ids=str)
def test_mode_computes_each_recorded_wrong_one_in_another_way(avx512, case):
    kwargs = {k: case[k] for k in ('stride', 'padding', 'dilation')}
    m = getattr(nn, case['layer'])(*case['channels'], case['kernel'], **kwargs)
    assert_same(m, case['input'], last=True)
    for dtype in case['dtypes']: assert calls_in_another_way(m.bfloat16() if dtype == 'bf16' else m, torch.randn(case['input']), dtype == 'bf16') >= 1


COMMON = [  # layers of common networks, many for gray images, and the sizes of their inputs
    (conv(1, 64, 7, stride=2, padding=3), (2, 1, 28, 28)), (conv(1, 64, 7, stride=2, padding=3), (2, 1, 224, 224)),
    (conv(1, 32, 3, stride=2, padding=1), (2, 1, 28, 28)),
    (conv(1, 8, 5, stride=2, padding=2), (2, 1, 28, 28)), (conv(1, 6, 5, padding=2), (2, 1, 28, 28)), (conv(1, 64, 3, stride=1, padding=1), (2, 1, 28, 28)),
    (conv(1, 64, 4, stride=2, padding=1), (2, 1, 64, 64)), (conv(1, 96, 4, stride=4), (2, 1, 32, 32)), (conv(1, 768, 16, stride=16), (2, 1, 224, 224)),
    (conv(1, 32, (11, 41), stride=(1, 2), padding=(5, 20)), (2, 1, 200, 161)), (conv(1, 8, (3, 4), stride=(1, 4)), (2, 1, 3, 4)),
    (nn.Conv1d(1, 512, 10, stride=5), (2, 1, 4000)),
    (nn.Conv3d(1, 32, 3, stride=2, padding=1), (2, 1, 16, 64, 64)), (conv(64, 128, 3, stride=2, padding=1), (2, 64, 2, 2)),
    (conv(3, 64, 7, stride=2, padding=3), (2, 3, 64, 64)),
    (conv(16, 16, 3, stride=(1, 2), padding=1, groups=16), (2, 16, 8, 2)), (conv(8, 8, 3, padding=2, dilation=2), (2, 8, 8, 8)),
    (conv(8, 8, 3, stride=2, padding=2, dilation=2), (2, 8, 8, 8)),
    (nn.ConvTranspose2d(64, 1, 4, stride=2, padding=1), (2, 64, 14, 14)), (nn.ConvTranspose2d(100, 512, 4), (2, 100, 1, 1)),
    (nn.ConvTranspose2d(16, 1, 2, stride=2), (2, 16, 14, 14)),
    (nn.ConvTranspose2d(3, 8, 1, stride=2), (2, 3, 8, 8)), (conv(3, 4, 3, padding=1, padding_mode='reflect'), (2, 3, 4, 4)),
    (conv(3, 4, 1, padding='same'), (2, 3, 4, 4))]


@pytest.mark.parametrize('m, shape', COMMON, ids=str)
def test_mode_leaves_common_layers_as_they_are(avx512, m, shape): assert calls_in_another_way(m, torch.empty(shape)) == 0


def test_mode_leaves_other_cpus_and_dtypes_as_they_are(monkeypatch):
    m, x = nn.Conv3d(3, 4, 3, padding=1), torch.randn(2, 3, 2, 4, 4)
    monkeypatch.setattr(torch.cpu, '_is_avx512_supported', lambda: True)
    assert calls_in_another_way(m, x) == 0
    with torch.autocast('cpu', torch.bfloat16): assert (calls_in_another_way(m, x), calls_in_another_way(copy.deepcopy(m).to('meta'), x.to('meta'))) == (1, 0)
    monkeypatch.setattr(torch.cpu, '_is_avx512_supported', lambda: False)
    with torch.autocast('cpu', torch.bfloat16): assert calls_in_another_way(m, x) == 0
    assert calls_in_another_way(conv(1, 4, 3, stride=(1, 2)), torch.empty(2, 1, 4, 4)) == 0


@pytest.mark.parametrize('output_padding, calls', [(0, 1), (1, 0)])
def test_mode_takes_the_whole_output_of_a_transposed_convolution_for_its_size(avx512, output_padding, calls):
    "One column less than the stride is misread, two are not."
    m = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=output_padding).bfloat16()
    assert calls_in_another_way(m, torch.randn(2, 3, 1, 1), half=True) == calls


# the mode beside PyTorch's other features

@pytest.fixture
def shallow(avx512):
    "A convolution that AVX-512 kernels misread in fp32, and its input. Without these kernels: they may crash."
    torch.manual_seed(0)
    with torch.backends.mkldnn.flags(enabled=False):
        yield nn.Conv3d(3, 4, (7, 1, 1), stride=(2, 1, 1), padding=(3, 0, 0)), torch.randn(2, 3, 5, 4, 4)


def test_mode_keeps_tensor_types(shallow):
    m, x = shallow
    with SafeConvolutions(): y = m(TensorImage(x))
    assert type(y) is type(m(TensorImage(x))) and torch.equal(y, m(TensorImage(x)))
    with SafeConvolutions(): z = nn.ConvTranspose2d(3, 1, 3, stride=(1, 2))(TensorImage(torch.randn(2, 3, 4, 1)))
    assert type(z) is TensorImage


ones = torch.ones


@pytest.mark.parametrize('args, kwargs', [
    ((), {}), ((1,), {}), ((ones(1),), {}), ((ones(1, 3, 4, 4), ones(2, 3, 1, 1), None, 2), {'striped': 1}), ((ones(3), ones(2, 3, 1, 1)), {}),
    ((ones(1, 1).bfloat16(), ones(2, 3, 3, 3).bfloat16(), None, 2, 1), {}), ((ones(1, 4, 4, 4), ones(2, 3, 3, 3), None, 1, 1), {})])
def test_mode_raises_pytorchs_own_errors(avx512, args, kwargs):
    with pytest.raises((TypeError, RuntimeError)) as plain: F.conv2d(*args, **kwargs)
    with SafeConvolutions(), pytest.raises(plain.type, match=re.escape(str(plain.value)[:200])): F.conv2d(*args, **kwargs)


def test_mode_leaves_objects_that_are_no_tensors_as_they_are(shallow):
    "Such as the proxies of symbolic tracing."
    class Like:
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None): return func
    with SafeConvolutions(): assert F.conv3d(Like(), torch.ones(4, 3, 7, 1, 1), None, 2, 3) is torch.conv3d
    with SafeConvolutions(): graph = torch.fx.symbolic_trace(Functional(lambda x, w: F.conv3d(x, w, None, 2, 3), 4, 3, 7, 1, 1)).graph
    assert [n.target for n in graph.nodes if n.op == 'call_function'] == [torch.conv3d]


def test_mode_under_vmap_and_functional_gradients(shallow):
    m, x = shallow
    params = dict(m.named_parameters())
    def loss(params, x): return torch.func.functional_call(m, params, x).square().sum()
    f = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    rewritten, expected = [], f(params, x[:, None])
    with SafeConvolutions(rewritten): grads = f(params, x[:, None])
    assert rewritten
    for k, g in expected.items(): torch.testing.assert_close(grads[k], g)


@pytest.mark.filterwarnings('ignore:.*torch.jit:FutureWarning', 'ignore::DeprecationWarning')
def test_mode_leaves_scripts_as_they_are(shallow):
    m, x = shallow
    scripted, rewritten = torch.jit.script(m), []
    with SafeConvolutions(rewritten): y = scripted(x)
    assert torch.equal(y, m(x)) and not rewritten


@pytest.mark.parametrize('fullgraph', [False, True])
@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_mode_is_compiled_with_a_users_model(shallow, fullgraph, backend):
    "Compiled once in the mode and once outside, whatever number of batches runs; in the mode, padded first."
    m, x = shallow
    x.requires_grad_()
    graphs, pads = [], []
    def _backend(graph, inputs):
        graphs.append(graph)
        pads.append(any(n.target is F.pad or n.target is torch._C._nn.pad for n in graph.graph.nodes))
        return torch._dynamo.lookup_backend(backend)(graph, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(m, backend=_backend, fullgraph=fullgraph)
    for mode in (nullcontext(), SafeConvolutions(), SafeConvolutions(), nullcontext(), SafeConvolutions()):
        with mode: grads = torch.autograd.grad(compiled(x).square().sum(), (x, *m.parameters()))
        for a, b in zip(grads, torch.autograd.grad(m(x).square().sum(), (x, *m.parameters()))): torch.testing.assert_close(a, b)
    assert len(graphs) == 2 and pads == [False, True]


@pytest.mark.parametrize('reentrant', [False, True])
def test_mode_sees_layers_that_run_again_in_the_backward_pass(shallow, reentrant):
    m, x = shallow
    x.requires_grad_()
    with Kernels() as kernels, SafeConvolutions(): checkpoint(lambda x: m(x).relu(), x, use_reentrant=reentrant).sum().backward()
    assert [padding for *_, padding in kernels.calls] == [(0, 0, 0)]*2


def test_mode_sees_layers_that_run_again_in_each_kind_of_backward_pass(shallow):
    "✗ Layers that ran with other shapes were an error of `checkpoint`."
    m, x = shallow
    x.requires_grad_()
    def _passes(f):
        x.grad = m.weight.grad = None
        z = x*2
        y = f(z).square().sum()
        y.backward(torch.tensor(2.), True, inputs=[x, z])
        grads = [*torch.autograd.grad(y, [x, z, m.weight], retain_graph=True), *torch.autograd.grad([y, y*2], x, [torch.ones(()), None], True)]
        torch.autograd.backward([y, y*2], [None, torch.tensor(3.)], retain_graph=True)
        y.backward()
        return [*grads, x.grad, z.grad, m.weight.grad, *torch.autograd.grad(f(x).sum(), [x, y], allow_unused=True)[:1]]
    with Kernels() as kernels, SafeConvolutions(): grads = _passes(lambda x: checkpoint(lambda x: m(x).relu(), x, use_reentrant=False))
    assert {padding for *_, padding in kernels.calls} == {(0, 0, 0)} and len(kernels.calls) > 6
    for a, b in zip(grads, _passes(lambda x: m(x).relu())): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with SafeConvolutions(), pytest.raises(RuntimeError, match='does not require grad'): x.detach().sum().backward()
    with SafeConvolutions(): g, = torch.autograd.grad(m(x).sum(), [torch.ones(1, requires_grad=True)], allow_unused=True, materialize_grads=True)
    assert torch.equal(g, torch.zeros(1))


def test_mode_is_paused_only_if_it_is_the_innermost(shallow):
    def _rewrites():
        with Kernels() as kernels: shallow[0](shallow[1])
        return kernels.calls[0][2] == (0, 0, 0)
    with SafeConvolutions():
        assert _rewrites()
        with pause_safe_convolutions(): assert not _rewrites()
        with BaseTorchFunctionMode() as other, pause_safe_convolutions(): assert _rewrites() and torch.overrides._get_current_function_mode() is other
        assert _rewrites()
    with pause_safe_convolutions(), BaseTorchFunctionMode(), pause_safe_convolutions(): assert not _rewrites()


# Learners

@pytest.mark.parametrize('m, on_avx512, last, on_avx2, plain', [
    (conv(3, 8, 1, stride=2), True, True, True, False), (conv(3, 8, 1), True, False, False, False), (conv(16, 8, 1, stride=2), True, False, False, False),
    (conv(3, 8, 3, padding=1), True, False, False, False), (conv(3, 8, 3, padding=1).bfloat16(), True, True, False, False),
    (conv(1, 8, 3, stride=2), True, True, False, False), (conv(8, 8, 3, stride=2, groups=8), True, False, False, False),
    (nn.ConvTranspose2d(8, 1, 3, stride=2), True, True, False, False), (nn.Conv1d(1, 8, 3, stride=2), True, False, False, False),
    (Numbers(), True, True, True, False), (conv(3, 8, 3, stride=2, dilation=2), True, True, True, False),
    (nn.Conv3d(3, 8, 3, padding=1), True, True, False, True),
    (nn.ConvTranspose3d(3, 8, 3), True, True, False, True), (nn.utils.parametrizations.weight_norm(nn.Conv3d(3, 8, 3)), True, True, False, True),
    (nn.Linear(3, 8), False, False, False, False),
    (Functional(F.conv2d, 4, 3, 1, 1), True, True, True, False), (Functional(F.conv2d, 4, 3, 3, 3), True, True, False, False),
    (Functional(F.conv2d, 4, 1, 3, 3), True, True, False, False), (Functional(F.conv3d, 4, 3, 3, 3, 3), True, True, False, True),
    (nn.BatchNorm2d(3), False, False, False, False), (nn.LazyConv2d(3, 1), False, False, False, False), (nn.Identity(), False, False, False, False)], ids=str)
def test_needs_safe_convolutions_if_a_module_holds_a_kernel(monkeypatch, m, on_avx512, last, on_avx2, plain):
    "With `on_avx512` in half precision, `last` in fp32 in channels last, `plain` in contiguous fp32."
    modules = unique_modules(nn.Sequential(nn.Flatten(), m))
    for has, wanted in (True, (on_avx512, last, plain)), (False, (on_avx2, on_avx2, False)):
        monkeypatch.setattr(torch.cpu, '_is_avx512_supported', lambda: has)
        assert tuple(needs_safe_convolutions(modules, *o) for o in ((True, True), (False, True), (False, False))) == wanted


class Shallow(nn.Module):
    "Depth 2 with a kernel of depth 3, spatial size 1 with stride 2, and a convolution that is wrong in fp32."
    def __init__(self):
        super().__init__()
        self.stem, self.deep = nn.Conv3d(3, 4, (7, 1, 1), stride=(2, 1, 1), padding=(3, 0, 0)), nn.Conv3d(4, 8, 3, padding=1)
        self.last, self.head = conv(8, 8, 3, stride=2, padding=1), nn.Linear(8, 4)
    def forward(self, x):
        x = self.deep(self.stem(x)[:, :, :2])
        return self.head(self.last(x.mean((2, 3, 4))[..., None, None])[..., 0, 0])


class Again(nn.Module):
    "Runs a model again in the backward pass."
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return checkpoint(self.net, x, use_reentrant=False)


class Calls(nn.Module):
    "A user's own forward that calls functions."
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.stem, self.deep, self.last = (nn.Parameter(getattr(net, n).weight.detach().clone()) for n in ('stem', 'deep', 'last'))
    def forward(self, x):
        x = F.conv3d(x, self.stem, stride=(2, 1, 1), padding=(3, 0, 0))[:, :, :2]
        x = F.conv3d(x, weight=self.deep, padding=1).mean((2, 3, 4))[..., None, None]
        return self.net.head(torch.conv2d(x, self.last, None, 2, 1)[..., 0, 0])


USES = {  # layers that must run without padding
    'plain': (lambda learn: learn, {'stem'}), 'channels last': (lambda learn: learn.to_channelslast(to_fp16=False), {'stem'}),
    'bf16': (lambda learn: learn.to_channelslast(amp_mode='bf16').to_contiguous(), {'stem', 'deep', 'last'}),
    'both': (lambda learn: learn.to_channelslast(amp_mode='bf16'), {'stem', 'deep', 'last'}),
    'deep in fp32': (lambda learn: learn.to_channelslast(amp_mode='bf16', fp32_layers='deep'), {'stem', 'last'}),
    'stem in fp32': (lambda learn: learn.to_channelslast(amp_mode='bf16', fp32_layers='stem'), {'stem', 'deep', 'last'})}


@pytest.mark.parametrize('use, wrap', [(u, w) for u in USES for w in (nn.Identity, Again, Calls) if w is nn.Identity or 'fp32' not in u])
@pytest.mark.filterwarnings('ignore')
def test_learner_computes_misread_layers_in_another_way(has, avx512, use, wrap):
    "In training, validation and recomputation, also contiguous in mixed precision."
    has('bf16')
    change, wanted = USES[use]
    model = Shallow()
    layers = {n: getattr(model, n) for n in ('stem', 'deep', 'last')}
    learn = change(learner(model if wrap is nn.Identity else wrap(model), loaders((3, 5, 6, 6), n=4, bs=2)))
    with Kernels() as kernels: learn.fit(1)
    for name, m in layers.items():
        seen = {padding for shape, _, padding in kernels.calls if shape == tuple(m.weight.shape)}
        assert seen == {(0,)*len(m.padding) if name in wanted else m.padding}, name


@pytest.mark.parametrize('change, c, mode', [
    (lambda learn: learn, 1, None), (lambda learn: learn.to_channelslast(to_fp16=False), 3, None),
    (lambda learn: learn.to_channelslast(to_fp16=False), 1, SafeConvolutions),
    (lambda learn: learn.to_channelslast(amp_mode='bf16'), 3, SafeConvolutions),
    (lambda learn: learn.to_channelslast(amp_mode='bf16').to_contiguous(), 3, SafeConvolutions)])
def test_learner_enters_the_mode_only_where_kernels_may_be_wrong(avx512, has, change, c, mode):
    "2-D layers in contiguous fp32 are right, and in channels last in fp32 unless they have one channel."
    has('bf16')
    learn, modes = change(learner(convnet(c), loaders((c, 8, 8)))), []
    class Look(Callback):
        def after_pred(self): modes.append(torch.overrides._get_current_function_mode())
    with Kernels() as kernels: learn.fit(1, cbs=Look())
    assert {padding for *_, padding in kernels.calls} == {(1, 1), (0, 0)} and {m and type(m) for m in modes} == {mode}
    modes.clear()
    with torch.autocast('cpu', torch.bfloat16): learn.fit(1, cbs=Look())  # the user's own
    assert {*map(type, modes)} == {SafeConvolutions}


def state(model):
    "All that the modules hold, except their modes: tensors by identity, hooks and other attributes."
    return [(m, {k: dict(v) if isinstance(v, dict) else v for k, v in vars(m).items() if k != 'training'}) for m in model.modules()]


class Looks(nn.Module):
    "Calls the function that a test sets."
    def forward(self, x): Looks.look(); return x


def test_learner_changes_no_module_at_any_moment(has, avx512):
    "At each event, in the forward and in another thread, the model is as before the fit, and so are copies and pickles."
    has('bf16')
    model, seen, misread = nn.Sequential(conv(3, 8, 1, stride=2), conv(8, 8, 3, stride=2, padding=1), Looks(), nn.Flatten(), nn.Linear(8, 4)), [], []
    def look():
        same, copied, pickled = state(model) == before, copy.deepcopy(model), pickle.dumps(model)
        def _in_thread():
            for m in model, copied, pickle.loads(pickled):
                with Kernels() as kernels, torch.no_grad(), torch.autocast('cpu', torch.bfloat16): m[1](torch.randn(1, 8, 1, 1))
                seen.append((same, names_library(pickled), [sorted(vars(o)) for o in m.modules()] == names, kernels.calls[0][1:]))
        thread = threading.Thread(target=_in_thread)
        thread.start(); thread.join()
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16), Kernels() as kernels: model[1](torch.randn(1, 8, 1, 1))
        misread.append(kernels.calls[0][2] == (1, 1))
    class Look(Callback):
        order = 2000
        def __call__(self, event): look()
    learn, Looks.look = learner(model, loaders((3, 2, 2), n=4, bs=2)).to_channelslast(amp_mode='bf16'), lambda: None
    learn.fit(1)  # converts the weights
    before, names, Looks.look = state(model), [sorted(vars(o)) for o in model.modules()], look
    with Kernels() as kernels: learn.fit(1, cbs=Look())
    assert {*misread} == {False, True}  # within and between batches
    assert len(seen) > 100 and seen == [(True, False, True, ((2, 2), (1, 1)))]*len(seen)
    assert {c[1:] for c in kernels.calls} >= {((1, 1), (0, 0)), ((2, 2), (0, 0))} and state(model) == before


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('where', ['forward', 'backward'])
def test_learner_leaves_the_mode_after_an_error(shallow, error, where):
    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            if where == 'forward': raise error
            return x.clone()
        @staticmethod
        def backward(ctx, g): raise error
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.c = shallow[0]
        def forward(self, x): return Raises.apply(self.c(x)).mean((2, 3, 4))
    learn = learner(Net(), loaders((3, 5, 4, 4), n=4, bs=2)).to_channelslast(to_fp16=False)
    with pytest.raises(error): learn.fit(1)
    with Kernels() as kernels: shallow[0](shallow[1])
    assert kernels.calls[0][2] == (3, 0, 0) and torch.overrides._get_current_function_mode() is None


@pytest.mark.parametrize('opt_func', [Adam, fused(Adam)])
def test_learner_runs_the_optimizer_without_the_mode(avx512, has, opt_func):
    "✗ Each of its operations took longer."
    has('bf16')
    modes = []
    def _note(): modes.append(type(torch.overrides._get_current_function_mode()))
    learn = learner(opt_func=opt_func).to_channelslast(amp_mode='bf16')
    learn.create_opt()
    class Group(list):  # both methods go through the parameters
        def __iter__(self): _note(); return super().__iter__()
    class Look(Callback):
        def after_step(self): modes.append('after_step'); _note()
    learn.opt.param_lists = type(learn.opt.param_lists)([Group(o) for o in learn.opt.param_lists])
    learn.fit(1, cbs=Look())
    calls = [[*g] for k, g in itertools.groupby(modes, lambda o: o == 'after_step') if not k]
    assert {o for c in calls[:1] for o in c} == {type(None)} and len(calls) == 5
    for c in calls[1:]: assert c[0] is SafeConvolutions and len(c) > 1 and {*c[1:]} == {type(None)}


@pytest.mark.parametrize('cb, run, wanted', [(FoldBatchNorm, FoldedModel, SafeConvolutions), (CompilePredictions, FrozenModel, type(None))])
def test_learner_compares_the_model_and_runs_compiled_code_without_the_mode(avx512, has, uncompiled, monkeypatch, cb, run, wanted):
    "✗ Reading the version, shape and address of each tensor took longer: 2.5 ms of 15 in a prediction of MobileNetV3-L."
    has('bf16')
    modes = {}
    def _note(cls, name):
        f = getattr(cls, name)
        def _noted(*args, **kwargs):
            modes.setdefault(name, set()).add(type(torch.overrides._get_current_function_mode()))
            return f(*args, **kwargs)
        monkeypatch.setattr(cls, name, _noted)
    learn = learner(cbs=cb()).to_channelslast(amp_mode='bf16')
    with learn.no_bar(): learn.validate()
    for name in 'same_structure', 'same_memory', '_values': _note(ModelState, name)
    _note(run, name := '__call__' if run is FoldedModel else '_call')
    with learn.no_bar(): learn.validate()
    assert modes.pop(name) == {wanted} and len(modes) == 3 and all(o == {type(None)} for o in modes.values())


def stem(): return nn.Sequential(conv(3, 16, 1, stride=2), nn.ReLU(), conv(16, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


class Step(nn.Module):
    "A strided 1×1 convolution by a function."
    def __init__(self): super().__init__(); self.net, self.kernel = stem(), nn.Parameter(torch.randn(16, 3, 1, 1))
    def forward(self, x): return self.net[1:](F.conv2d(x, self.kernel, stride=2))


def test_learner_trains_layers_with_which_pytorch_crashes():
    "✗ Strided 1×1 layers of few channels, also by a function, and a dilated layer none of whose columns reads the input."
    out = run_python("""
dilated = nn.Sequential(conv(12, 16, 1, stride=2, padding=(0, 1), dilation=2), *stem()[3:-1], nn.Linear(16, 4))
for net, shape in (stem(), (3, 64, 64)), (stem(), (3, 128, 128)), (Step(), (3, 64, 64)), (dilated, (12, 17, 1)):
    grads, dls = [], loaders(shape, n=5, bs=5)
    for last in False, True:
        torch.manual_seed(0)
        learn = learner(copy.deepcopy(net), dls, lr=0.)
        if last: learn.to_channelslast(to_fp16=False)
        class Keep(Callback):
            def before_step(self): grads.append([p.grad.clone() for p in self.model.parameters() if p.grad is not None])
        learn.fit(3, cbs=Keep())
    for g in grads:
        for a, b in zip(g, grads[0]): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    print('equal', len(grads))""")
    assert out.count('equal 6') == 4


@pytest.fixture
def no_compiler(monkeypatch):
    "Compiled code is traced by `torch.compile`, and then run as it is."
    monkeypatch.setattr(torch, 'compile', lambda f, real=torch.compile, **kwargs: real(f, **{'backend': 'aot_eager', **kwargs}))
    monkeypatch.setattr(torch._inductor, 'compile', lambda graph, inputs: graph.forward)


@pytest.mark.parametrize('cls, run', [(CompileTraining, lambda learn: learn.fit(2)), (CompilePredictions, lambda learn: [learn.get_preds() for _ in range(2)])])
@pytest.mark.parametrize('net, reason', [(Shallow, "oneDNN's kernels compute one of its convolutions wrongly"), (convnet, '')])
@pytest.mark.filterwarnings('ignore')
def test_learner_compiles_models_in_the_mode_unless_a_layer_is_misread(avx512, no_compiler, cls, run, net, reason):
    torch._dynamo.reset()
    learn = learner(net(), loaders((3, 5, 6, 6) if net is Shallow else (3, 8, 8), n=4, bs=2), cbs=cls()).to_channelslast(to_fp16=False)
    cb, = learn._grab_cbs(cls)
    with learn.no_logging(): run(learn)
    assert (cb.reason, bool(cb.compiled)) == (reason, not reason)


@pytest.mark.filterwarnings('ignore')
def test_learner_exports_after_an_interruption(has, tmp_path):
    has('bf16')
    class Interrupt(Callback):
        order = 60
        def after_backward(self): raise KeyboardInterrupt
    learn = learner(stem(), image_folder(tmp_path), path=tmp_path).to_channelslast(amp_mode='bf16', fp32_layers='0')
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Interrupt())
    learn.remove_cb(Interrupt)
    learn.export('e.pkl')
    loaded = load_learner(tmp_path/'e.pkl', cpu=False)
    assert not {'_entered', '_in_fp32', '_handles'} & {*vars(loaded.channels_last), *vars(loaded.mixed_precision)}


# all that this CPU computes in the mode is right, whatever the conditions say

@pytest.mark.parametrize('seeds', [range(0, 12), range(12, 24)])
def test_random_convolutions_are_right(seeds):
    assert [(seed, k, v) for seed in seeds for k, v in errors(seed).items() if v] == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == 'win32', reason='no os.fork')
def test_many_random_convolutions_are_right_in_memory_full_of_NaN():
    env = {**os.environ, 'MALLOC_MMAP_MAX_': '0'}
    out = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'tests.conv_fuzz', '24', '1000', '60'], capture_output=True, text=True, env=env, cwd=ROOT)
    assert out.returncode == 0 and re.search(r'^\d+ convolutions, 0 wrong$', out.stdout, re.M), out.stdout[-2000:] + out.stderr[-500:]
