"The channels-last callback, and the `Learner` methods that turn it on and off."
import warnings

import torch
from fastai.callback.channelslast import ChannelsLast as _FastaiChannelsLast
from fastai.callback.fp16 import AMPMode, MixedPrecision, NonNativeMixedPrecision
from fastai.learner import Learner
from fastcore.basics import patch
from fastcore.meta import delegates

from ..core.devices import fit_device, known_problem, model_device
from ..core.memory_format import align_optimizer, convert_module, convert_nested, kernel_dims, unique_modules
from ..core.pickle_as import pickle_as
from ..core.stand_in import StandInCallback
from .fused_optimizer import restore_optimizer
from .mixed_precision import DeviceMixedPrecision, check_amp_mode, check_scaler, resolve_layers


@pickle_as(_FastaiChannelsLast)
class ChannelsLast(_FastaiChannelsLast):
    """Train and predict in PyTorch's channels-last memory format.

    Before each fit, validation and prediction, parameters and buffers with as many dimensions as the convolutions'
    weights are converted (4-D: `torch.channels_last`, 5-D: `torch.channels_last_3d`). Gradients and the optimizer's
    state get the strides of their parameters. Before each batch, inputs are converted if they have as many dimensions,
    so 5-D video clips stay as they are in a 2-D network. Tensors that already have the format are not copied.

    >>> from fastai.vision.all import *; from channelslast import *
    >>> dl = DataLoader([(torch.randn(3, 32, 32), torch.tensor(0))]*8, bs=4)
    >>> learn = Learner(DataLoaders(dl, dl), xresnet18(n_out=2), CrossEntropyLossFlat(), cbs=ChannelsLast())
    >>> with learn.no_bar(): preds, targs = learn.get_preds()
    >>> learn.model[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    True"""
    order, dims = -1, ()  # before any callback that wraps or copies the model
    quiet = False  # True if `format_find` compares numbers and speed, or has compared them, so that no warning is needed
    _warned = ()

    def before_fit(self):
        if convert_module(self.model): align_optimizer(self.learn.opt)
        self.dims = {*kernel_dims(unique_modules(self.model)).values()}
        cudnn = torch.backends.cudnn
        if model_device(self.model).type == 'cuda' and cudnn.deterministic and not cudnn.benchmark:
            self._warn_once("cuDNN is set to deterministic without benchmarking, as by fastai's `no_random`: "
                            "convolutions in channels last can fail. Use `channelslast.less_random` instead.")

    def before_train(self):
        align_optimizer(self.learn.opt)  # only training reads the optimizer's state
        self._warn_once(known_problem(model_device(self.model)))

    def _warn_once(self, message):
        "Warn of each problem once; never if the format was chosen by measuring."
        if not message or message in self._warned or self.quiet: return
        self._warned += (message,)
        warnings.warn(message, stacklevel=3)

    def before_batch(self): self.learn.xb = convert_nested(self.xb, self.dims)


@patch
@delegates(torch.amp.GradScaler, but=['device'])
def to_channelslast(self:Learner,
    to_fp16:bool=True, # Also add mixed precision (often faster, not always)
    amp_mode:str|AMPMode=None, # `'fp16'` (default) or `'bf16'`
    fp32_layers=None, # Modules to keep in fp32: names, modules, classes, or functions `f(module) -> bool`
    **kwargs
):
    """Train in channels last. Also adds mixed precision unless `to_fp16=False`. Returns the Learner.

    Existing mixed precision is kept unless this call passes `amp_mode`, `fp32_layers` or an argument of `GradScaler`.
    If the dtype is slow on the device, training continues in fp32 with a warning. `use_amp`, fastai's newer name for
    `to_fp16`, works too. The arguments of `GradScaler` affect fp16 only: https://docs.pytorch.org/docs/stable/amp.html
    Raises `TypeError` for an unknown argument and `ValueError` for an invalid value, before anything changes.

    >>> from fastai.vision.all import *; from channelslast import *
    >>> learn = Learner(DataLoaders(), xresnet18(n_out=2), CrossEntropyLossFlat()).to_channelslast(amp_mode='bf16')
    >>> learn.channels_last, learn.mixed_precision.amp_mode
    (ChannelsLast, <AMPMode.BF16: 'bf16'>)"""
    name = 'use_amp' if 'use_amp' in kwargs else 'to_fp16'
    to_fp16 = kwargs.pop('use_amp', to_fp16)
    if to_fp16 not in (True, False):
        raise ValueError(f"to_channelslast({name}={to_fp16!r}): use True or False; the dtype goes into `amp_mode`")
    check_scaler(Learner.to_channelslast, kwargs)
    fp32_hint = ', or `to_fp16=False` to add no mixed precision'
    mode = AMPMode.FP16 if amp_mode is None else check_amp_mode(amp_mode, 'to_channelslast', fp32_hint)
    layers = () if fp32_layers is None else resolve_layers(self.model, fp32_layers)
    passed = [k for k, v in dict(amp_mode=amp_mode, fp32_layers=fp32_layers).items() if v is not None] + list(kwargs)
    current = self._grab_cbs(MixedPrecision)
    if not any(isinstance(o, ChannelsLast) for o in self._grab_cbs(_FastaiChannelsLast)):
        self.remove_cb(_FastaiChannelsLast).add_cb(ChannelsLast())
    ignored, reason = passed, ''
    if not to_fp16: reason = '`to_fp16=False` adds no mixed precision'
    elif self._grab_cbs(NonNativeMixedPrecision): reason = 'the Learner has `NonNativeMixedPrecision`'
    elif passed or not current:
        ignored, reason = list(kwargs) if mode is AMPMode.BF16 else [], 'bf16 needs no gradient scaling'
        self.remove_cb(MixedPrecision).add_cb(DeviceMixedPrecision(mode, layers, **kwargs))
    elif any(type(o) is MixedPrecision for o in current) and fit_device(self).type != 'cuda':
        warnings.warn("to_channelslast() keeps fastai's own `MixedPrecision`, which works on CUDA only. "
                      "Pass `amp_mode` to replace it.", stacklevel=2)
    if fp32_layers is not None and not layers and to_fp16:
        warnings.warn("to_channelslast(): `fp32_layers` matched no module; all layers run in half precision.",
                      stacklevel=2)
    if ignored: warnings.warn(f"to_channelslast() ignores {', '.join(ignored)}: {reason}.", stacklevel=2)
    return self


@patch
def to_contiguous(self:Learner,
    to_fp32:bool=False, # Also remove mixed precision, `FoldBatchNorm`, compilations, `to_fastest`'s fused optimizer
):
    """Convert model, gradients and optimizer state to contiguous now and remove `ChannelsLast`. Returns the Learner.

    >>> from fastai.vision.all import *; from channelslast import *
    >>> learn = Learner(DataLoaders(), xresnet18(n_out=2), CrossEntropyLossFlat()).to_channelslast()
    >>> hasattr(learn.to_contiguous(to_fp32=True), 'channels_last')
    False"""
    if to_fp32 not in (True, False): raise ValueError(f"to_contiguous(to_fp32={to_fp32!r}): use True or False")
    if to_fp32: restore_optimizer(self)
    convert_module(self.model, channels_last=False)
    align_optimizer(self.opt)
    self.remove_cb(_FastaiChannelsLast)
    return self.remove_cbs([MixedPrecision, StandInCallback]) if to_fp32 else self
