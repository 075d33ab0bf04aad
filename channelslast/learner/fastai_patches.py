"""Fixes to fastai's own methods, applied to every Learner when this library is imported.

| method | fastai's | here |
|---|---|---|
| `one_batch` | leaves autocast on for the session if the model or the loss raises | autocast ends with the batch |
| `one_batch` | runs convolutions that CPU kernels compute wrongly | correct kernels compute them |
| `to_fp16`, `to_bf16` | add a second mixed precision to an existing one: the loss is scaled twice | replace it |
| `load` | gives the optimizer's state the strides that it was saved with | the strides of the current parameters |
| `before_fit` | moves the model to its device, tensor by tensor | not if all are there and it runs folded or compiled |
| `before_validate` | sets the model to eval mode, module by module | not if all are in eval mode, likewise |
| `_step`, `zero_grad` | run thousands of operations | outside the mode that corrects convolutions, which would slow them down |
| `EXPLAINED_METHODS` | raise `view` errors without mentioning channels last | a note says where, why, what to do |"""
from contextlib import contextmanager, nullcontext
from functools import partial, wraps

import torch
from fastai.callback.core import TrainEvalCallback
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.learner import Learner
from fastai.optimizer import Optimizer
from fastcore.basics import patch
from fastcore.meta import delegates
from torch import nn

from ..core.autocast import restore_autocast
from ..core.devices import fit_device
from ..core.memory_format import align_optimizer, unique_modules
from ..core.model_copy import own_dicts
from ..core.onednn_workarounds import SafeConvolutions, needs_safe_convolutions, pause_safe_convolutions
from ..core.stand_in import StandInCallback, model_of, running_fits
from .channels_last import ChannelsLast
from .fused_optimizer import FusedOptimizer, follow_opt_func
from .mixed_precision import DeviceMixedPrecision, check_amp_mode, check_scaler
from .view_errors import explain_view_errors

# together these run every model, loss function, metric, callback and optimizer; fastai's other methods call them
EXPLAINED_METHODS = 'fit', 'validate', 'get_preds', 'predict', 'tta', 'show_results', 'one_batch', 'create_opt'
_one_batch, _fit, _load = Learner.one_batch, Learner.fit, Learner.load
_before_fit, _before_validate = TrainEvalCallback.before_fit, TrainEvalCallback.before_validate


class _Stays:
    "A model on its device or in eval mode: `to` and `eval` do nothing."
    def __init__(self, model): self.model = model
    def to(self, device): return self.model
    def eval(self): return self.model
    def __getattr__(self, name): return getattr(self.model, name)


def _are_on(modules, device) -> bool:
    return {t.device for m in modules for d in own_dicts(m)[:2] for t in d.values() if t is not None} <= {device}


@contextmanager
def _skip_if_done(learn, methods, is_done):
    """In this block, `to` and `eval` do nothing if the Learner predicts with copies and `is_done(modules)` says that they would
    change nothing. Modules with `methods` of their own, such as recurrent layers, may do more, so nothing is skipped."""
    model = learn.model
    if learn._grab_cbs(StandInCallback) and isinstance(model, nn.Module):
        modules = unique_modules(model)
        plain = all(getattr(c, k) is getattr(nn.Module, k) for c in {*map(type, modules)} for k in methods)
        if plain and all(methods.isdisjoint(vars(m)) for m in modules) and is_done(modules): learn.model = _Stays(model)
    try: yield
    finally: learn.model = model


@patch
def before_fit(self:TrainEvalCallback):
    "Reset the counters, and move the model and the loss function to their device."
    with _skip_if_done(self.learn, {'to', '_apply'}, partial(_are_on, device=getattr(self.dls, 'device', None))): _before_fit(self)


@patch
def before_validate(self:TrainEvalCallback):
    "Set the model to validation mode"
    with _skip_if_done(self.learn, {'eval', 'train'}, lambda modules: not any(m.training for m in modules)): _before_validate(self)


