"Wrong uses of each public call give one clear error or a documented result, and leave the Learner unchanged."
import re
import warnings

import numpy as np
import pytest
import torch
from fastai.vision.all import (SGD, Adam, CancelFitException, CastToTensor, Callback, DataLoader, DataLoaders, Learner, Lookahead,
                               MixedPrecision, NonNativeMixedPrecision, OptimWrapper, Recorder, partial, ranger)
from torch import nn

from channelslast import ChannelsLast, FoldBatchNorm, fused, less_random
from .helpers import Bomb, Fails, convnet, difference, learner, learner_state, loaders

nan, inf = float('nan'), float('inf')


class Call:
    "A call of a Learner's method, written as it is typed."
    def __init__(self, name, *args, **kwargs): self.name, self.args, self.kwargs = name, args, kwargs
    def __call__(self, learn): return getattr(learn, self.name)(*self.args, **self.kwargs)
    def __repr__(self):
        def _short(v): return o if len(o := repr(v)) < 25 else type(v).__name__
        return f"{self.name}({', '.join([*map(_short, self.args), *(f'{k}={_short(v)}' for k, v in self.kwargs.items())])})"


to, back, fp16, bf16 = (partial(Call, o) for o in ('to_channelslast', 'to_contiguous', 'to_fp16', 'to_bf16'))
summary, find, fastest = (partial(Call, o) for o in ('format_summary', 'format_find', 'to_fastest'))
FIND = find(num_it=1, show_plot=False, precisions='fp32', optimizer=False)


# Learners

class Wrapped(nn.Module):
    "A network that can hold modules and tensors that it does not use."
    def __init__(self, *changes):
        super().__init__()
        self.net = convnet()
        for change in changes: change(self)
    def forward(self, x): return self.net(x)


class Broken:
    def __len__(self): return 8
    def __getitem__(self, i): raise OSError('image file is truncated')


class NoParameters(nn.Module):
    def forward(self, x): return x.mean((2, 3))


