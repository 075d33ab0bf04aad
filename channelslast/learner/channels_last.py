"Channels last as a fastai callback, and the `Learner` methods that switch it on and off."
import warnings

import torch
from fastai.callback.channelslast import ChannelsLast as _FastaiChannelsLast
from fastai.callback.fp16 import AMPMode, MixedPrecision, NonNativeMixedPrecision
from fastai.learner import Learner
from fastcore.basics import patch
from fastcore.meta import delegates

from ..core.devices import fit_device, known_problem, model_device
from ..core.memory_format import align_optimizer, convert_module, convert_nested, kernel_dims, unique_modules
from ..core.onednn_workarounds import hits_onednn_6035, pads_in_kernel, safe_forward
from ..core.pickle_as import pickle_as
from ..core.undo import ForwardPatch
from ..fold.fold_batch_norm import FoldBatchNorm
from .mixed_precision import DeviceMixedPrecision, check_amp_mode, check_scaler, resolve_layers

__all__ = ['ChannelsLast']


@pickle_as(_FastaiChannelsLast)
class ChannelsLast(_FastaiChannelsLast):
    """Train and predict in PyTorch's channels-last memory format.

    Before each fit, validation and prediction it converts the model's 4-D (`torch.channels_last`) and 5-D
    (`torch.channels_last_3d`) parameters, buffers and gradients, and gives the optimizer's state the strides of its
    parameters. Before each batch it converts the inputs of as many dimensions as the kernels of the model's
    convolutions (clips for a 2-D network over frames stay as they are). Tensors in their format are not touched."""
    order, dims = -1, ()  # before any callback that wraps or copies the model
    measured = False  # True if `format_find` has compared its numbers and speed, so that no warning is due
    _warned, _patch = (), ForwardPatch()

    def before_fit(self):
        self.leave()  # of a fit that this one interrupts
        if convert_module(self.model): align_optimizer(self.learn.opt)
        modules, device = unique_modules(self.model), model_device(self.model).type
        self.dims = {*kernel_dims(modules).values()}
        layers = [m for m in modules if device == 'cpu' and (hits_onednn_6035(m) or pads_in_kernel(m))]
        self._patch = ForwardPatch(layers, safe_forward)
        cudnn = torch.backends.cudnn
        if device == 'cuda' and cudnn.deterministic and not cudnn.benchmark:
            self._warn("cuDNN is deterministic and may not benchmark (fastai's `no_random` sets it so): convolutions "
                       "in channels last can fail. `channelslast.less_random` makes runs repeatable without that.")

    def before_train(self):
        align_optimizer(self.learn.opt)  # predictions need not look at its state
        if fault := known_problem(model_device(self.model)): self._warn(fault)

    def _warn(self, message):
        "Say this once, unless the format was chosen by measuring."
        if message in self._warned or self.measured: return
        self._warned = *self._warned, message
        warnings.warn(message, stacklevel=3)

    def before_batch(self):
        self.learn.xb = convert_nested(self.xb, self.dims)
        self._patch.apply()

    def leave(self):
        "Give layers whose forward was replaced their own back."
        self._patch.undo()

    def after_fit(self):
        self.leave()
        self._patch = ForwardPatch()  # holds layers of the model


@patch
@delegates(torch.amp.GradScaler, but=['device'])
def to_channelslast(self:Learner,
    to_fp16:bool=True, # Add mixed precision? Needed for the full speed of channels last
    amp_mode:str|AMPMode=None, # `'fp16'` (default) or `'bf16'`
    fp32_layers=None, # Modules to leave in fp32: names as in `named_modules`, classes, or functions of a module
    **kwargs
):
    """Train in channels last, with mixed precision unless `to_fp16=False`; returns the Learner.

    Mixed precision that the Learner has is kept, unless this call names `amp_mode`, `fp32_layers` or an argument of
    `GradScaler`: then it is replaced by what the call says. Where the device has no fast arithmetic of the asked type,
    training stays in fp32 with a warning. `use_amp`, fastai's newer name of `to_fp16`, is taken too. The GradScaler
    arguments serve fp16 only: https://docs.pytorch.org/docs/stable/amp.html

    Raises `TypeError` for an unknown argument, `ValueError` for an impossible value, before anything changes."""
    to_fp16 = kwargs.pop('use_amp', to_fp16)
    if to_fp16 not in (True, False):
        raise ValueError(f"to_fp16={to_fp16!r}: use True or False (the type goes into `amp_mode`)")
    check_scaler(**kwargs)
    mode = AMPMode.FP16 if amp_mode is None else check_amp_mode(amp_mode)
    layers = () if fp32_layers is None else resolve_layers(self.model, fp32_layers)
    named = [k for k, v in dict(amp_mode=amp_mode, fp32_layers=fp32_layers).items() if v is not None] + list(kwargs)
    kept, foreign = self._grab_cbs(MixedPrecision), self._grab_cbs(NonNativeMixedPrecision)

    if not any(isinstance(o, ChannelsLast) for o in self._grab_cbs(_FastaiChannelsLast)):
        self.remove_cb(_FastaiChannelsLast).add_cb(ChannelsLast())
    idle = ()
    if not to_fp16 or foreign: idle = named
    elif named or not kept:
        if mode is AMPMode.BF16: idle = list(kwargs)
        self.remove_cb(MixedPrecision).add_cb(DeviceMixedPrecision(mode, layers, **kwargs))
    elif any(type(o) is MixedPrecision for o in kept) and fit_device(self).type != 'cuda':
        warnings.warn("This Learner keeps fastai's own `MixedPrecision`, which works on CUDA only. Name an `amp_mode` "
                      "in `to_channelslast` to replace it.", stacklevel=2)
    if fp32_layers is not None and not layers:
        warnings.warn("fp32_layers: no module of the model is meant; all layers run in half precision.", stacklevel=2)
    if idle:
        why = ('with `to_fp16=False`' if not to_fp16 else "beside `NonNativeMixedPrecision`" if foreign
               else 'in bf16, which needs no gradient scaling')
        warnings.warn(f"{', '.join(idle)}: no effect {why}.", stacklevel=2)
    return self


@patch
def to_contiguous(self:Learner,
    to_fp32:bool=False, # Remove mixed precision, and `FoldBatchNorm`, too?
):
    """Cast model, gradients and optimizer state back to contiguous at once and remove `ChannelsLast`; with `to_fp32`,
    mixed precision and `FoldBatchNorm` too. Returns the Learner."""
    if to_fp32 not in (True, False): raise ValueError(f"to_fp32={to_fp32!r}: use True or False")
    convert_module(self.model, channels_last=False)
    align_optimizer(self.opt)
    self.remove_cb(_FastaiChannelsLast)
    return self.remove_cbs([MixedPrecision, FoldBatchNorm]) if to_fp32 else self
