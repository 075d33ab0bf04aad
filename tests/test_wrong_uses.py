"Wrong uses of each public call give one clear error or a documented result, and leave the Learner unchanged."
import hashlib
import pickle
import random
import re
import warnings

import numpy as np
import pytest
import torch
from fastai.vision.all import (CancelFitException, CastToTensor, Callback, DataLoader, DataLoaders, Learner,
                               NonNativeMixedPrecision, Recorder)
from torch import nn

from channelslast import ChannelsLast, less_random
from channelslast.learner.mixed_precision import DeviceMixedPrecision
from .conftest import convnet, learner, loaders

nan, inf = float('nan'), float('inf')


def checksum(learn) -> str:
    "Checksum of all that a user cares about: tensors with their strides, optimizer, modes, callbacks, random states."
    opt = getattr(learn.opt, 'opt', learn.opt)
    tensors = [*learn.model.parameters(), *learn.model.buffers(), *(p.grad for p in learn.model.parameters()),
               *(v for p in learn.model.parameters() if opt and p in opt.state for v in opt.state[p].values() if isinstance(v, torch.Tensor))]
    def _bytes(t):
        if t is None or t.is_meta: return str(t is None)
        if nn.parameter.is_lazy(t): return 'lazy'
        t = t.detach()
        if t.layout is torch.strided: return (t.stride(), t.dtype, t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return t.to_dense().numpy().tobytes()
    state = [_bytes(t) for t in tensors], [m.training for m in learn.model.modules()], [(type(o).__name__, o.name) for o in learn.cbs]
    others = [sorted(k for k in vars(learn)), torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.get_state()[1].tobytes(),
            opt and str(opt.hypers if hasattr(opt, 'hypers') else opt.param_groups), torch.is_autocast_enabled('cpu'), torch.is_grad_enabled()]
    return hashlib.sha256(pickle.dumps((state, others))).hexdigest()


class Wrapped(nn.Module):
    "A network that can hold modules and tensors it does not use."
    def __init__(self):
        super().__init__()
        self.net = convnet()
    def forward(self, x): return self.net(x)


def with_model(f):
    m = Wrapped()
    f(m)
    return m


class NoParameters(nn.Module):
    def forward(self, x): return x.mean((2, 3))


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.calls = nn.Conv2d(3, 4, 1), 0
    def forward(self, x):
        self.calls += 1
        raise self.error('stop here')


def failing(error):
    m = Fails()
    m.error = error
    return learner(m)


def empty(): return DataLoaders(DataLoader([], bs=4), DataLoader([], bs=4))
def short(): return DataLoaders(*[DataLoader([(torch.randn(3, 8, 8), torch.tensor(1))]*3, bs=4, drop_last=True)]*2)
def unlabelled(): return DataLoaders(*[DataLoader([(torch.randn(3, 8, 8),)]*4, bs=4, n_inp=1)]*2)
def flat(): return DataLoaders(*[DataLoader([(torch.randn(5), torch.tensor(1))]*4, bs=4)]*2)
def integers(): return DataLoaders(*[DataLoader([(torch.ones(3, 8, 8, dtype=torch.uint8), torch.tensor(1))]*4, bs=4)]*2)
def bad_labels(): return DataLoaders(*[DataLoader([(torch.randn(3, 8, 8), torch.tensor(99))]*4, bs=4)]*2)


class Broken:
    def __len__(self): return 8
    def __getitem__(self, i): raise OSError('image file is truncated')


def broken(): return DataLoaders(*[DataLoader(Broken(), bs=4)]*2)
def no_loss():
    learn = learner()
    learn.loss_func = None
    return learn


def opted():
    learn = learner()
    learn.create_opt()
    return learn


def non_native(): return learner().add_cb(NonNativeMixedPrecision())
def off_by(n): return learner(dls=loaders((3 + n, 8, 8)))
def meta(): return learner(convnet().to('meta'))
def lazy(): return learner(nn.Sequential(nn.LazyConv2d(4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
def half(dtype): return learner(convnet().to(dtype))
def frozen(): return learner(with_model(lambda m: m.requires_grad_(False)))

to, back = (lambda **kw: lambda learn: learn.to_channelslast(**kw)), (lambda **kw: lambda learn: learn.to_contiguous(**kw))
fp16, bf16 = (lambda **kw: lambda learn: learn.to_fp16(**kw)), (lambda **kw: lambda learn: learn.to_bf16(**kw))
summary, find, fastest = ((lambda f: lambda *a, **kw: lambda learn: getattr(learn, f)(*a, **kw))(f) for f in ('format_summary', 'format_find', 'to_fastest'))

SCALER = 'init_scale, growth_factor, backoff_factor, growth_interval, enabled'
WRONG = [ # Learner, call, error, part of its message
    # messages name the called function and its arguments
    (learner, to(scale=3), TypeError, f"to_channelslast() has no argument 'scale'; it takes to_fp16, amp_mode, fp32_layers, {SCALER}"),
    (learner, fp16(scale=3), TypeError, f"to_fp16() has no argument 'scale'; it takes amp_mode, {SCALER}"),
    (learner, fp16(device='cuda'), TypeError, f"to_fp16() has no argument 'device'; it takes amp_mode, {SCALER}"),
    (learner, bf16(scale=3), TypeError, "to_bf16() got an unexpected keyword argument 'scale'"),
    (learner, find(scale=3), TypeError, f"format_find() has no argument 'scale'; it takes precisions, formats, num_it, show_plot, layers, train, dl, compile, optimizer, {SCALER}"),
    (learner, fastest(scale=3), TypeError, f"to_fastest() has no argument 'scale'; it takes show_plot, precisions, formats, num_it, layers, train, dl, compile, optimizer, {SCALER}"),
    (learner, to(init_scale=-1), ValueError, 'to_channelslast(init_scale=-1): use a number above 0 that fp32 can hold'),
    (learner, fp16(init_scale=-1), ValueError, 'to_fp16(init_scale=-1): use a number above 0 that fp32 can hold'),
    (learner, find(init_scale=-1), ValueError, 'format_find(init_scale=-1): use a number above 0 that fp32 can hold'),
    (learner, fastest(init_scale=-1), ValueError, 'to_fastest(init_scale=-1): use a number above 0 that fp32 can hold'),
    (learner, to(amp_mode='x'), ValueError, "to_channelslast(amp_mode='x'): pass 'fp16' or 'bf16', or `to_fp16=False` to add no mixed precision"),
    (learner, fp16(amp_mode='x'), ValueError, "to_fp16(amp_mode='x'): pass 'fp16' or 'bf16', or call `learn.to_fp32()` to train in fp32"),
    (learner, lambda learn: DeviceMixedPrecision('x'), ValueError, "DeviceMixedPrecision(amp_mode='x'): pass 'fp16' or 'bf16'"),
    (learner, to(to_fp16='x'), ValueError, "to_channelslast(to_fp16='x'): use True or False"),
    (learner, to(fp32_layers='55'), ValueError, "to_channelslast(fp32_layers=…): the model has no module '55'; did you mean '5'?"),
    (learner, back(to_fp32='x'), ValueError, "to_contiguous(to_fp32='x'): use True or False"),
    # to_channelslast
    (learner, to(amp_mode='fp8'), ValueError, "'fp16' or 'bf16'"),
    (learner, to(amp_mode='FP16'), ValueError, "'fp16' or 'bf16'"),
    (learner, to(amp_mode='fp32'), ValueError, 'to_fp16=False'),
    (learner, to(amp_mode=torch.float16), ValueError, 'amp_mode='),
    (learner, to(amp_mode=[]), ValueError, 'amp_mode='),
    (learner, to(amp_mode=True), ValueError, 'amp_mode='),
    (learner, to(to_fp16='bf16'), ValueError, 'the dtype goes into `amp_mode`'),
    (learner, to(to_fp16=None), ValueError, 'use True or False'),
    (learner, to(to_fp16=2), ValueError, 'use True or False'),
    (learner, to(use_amp='yes'), ValueError, 'use True or False'),
    (learner, to(init_scale=0), ValueError, 'a number above 0'),
    (learner, to(init_scale=-1.), ValueError, 'a number above 0'),
    (learner, to(init_scale=inf), ValueError, 'a number above 0'),
    (learner, to(init_scale=nan), ValueError, 'a number above 0'),
    (learner, to(init_scale='big'), ValueError, 'a number above 0'),
    (learner, to(init_scale=None), ValueError, 'a number above 0'),
    (learner, to(init_scale=1e39), ValueError, 'that fp32 can hold'),
    (learner, to(growth_factor=1), ValueError, 'a number above 1'),
    (learner, to(growth_factor=inf), ValueError, 'a number above 1'),
    (learner, to(backoff_factor=0), ValueError, 'between 0 and 1'),
    (learner, to(backoff_factor=1.), ValueError, 'between 0 and 1'),
    (learner, to(growth_interval=0), ValueError, 'a whole number of at least 1'),
    (learner, to(growth_interval=1.5), ValueError, 'a whole number of at least 1'),
    (learner, to(growth_interval='3'), ValueError, 'a whole number of at least 1'),
    (learner, to(enabled='no'), ValueError, 'True or False'),
    (learner, to(enabled=None), ValueError, 'True or False'),
    (learner, to(growth=2), TypeError, "no argument 'growth'"),
    (learner, to(device='cuda'), TypeError, "no argument 'device'"),
    (learner, to(amp_mode='bf16', growth=2), TypeError, "no argument 'growth'"),
    (learner, to(fp32_layers='nope'), ValueError, "no module 'nope'"),
    (learner, to(fp32_layers=['0', '55']), ValueError, "did you mean '5'"),
    (learner, to(fp32_layers=''), ValueError, "no module ''"),
    (learner, to(fp32_layers=3), TypeError, ''),
    (learner, to(fp32_layers=[None]), ValueError, 'no module None'),
    (learner, to(fp32_layers=[nn.Conv2d(1, 1, 1)]), ValueError, 'no module Conv2d'),
    (learner, to(fp32_layers=lambda m: m.groups == 8), AttributeError, 'groups'),
    # to_contiguous, to_fp16
    (learner, back(to_fp32='yes'), ValueError, 'use True or False'),
    (learner, back(to_fp32=None), ValueError, 'use True or False'),
    (learner, back(to_fp16=False), TypeError, 'to_fp16'),
    (learner, fp16(amp_mode='fp8'), ValueError, "'fp16' or 'bf16'"),
    (learner, fp16(init_scale=0), ValueError, 'a number above 0'),
    (learner, fp16(scale=1), TypeError, "no argument 'scale'"),
    # format_summary
    (learner, summary(max_rows=0), ValueError, 'a whole number of at least 1'),
    (learner, summary(max_rows=-1), ValueError, 'a whole number of at least 1'),
    (learner, summary(max_rows='all'), ValueError, 'a whole number of at least 1'),
    (learner, summary(max_rows=1.5), ValueError, 'a whole number of at least 1'),
    (learner, summary(3), ValueError, '(batch=…) is int'),
    (learner, summary('x'), ValueError, '(batch=…) is str'),
    (learner, summary(()), ValueError, 'is an empty '),
    (learner, summary([]), ValueError, 'is an empty '),
    (learner, summary((torch.randn(4, 5),)), ValueError, 'no 4-D or 5-D'),
    (learner, summary((torch.ones(2, 3, 8, 8, dtype=torch.uint8),)), ValueError, 'torch.uint8'),
    (learner, summary((np.ones((2, 3, 8, 8)),)), ValueError, 'no tensor'),
    (learner, summary((torch.randn(2, 5, 8, 8), torch.ones(2).long())), RuntimeError, 'channels'),
    (lambda: learner(dls=empty()), summary(), ValueError, 'yields no batch'),
    (lambda: Learner(DataLoaders(), convnet(), nn.CrossEntropyLoss()), summary(), ValueError, 'hold no loader'),
    (lambda: learner(dls=short()), summary(), ValueError, 'yields no batch'),
    (lambda: learner(nn.Linear(5, 3), dls=flat()), summary(), ValueError, 'no 4-D or 5-D'),
    (lambda: learner(dls=integers()), summary(), ValueError, 'torch.uint8'),
    (lambda: learner(dls=broken()), summary(), OSError, 'truncated'),
    (lambda: learner(NoParameters()), summary(), ValueError, 'no parameters'),
    (meta, summary(), ValueError, 'meta device'),
    (lazy, summary(), ValueError, 'lazy modules'),
    (lambda: half(torch.float16), summary(), RuntimeError, 'type'),
    (lambda: failing(KeyboardInterrupt), summary(), KeyboardInterrupt, 'stop here'),
    (lambda: failing(MemoryError), summary(), MemoryError, 'stop here'),
    (lambda: learner(dls=bad_labels()), summary(), IndexError, '99'),
    # format_find
    (learner, find('fp8'), ValueError, "choose from 'fp32'"),
    (learner, find(['fp32', 'FP16']), ValueError, "'FP16' can't be measured here"),
    (learner, find(3), TypeError, ''),
    (learner, find(formats='last'), ValueError, "choose from 'contiguous', 'channels_last'"),
    (learner, find(formats=torch.channels_last), TypeError, ''),
    (learner, find(num_it=0), ValueError, 'a whole number of at least 1'),
    (learner, find(num_it=2.), ValueError, 'a whole number of at least 1'),
    (learner, find(num_it=True), ValueError, 'a whole number of at least 1'),
    (learner, find(growth_factor=.5), ValueError, 'a number above 1'),
    (learner, find(lr=1), TypeError, "no argument 'lr'"),
    (lambda: learner(dls=empty()), find(), ValueError, 'yields no batch'),
    (lambda: learner(dls=unlabelled()), find(), ValueError, 'yields no labels'),
    (lambda: learner(dls=broken()), find(), OSError, 'truncated'),
    (lambda: learner(NoParameters()), find(), ValueError, 'no parameters'),
    (meta, find(), ValueError, 'meta device'),
    (lazy, find(), ValueError, 'lazy modules'),
    (frozen, find(), ValueError, 'nothing to train'),
    (lambda: half(torch.float16), find(), ValueError, 'float16'),
    (lambda: half(torch.bfloat16), find(), ValueError, 'bfloat16'),
    (no_loss, find(), Exception, ''),
    (non_native, find(), ValueError, 'to_non_native_fp32'),
    (lambda: off_by(1), find(), RuntimeError, 'channels'),
    (lambda: failing(KeyboardInterrupt), find(), KeyboardInterrupt, 'stop here'),
    (lambda: learner(dls=bad_labels()), find(), IndexError, '99'),
    # to_fastest
    (learner, fastest('fp8'), TypeError, 'positional'),
    (learner, fastest(precisions='fp8'), ValueError, "choose from 'fp32'"),
    (learner, fastest(num_it='2'), ValueError, 'a whole number of at least 1'),
    (meta, fastest(), ValueError, 'meta device'),
    (frozen, fastest(), ValueError, 'nothing to train'),
    (lambda: learner(dls=empty()), fastest(), ValueError, 'yields no batch'),
    (lambda: failing(RuntimeError), fastest(), RuntimeError, 'stop here'),
    # others
    (opted, lambda learn: learn.load('nowhere'), FileNotFoundError, 'nowhere'),
    (learner, lambda learn: ChannelsLast(lr=1), Exception, ''),
    (learner, lambda learn: less_random('x').__enter__(), Exception, ''),
]


@pytest.mark.parametrize('make, call, error, message', WRONG, ids=range(len(WRONG)))
@pytest.mark.filterwarnings('ignore')
def test_wrong_use(make, call, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # fastai creates the folder for models before it finds that the file is missing
    learn = make()
    before = checksum(learn)
    with pytest.raises(error, match=re.escape(message)) as caught: call(learn)
    assert checksum(learn) == before
    assert message == '' or len(str(caught.value).strip().splitlines()) <= 2 or error in (RuntimeError, IndexError)


def test_the_table_is_long(): assert len(WRONG) >= 60


def run(learn):
    with warnings.catch_warnings(), learn.no_logging():
        warnings.simplefilter('ignore')
        learn.to_channelslast()
        learn.fit(1)
        learn.to_contiguous(to_fp32=True)
    return learn


def _nan(m):
    with torch.no_grad(): m.net[0].weight.fill_(nan)
def _sparse(m): m.table = nn.Parameter(torch.eye(4).to_sparse())
def _quantized(m): m.q = nn.Parameter(torch.quantize_per_tensor(torch.randn(2, 2, 2, 2), 0.1, 0, torch.qint8), requires_grad=False)
def _integer(m): m.register_buffer('steps', torch.zeros(1, 2, 2, 2, dtype=torch.int64))
def _unused(m): m.unused = nn.Conv2d(3, 5, 3)
def _none(m): m.register_parameter('nothing', None)
def _partly_frozen(m): m.net[0].weight.requires_grad_(False)
def _tied(m): m.again = m.net[3]
def _expanded(m): m.register_buffer('wide', torch.randn(1, 3, 1, 1).expand(2, 3, 4, 4))


@pytest.mark.parametrize('change', [_nan, _sparse, _quantized, _integer, _unused, _none, _partly_frozen, _tied, _expanded])
@pytest.mark.parametrize('call', [run, summary(), find(num_it=1, show_plot=False)], ids=['fit', 'summary', 'find'])
def test_strange_models_work(change, call):
    learn = learner(with_model(change))
    before = checksum(learn)
    assert call(learn) is not None
    if call is not run: assert checksum(learn) == before


@pytest.mark.parametrize('without', [Recorder, CastToTensor, (Recorder, CastToTensor)])
@pytest.mark.parametrize('call', [run, summary(), find(num_it=1, show_plot=False)], ids=['fit', 'summary', 'find'])
def test_removed_callbacks(without, call):
    learn = learner()
    for cls in [without] if isinstance(without, type) else without: learn.remove_cbs(learn._grab_cbs(cls))
    if call is run and without is not CastToTensor: learn.no_logging = warnings.catch_warnings  # that takes a Recorder
    assert call(learn) is not None


class During(Callback):
    "Makes a public call in the middle of a fit."
    def __init__(self, call): self.call, self.result = call, None
    def after_batch(self):
        if self.training and self.iter == 1: self.result = self.call(self.learn)


@pytest.mark.parametrize('call', [summary(), find(num_it=1, show_plot=False), to(to_fp16=False), back()],
                         ids=['format_summary', 'format_find', 'to_channelslast', 'to_contiguous'])
@pytest.mark.parametrize('start', [lambda o: o, lambda o: o.to_channelslast(to_fp16=False)], ids=['contiguous', 'channels last'])
def test_inside_a_fit(call, start):
    "The fit continues with the same losses."
    def _losses(cbs):
        with less_random(), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            learn = start(learner())
            learn.fit(1, cbs=cbs)
        return [o.item() for o in learn.recorder.losses]
    plain = _losses([])
    assert _losses([During(call)]) == pytest.approx(plain, rel=1e-4)


def test_interrupted_search(monkeypatch):
    learn = learner()
    learn.fit(1)
    before, calls = checksum(learn), iter(range(100))
    one_batch = Learner.one_batch
    def _interrupt(self, *args):
        if next(calls) == 7: raise KeyboardInterrupt
        return one_batch(self, *args)
    monkeypatch.setattr(Learner, 'one_batch', _interrupt)
    with pytest.raises(KeyboardInterrupt): learn.to_fastest()
    monkeypatch.undo()
    assert checksum(learn) == before
    learn.fit(1)


def test_read_only_directory(tmp_path, monkeypatch):
    "Measuring writes no files."
    def _raise(*args, **kwargs): raise PermissionError
    learn = learner(path=tmp_path)
    monkeypatch.setattr('builtins.open', _raise)
    learn.format_summary()
    learn.format_find(num_it=1, show_plot=False)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_a_cancelled_fit():
    class Cancel(Callback):
        def before_batch(self): raise CancelFitException
    learn = learner().to_channelslast(to_fp16=False)
    learn.fit(1, cbs=Cancel())
    learn.to_contiguous()
    assert all(p.is_contiguous() for p in learn.model.parameters())


def test_a_frozen_model_is_traced_forward():
    learn = frozen().to_channelslast(to_fp16=False)
    summary = learn.format_summary()
    assert 'no parameter requires a gradient' in summary.verdict and summary.counts[False][1] and not summary.counts[True][1]