def with_items(items, **kwargs): return learner(dls=DataLoaders(*[DataLoader(items, bs=4, **kwargs)]*2))
def no_items(): return with_items([])
def too_few_items(): return with_items([(torch.randn(3, 8, 8), torch.tensor(1))]*3, drop_last=True)
def no_labels(): return with_items([(torch.randn(3, 8, 8),)]*4, n_inp=1)
def integer_images(): return with_items([(torch.ones(3, 8, 8, dtype=torch.uint8), torch.tensor(1))]*4)
def unknown_labels(): return with_items([(torch.randn(3, 8, 8), torch.tensor(99))]*4)
def broken_items(): return with_items(Broken())
def no_loader(): return Learner(DataLoaders(), convnet(), nn.CrossEntropyLoss())
def vectors(): return learner(nn.Linear(5, 4), loaders((5,)))
def four_channels(): return learner(dls=loaders((4, 8, 8)))
def no_parameters(): return learner(NoParameters())
def on_meta(): return learner(convnet().to('meta'))
def lazy(): return learner(nn.Sequential(nn.LazyConv2d(4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
def weights_in_fp16(): return learner(convnet().half())
def weights_in_bf16(): return learner(convnet().bfloat16())
def frozen(): return learner(convnet().requires_grad_(False))
def non_native(): return learner(cbs=NonNativeMixedPrecision())
def fails(error): return learner(nn.Sequential(convnet(), Fails(error('stop here'), lambda x: True)))
def interrupted(): return fails(KeyboardInterrupt)
def out_of_memory(): return fails(MemoryError)
def failing(): return fails(RuntimeError)
def no_loss():
    learn = learner()
    learn.loss_func = None
    return learn
def opted():
    learn = learner()
    learn.create_opt()
    return learn
def empty_layer(): return learner(nn.Sequential(convnet(), nn.Sequential()))
def layer_with_two_names():
    model = Wrapped()
    model.again = model.net
    return learner(model)


# wrong arguments

def table(*rows):
    "Rows of a Learner, a call, its error and a part of the error's message; the call's text names the test."
    return pytest.mark.parametrize('make, call, error, message', [pytest.param(*o, id=f'{o[0].__name__}-{o[1]}') for o in rows])


def raises_and_changes_nothing(make, call, error, message):
    learn = make()
    before = learner_state(learn)
    with warnings.catch_warnings(), pytest.raises(error, match=re.escape(message) or None) as caught:
        warnings.simplefilter('ignore')
        call(learn)
    assert difference(before, learner_state(learn)) == ''
    assert message == '' or len(str(caught.value).strip().splitlines()) <= 2 or error in (RuntimeError, IndexError)


SCALER = 'init_scale, growth_factor, backoff_factor, growth_interval, enabled'
FIND_ARGS = f'precisions, formats, num_it, show_plot, layers, train, dl, compile, optimizer, {SCALER}'


@table(
    (learner, to(scale=3), TypeError, f"to_channelslast() has no argument 'scale'; it takes to_fp16, amp_mode, fp32_layers, {SCALER}"),
    (learner, to(device='cuda'), TypeError, "no argument 'device'"),
    (learner, to(amp_mode='bf16', growth=2), TypeError, "no argument 'growth'"),
    (learner, to(amp_mode='x'), ValueError, "to_channelslast(amp_mode='x'): pass 'fp16' or 'bf16', or `to_fp16=False` to add no mixed precision"),
    (learner, to(amp_mode='FP16'), ValueError, "'fp16' or 'bf16'"),
    (learner, to(amp_mode='fp32'), ValueError, 'to_fp16=False'),
    (learner, to(amp_mode=torch.float16), ValueError, 'amp_mode=torch.float16'),
    (learner, to(amp_mode=[]), ValueError, 'amp_mode=[]'),
    (learner, to(amp_mode=True), ValueError, 'amp_mode=True'),
    (learner, to(to_fp16='bf16'), ValueError, "to_channelslast(to_fp16='bf16'): use True or False; the dtype goes into `amp_mode`"),
    (learner, to(to_fp16=None), ValueError, 'use True or False'),
    (learner, to(to_fp16=2), ValueError, 'use True or False'),
    (learner, to(use_amp='fp16'), ValueError, "to_channelslast(use_amp='fp16'): use True or False"),
    (learner, to(init_scale=-1), ValueError, 'to_channelslast(init_scale=-1): use a number above 0 that fp32 can hold'),
    (learner, to(init_scale=0), ValueError, 'init_scale=0'),
    (learner, to(init_scale=inf), ValueError, 'init_scale=inf'),
    (learner, to(init_scale=nan), ValueError, 'init_scale=nan'),
    (learner, to(init_scale='big'), ValueError, "init_scale='big'"),
    (learner, to(init_scale=None), ValueError, 'init_scale=None'),
    (learner, to(init_scale=1e39), ValueError, 'init_scale=1e+39'),
    (learner, to(growth_factor=1.), ValueError, 'to_channelslast(growth_factor=1.0): use a number above 1'),
    (learner, to(growth_factor=inf), ValueError, 'growth_factor=inf'),
    (learner, to(growth_factor=nan), ValueError, 'growth_factor=nan'),
    (learner, to(backoff_factor=0.), ValueError, 'to_channelslast(backoff_factor=0.0): use a number between 0 and 1'),
    (learner, to(backoff_factor=1.), ValueError, 'backoff_factor=1.0'),
    (learner, to(growth_interval=0), ValueError, 'to_channelslast(growth_interval=0): use a whole number of at least 1'),
    (learner, to(growth_interval=1e3), ValueError, 'growth_interval=1000.0'),
    (learner, to(growth_interval='3'), ValueError, "growth_interval='3'"),
    (learner, to(enabled='no'), ValueError, "to_channelslast(enabled='no'): use True or False"),
    (learner, to(enabled=None), ValueError, 'enabled=None'),
    (learner, to(fp32_layers='55'), ValueError, "to_channelslast(fp32_layers=…): the model has no module '55'; did you mean '5'?"),
    (learner, to(fp32_layers='nope'), ValueError, "no module 'nope'; pass names as in `model.named_modules()`"),
    (learner, to(fp32_layers=['0', '55']), ValueError, "did you mean '5'"),
    (learner, to(fp32_layers=''), ValueError, "no module ''"),
    (learner, to(fp32_layers=3), TypeError, ''),
    (learner, to(fp32_layers=[3]), ValueError, 'no module 3'),
    (learner, to(fp32_layers=[None]), ValueError, 'no module None'),
    (learner, to(fp32_layers=[nn.Conv2d(1, 1, 1)]), ValueError, 'no module Conv2d'),
    (learner, to(fp32_layers=nn.Conv2d(1, 1, 1)), ValueError, 'no module Conv2d'),
    (learner, to(fp32_layers=lambda m: m.groups == 8), AttributeError, 'groups'),
    (layer_with_two_names, to(fp32_layers='again'), ValueError, "no module 'again'"))
def test_to_channelslast_with_a_wrong_argument_raises_and_changes_nothing(make, call, error, message):
    raises_and_changes_nothing(make, call, error, message)


@table(
    (learner, back(to_fp32='x'), ValueError, "to_contiguous(to_fp32='x'): use True or False"),
    (learner, back(to_fp32=None), ValueError, 'use True or False'),
    (learner, back(to_fp16=False), TypeError, 'to_fp16'),
    (learner, fp16(scale=3), TypeError, f"to_fp16() has no argument 'scale'; it takes amp_mode, {SCALER}"),
    (learner, fp16(device='cuda'), TypeError, f"to_fp16() has no argument 'device'; it takes amp_mode, {SCALER}"),
    (learner, fp16(init_scale=-1), ValueError, 'to_fp16(init_scale=-1): use a number above 0 that fp32 can hold'),
    (learner, fp16(amp_mode='x'), ValueError, "to_fp16(amp_mode='x'): pass 'fp16' or 'bf16', or call `learn.to_fp32()` to train in fp32"),
    (learner, bf16(scale=3), TypeError, "to_bf16() got an unexpected keyword argument 'scale'"),
    (opted, Call('load', 'nowhere'), FileNotFoundError, 'nowhere'))
def test_other_methods_with_a_wrong_argument_raise_and_change_nothing(make, call, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # fastai creates the folder for models before it finds that the file is missing
    raises_and_changes_nothing(make, call, error, message)


@table(
    (learner, summary(max_rows=0), ValueError, 'max_rows=0): use a whole number of at least 1'),
    (learner, summary(max_rows=-1), ValueError, 'a whole number of at least 1'),
    (learner, summary(max_rows='all'), ValueError, 'a whole number of at least 1'),
    (learner, summary(max_rows=1.5), ValueError, 'a whole number of at least 1'),
    (learner, summary(3), ValueError, '(batch=…) is int'),
    (learner, summary('x'), ValueError, '(batch=…) is str'),
    (learner, summary(()), ValueError, 'is an empty tuple'),
    (learner, summary([]), ValueError, 'is an empty list'),
    (learner, summary((torch.randn(4, 5),)), ValueError, 'no 4-D or 5-D'),
    (learner, summary((torch.ones(2, 3, 8, 8, dtype=torch.uint8),)), ValueError, 'torch.uint8'),
    (learner, summary((np.ones((2, 3, 8, 8)),)), ValueError, 'no tensor'),
    (learner, summary((torch.randn(2, 5, 8, 8), torch.ones(2).long())), RuntimeError, 'channels'),
    (no_items, summary(), ValueError, 'yields no batch'),
    (no_loader, summary(), ValueError, 'hold no loader'),
    (too_few_items, summary(), ValueError, 'yields no batch'),
    (vectors, summary(), ValueError, 'no 4-D or 5-D floating-point tensor'),
    (vectors, summary(), ValueError, '(8, 5)'),
    (integer_images, summary(), ValueError, 'torch.uint8'),
    (broken_items, summary(), OSError, 'truncated'),
    (no_parameters, summary(), ValueError, 'no parameters'),
    (on_meta, summary(), ValueError, 'meta device'),
    (lazy, summary(), ValueError, 'lazy modules'),
    (weights_in_fp16, summary(), RuntimeError, 'type'),
    (interrupted, summary(), KeyboardInterrupt, 'stop here'),
    (out_of_memory, summary(), MemoryError, 'stop here'),
    (unknown_labels, summary(), IndexError, '99'))
def test_format_summary_of_what_it_cannot_run_raises_and_changes_nothing(make, call, error, message):
    raises_and_changes_nothing(make, call, error, message)


@table(
    (learner, find(scale=3), TypeError, f"format_find() has no argument 'scale'; it takes {FIND_ARGS}"),
    (learner, find(lr=1), TypeError, "no argument 'lr'"),
    (learner, find(init_scale=-1), ValueError, 'format_find(init_scale=-1): use a number above 0 that fp32 can hold'),
    (learner, find(growth_factor=.5), ValueError, 'a number above 1'),
    (learner, find('fp8'), ValueError, "precisions: 'fp8' is unknown; choose from 'fp32'"),
    (learner, find(['fp32', 'FP16']), ValueError, "'FP16' is unknown"),
    (learner, find(['fp16']), ValueError, "precisions: 'fp16' is slow on this device; choose from 'fp32'"),
    (learner, find(3), ValueError, 'precisions: 3 is unknown'),
    (learner, find(formats='nhwc'), ValueError, "formats: 'nhwc' is unknown; choose from 'contiguous', 'channels_last'"),
    (learner, find(formats=torch.channels_last), ValueError, "formats: torch.channels_last is unknown; choose from 'contiguous'"),
    (learner, find(num_it=0), ValueError, 'num_it=0: use a whole number of at least 1'),
    (learner, find(num_it=2.), ValueError, 'num_it=2.0'),
    (learner, find(num_it=True), ValueError, 'num_it=True'),
    (learner, find(optimizer='fused'), ValueError, "optimizer='fused': use True or False"),
    (learner, find(optimizer=None), ValueError, 'optimizer=None'),
    (learner, find(compile='openvino'), ValueError, "compile='openvino': use True"),
    (learner, find(compile=2, train=False), ValueError, 'compile=2'),
    (learner, find(train=None), ValueError, 'train=None: use True or False'),
    (learner, find(dl=[1]), ValueError, 'only with `train=False`'),
    (learner, find(train=False, dl=3), ValueError, 'dl=3: use a DataLoader'),
    (learner, find(train=False, dl=[]), ValueError, 'yields no batch'),
    (no_items, find(), ValueError, 'loader to train on yields no batch. A Learner from `load_learner` holds no data'),
    (learner, find(train=False, dl=['a.png', 'b.png']), ValueError, 'The loader yields str, not batches of tensors: use a DataLoader, such as'),
    (learner, find(train=False, dl=torch.zeros(8, 3, 8, 8)), ValueError, 'use a DataLoader'),
    (learner, find(layers='depthwise'), ValueError, "layers='depthwise': use True or False"),
    (learner, find(train=False, dl=[np.zeros((3, 8, 8))]), ValueError, 'yields ndarray, not batches'),
    (no_items, find(train=False), ValueError, 'holds no data: to measure predictions, pass `train=False, dl=learn.dls.test_dl(files, bs=1)`'),
    (no_loader, find(), ValueError, 'hold no loader'),
    (no_labels, find(), ValueError, 'yields no labels'),
    (broken_items, find(), OSError, 'truncated'),
    (no_parameters, find(), ValueError, 'no parameters'),
    (on_meta, find(), ValueError, 'meta device'),
    (lazy, find(), ValueError, 'lazy modules'),
    (frozen, find(), ValueError, 'nothing to train'),
    (weights_in_fp16, find(), ValueError, 'float16'),
    (weights_in_bf16, find(), ValueError, 'bfloat16'),
    (no_loss, find(), TypeError, ''),
    (non_native, find(), ValueError, 'to_non_native_fp32'),
    (four_channels, find(), RuntimeError, 'channels'),
    (interrupted, find(), KeyboardInterrupt, 'stop here'),
    (unknown_labels, find(), IndexError, '99'))
def test_format_find_of_what_it_cannot_measure_raises_and_changes_nothing(make, call, error, message):
    raises_and_changes_nothing(make, call, error, message)


@table(
    (learner, fastest(scale=3), TypeError, "to_fastest() has no argument 'scale'; it takes show_plot, " + FIND_ARGS.replace('show_plot, ', '')),
    (learner, fastest(init_scale=-1), ValueError, 'to_fastest(init_scale=-1): use a number above 0 that fp32 can hold'),
    (learner, fastest('fp8'), TypeError, 'positional'),
    (learner, fastest(precisions='fp8'), ValueError, "choose from 'fp32'"),
    (learner, fastest(formats='nhwc'), ValueError, "formats: 'nhwc'"),
    (learner, fastest(num_it='2'), ValueError, 'a whole number of at least 1'),
    (learner, fastest(optimizer=None), ValueError, 'optimizer=None'),
    (learner, fastest(compile='yes'), ValueError, "compile='yes'"),
    (learner, fastest(train=None), ValueError, 'train=None: use True or False'),
    (learner, fastest(dl=[1]), ValueError, 'only with `train=False`'),
    (learner, fastest(train=False, dl=3), ValueError, 'dl=3: use a DataLoader'),
    (learner, fastest(train=False, dl=[]), ValueError, 'yields no batch'),
    (on_meta, fastest(), ValueError, 'meta device'),
    (frozen, fastest(), ValueError, 'nothing to train'),
    (no_items, fastest(), ValueError, 'yields no batch'),
    (failing, fastest(), RuntimeError, 'stop here'))
def test_to_fastest_of_what_it_cannot_measure_raises_and_changes_nothing(make, call, error, message):
    raises_and_changes_nothing(make, call, error, message)


def unwrapped_lookahead(params, **kwargs): return Lookahead(Adam(params, **kwargs))


@pytest.mark.parametrize('opt_func', [ranger, unwrapped_lookahead, partial(OptimWrapper, opt=torch.optim.SGD)], ids=['ranger', 'Lookahead', 'OptimWrapper'])
def test_fused_of_an_optimizer_without_a_fused_step_raises_at_the_fit(opt_func):
    message = "`fused` supports only fastai's `Adam` and `SGD`, with dense, unshared fp32 or fp64 parameters on one device"
    with pytest.raises(ValueError, match=message): learner(opt_func=fused(opt_func)).fit(1)


@pytest.mark.cuda
def test_fused_with_parameters_on_two_devices_raises():
    ps = [nn.Parameter(torch.zeros(1, device=d)) for d in ('cpu', 'cuda')]
    with pytest.raises(ValueError, match='on one device'): fused(SGD)(ps, lr=1.)


def test_callbacks_and_contexts_with_unknown_arguments_raise():
    for cls in FoldBatchNorm, ChannelsLast:
        with pytest.raises((TypeError, AssertionError)): cls(measured=True)  # the second is fastai's
    with pytest.raises((TypeError, ValueError)): less_random('x').__enter__()


def test_the_mixed_precision_of_to_channelslast_checks_its_own_arguments(has):
    has('bf16')
    mixed_precision = type(learner().to_channelslast().mixed_precision)
    assert issubclass(mixed_precision, MixedPrecision)
    with pytest.raises(ValueError, match=re.escape("(amp_mode='x'): pass 'fp16' or 'bf16'")): mixed_precision('x')
    learn = learner(cbs=mixed_precision('bf16', ['nope']))
    with pytest.raises(ValueError, match="no module 'nope'"): learn.fit(1)


# unusual Learners

def switch_train_and_go_back(learn):
    with warnings.catch_warnings(), learn.no_logging():
        warnings.simplefilter('ignore')
        learn.to_channelslast()
        learn.fit(1)
        learn.to_contiguous(to_fp32=True)
    return learn


def nan_weights(m):
    with torch.no_grad(): m.net[0].weight.fill_(nan)
def sparse(m): m.table = nn.Parameter(torch.eye(4).to_sparse())
def quantized(m): m.q = nn.Parameter(torch.quantize_per_tensor(torch.randn(2, 2, 2, 2), 0.1, 0, torch.qint8), requires_grad=False)
def integers(m): m.register_buffer('steps', torch.zeros(1, 2, 2, 2, dtype=torch.int64))
def unused(m): m.unused = nn.Conv2d(3, 5, 3)
def none(m): m.register_parameter('nothing', None)
def partly_frozen(m): m.net[0].weight.requires_grad_(False)
def two_names(m): m.again = m.net[3]
def expanded(m): m.register_buffer('wide', torch.randn(1, 3, 1, 1).expand(2, 3, 4, 4))


STRANGE = [sparse, quantized, integers, unused, none, partly_frozen, two_names, expanded]
CALLS = pytest.mark.parametrize('call', [switch_train_and_go_back, summary(), FIND], ids=['fit', 'summary', 'find'])


@pytest.mark.parametrize('changes', [STRANGE, [nan_weights], *(pytest.param([o], marks=pytest.mark.slow) for o in STRANGE)],
                         ids=lambda o: o[0].__name__ if len(o) == 1 else 'all')
@CALLS
@pytest.mark.filterwarnings('ignore')
def test_models_with_strange_parameters_work_and_stay_unchanged(changes, call):
    learn = learner(Wrapped(*changes))
    before = learner_state(learn)
    assert call(learn) is not None
    if call is not switch_train_and_go_back: assert difference(before, learner_state(learn)) == ''


@pytest.mark.parametrize('without', [[Recorder, CastToTensor], *(pytest.param([o], marks=pytest.mark.slow) for o in (Recorder, CastToTensor))])
@CALLS
@pytest.mark.filterwarnings('ignore')
def test_learners_without_fastais_own_callbacks_work(without, call):
    learn = learner()
    for cls in without: learn.remove_cbs(learn._grab_cbs(cls))
    if call is switch_train_and_go_back and Recorder in without: learn.no_logging = warnings.catch_warnings  # that takes a Recorder
    assert call(learn) is not None


class During(Callback):
    "Makes a public call in the middle of a fit."
    def __init__(self, call): self.call, self.result = call, None
    def after_batch(self):
        if self.training and self.iter == 1: self.result = self.call(self.learn)


@pytest.mark.parametrize('start, call', [
    ('contiguous', to(to_fp16=False)), ('contiguous', back()), ('channels last', back()), ('channels last', summary()), ('channels last', FIND),
    *(pytest.param(*o, marks=pytest.mark.slow) for o in (('channels last', to(to_fp16=False)), ('contiguous', summary()), ('contiguous', FIND)))], ids=str)
def test_a_public_call_inside_a_fit_leaves_the_losses_as_they_are(start, call):
    def _losses(cbs):
        with less_random(), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            learn = learner()
            if start == 'channels last': learn.to_channelslast(to_fp16=False)
            learn.fit(1, cbs=cbs)
        return [o.item() for o in learn.recorder.losses]
    assert _losses([During(call)]) == pytest.approx(_losses([]), rel=1e-4)


def test_to_fastest_that_is_interrupted_in_any_pass_leaves_the_learner_as_it_was():
    learn = learner(Bomb())
    learn.fit(1)
    before = learner_state(learn)
    for k in 1, 4:
        learn.model.arm(k, KeyboardInterrupt)
        before = learner_state(learn)
        with pytest.raises(KeyboardInterrupt): learn.to_fastest(num_it=2)
        assert difference(before, learner_state(learn)) == ''
    learn.fit(1)


def test_measuring_writes_no_files(tmp_path, monkeypatch):
    def _raise(*args, **kwargs): raise PermissionError
    learn = learner(path=tmp_path)
    monkeypatch.setattr('builtins.open', _raise)
    learn.format_summary()
    FIND(learn)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_to_contiguous_after_a_canceled_fit_converts_all_parameters():
    class Cancel(Callback):
        def before_batch(self): raise CancelFitException
    learn = learner().to_channelslast(to_fp16=False)
    learn.fit(1, cbs=Cancel())
    assert not learn.model[0].weight.is_contiguous()
    learn.to_contiguous()
    assert all(p.is_contiguous() for p in learn.model.parameters())


def test_format_summary_of_a_frozen_model_traces_the_forward_pass_only():
    learn = frozen().to_channelslast(to_fp16=False)
    summary = learn.format_summary()
    assert 'no parameter requires a gradient' in summary.verdict and summary.counts[False][1] and not summary.counts[True][1]