@patch
def one_batch(self:Learner, i, b):
    "Train or evaluate `self.model` on batch `(xb,yb)`"
    # if the model or the loss raises, no event turns autocast off or removes the hooks of layers in fp32
    device, mixed = fit_device(self).type, [*self._grab_cbs(DeviceMixedPrecision)]
    half = torch.is_autocast_enabled('cpu') or any(cb.is_on for cb in mixed)
    channels_last = bool(self._grab_cbs(ChannelsLast))
    unsafe = device == 'cpu' and needs_safe_convolutions(unique_modules(self.model), half, channels_last)
    with restore_autocast(device), SafeConvolutions() if unsafe else nullcontext():
        try: _one_batch(self, i, b)
        except Exception as e:
            for cb in self._grab_cbs(StandInCallback): cb.explain(e)
            raise
        finally:
            self.model = model_of(self)
            for cb in mixed: cb.leave()


for o, name in (Learner, '_step'), (Optimizer, 'zero_grad'), (FusedOptimizer, 'zero_grad'): setattr(o, name, pause_safe_convolutions()(getattr(o, name)))


@wraps(_fit)
def _counted_fit(self, *args, **kwargs):
    follow_opt_func(self)
    running_fits[self] = running_fits.get(self, 0) + 1  # `CompilePredictions` compiles only outside a fit
    try: _fit(self, *args, **kwargs)
    finally: running_fits[self] -= 1


Learner.fit = _counted_fit


@patch
@delegates(torch.amp.GradScaler, but=['device'])
def to_fp16(self:Learner,
    amp_mode:str|AMPMode=AMPMode.FP16, # `'fp16'` or `'bf16'`
    **kwargs
):
    """Train in mixed precision, replacing any other mixed precision. Returns the Learner.

    >>> from fastai.vision.all import *; from channelslast import *
    >>> learn = Learner(DataLoaders(), nn.Linear(2, 2), MSELossFlat()).to_fp16(init_scale=1024.)
    >>> learn.mixed_precision.amp_mode
    <AMPMode.FP16: 'fp16'>"""
    mode = check_amp_mode(amp_mode, 'to_fp16', ', or call `learn.to_fp32()` to train in fp32')
    check_scaler(Learner.to_fp16, kwargs)
    kind = DeviceMixedPrecision if self._grab_cbs(DeviceMixedPrecision) else MixedPrecision
    return self.remove_cb(MixedPrecision).add_cb(kind(mode, **kwargs))


@patch
def to_bf16(self:Learner):
    """Train in bf16 mixed precision, replacing any other mixed precision. Returns the Learner.

    >>> from fastai.vision.all import *; from channelslast import *
    >>> learn = Learner(DataLoaders(), nn.Linear(2, 2), MSELossFlat()).to_fp16().to_bf16()
    >>> learn.mixed_precision.amp_mode
    <AMPMode.BF16: 'bf16'>"""
    return self.to_fp16(amp_mode=AMPMode.BF16)


@patch
@delegates(_load)
def load(self:Learner,
    file, # Name in `self.path/self.model_dir`, with or without `.pth`, or path
    device=None, # Device to load to; None: the DataLoaders' device
    **kwargs
):
    """Load model and, if `with_opt`, optimizer state, in the format of the current model. Returns the Learner.

    >>> from fastai.vision.all import *; from channelslast import *; from tempfile import mkdtemp
    >>> learn = Learner(DataLoaders([], device='cpu'), nn.Conv2d(3, 8, 3), MSELossFlat(), path=mkdtemp())
    >>> path = learn.save('model')
    >>> learn.to_channelslast(to_fp16=False).load('model') is learn
    True"""
    _load(self, file, device=device, **kwargs)
    align_optimizer(self.opt)  # the loaded state has the strides that it was saved with
    return self


for o in EXPLAINED_METHODS: setattr(Learner, o, explain_view_errors(getattr(Learner, o)))
