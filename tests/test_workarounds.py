"What PyTorch gets wrong in channels last on a CPU: a strided 1×1 convolution of few channels."
import subprocess
import sys
from copy import deepcopy  # noqa: F401  for the process of its own

import pytest
import torch
from fastai.vision.all import Callback, CrossEntropyLossFlat, Learner, load_learner
from torch import nn
from torch.utils.checkpoint import checkpoint

from channelslast.workarounds import overruns, replace_forwards, unstrided
from .conftest import convnet, learner, loaders
from .test_callback import image_folder

conv = nn.Conv2d


@pytest.mark.parametrize('m, risky', [
    (conv(3, 8, 1, stride=2), True), (conv(15, 8, 1, stride=(1, 2)), True), (conv(3, 8, 1, stride=2, padding='valid'), True),
    (conv(16, 8, 1, stride=2), False), (conv(3, 8, 1), False), (conv(3, 8, 3, stride=2), False), (conv(3, 8, (1, 3), stride=2), False),
    (conv(3, 8, 1, stride=2, padding=1), False), (conv(4, 8, 1, stride=2, groups=2), False), (nn.Conv3d(3, 8, 1, stride=2), False),
    (nn.ConvTranspose2d(3, 8, 1, stride=2), False), (nn.Linear(3, 8), False)])
def test_which(m, risky): assert overruns(m) == risky


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
    x, y = m(a), unstrided(m, m.forward)(b)
    torch.testing.assert_close(x, y)
    g = torch.randn_like(x)
    for one, two in zip(torch.autograd.grad(x, (a, m.weight), g), torch.autograd.grad(y, (b, m.weight), g)): torch.testing.assert_close(one, two)
    assert m.stride == (stride if isinstance(stride, tuple) else (stride, stride))


def stem(): return nn.Sequential(conv(3, 16, 1, stride=2), nn.ReLU(), conv(16, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def test_trains_where_pytorch_crashes():
    "✗ In a process of its own, since that ends it, or writes where it should not."
    code = """
from tests.test_workarounds import *
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
    "What a fit keeps, functions among it, does not travel."
    has('bf16')
    learn = learner(stem(), image_folder(tmp_path), path=tmp_path).to_channelslast(amp_mode='bf16', fp32_layers='0')
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Interrupt())
    learn.remove_cb(Interrupt)
    learn.export('e.pkl')
    loaded = load_learner(tmp_path/'e.pkl', cpu=False)
    assert not {'_made', '_undo', '_layers'} & {*vars(loaded.channels_last), *vars(loaded.mixed_precision)}


class Checkpointed(nn.Module):
    "Runs its layers again in the backward pass."
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
    "Layers run again in the backward pass run as they did in the forward pass."
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


def test_made_once():
    "A compiled model would compile again for each new function."
    m, made = stem()[0], {}
    first = (undo := replace_forwards([m], unstrided, made), m.forward)[1]
    undo()
    replace_forwards([m], unstrided, made)
    assert m.forward is first


def test_contiguous_learners_are_left_alone():
    learn, seen = Learner(loaders(), stem(), CrossEntropyLossFlat()), []
    class Look(Callback):
        def before_batch(self): seen.append('forward' in vars(self.model[0]))
    learn.fit(1, cbs=Look())
    assert not any(seen)
