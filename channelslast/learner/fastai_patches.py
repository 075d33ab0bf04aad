"""fastai's own Learner methods, done again. Importing this library mends them for every Learner of the process.

| method | what fastai's does | here |
|---|---|---|
| `one_batch` | when the model or the loss raises, leaves autocast on for the whole session | it ends with the batch |
| `to_fp16`, `to_bf16` | add a second mixed precision to the one that is there: the loss is scaled twice | replace it |
| `load` | gives the optimizer the strides of the Learner that saved | those of the parameters it is loaded for |
| `EXPLAINED_METHODS` | raise `view` errors that don't say that channels last is why | a note says where, why, and what to do |"""
from contextlib import nullcontext
from weakref import WeakKeyDictionary

from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.learner import Learner
from fastcore.basics import patch
from fastcore.meta import delegates
from torch import nn

from ..core.autocast import restore_autocast
from ..core.devices import fit_device
from ..core.memory_format import align_optimizer, unique_modules
from ..core.onednn_workarounds import pads_in_kernel, safe_forward
from ..core.undo import ForwardPatch
from ..fold.fold_batch_norm import FoldBatchNorm
from .channels_last import ChannelsLast
from .mixed_precision import DeviceMixedPrecision, check_amp_mode, check_scaler
from .view_errors import explain_view_errors

__all__ = []

CONVS_3D = nn.Conv3d, nn.ConvTranspose3d
# all that runs a model, loss function, metric, callback or optimizer; the rest of fastai's methods call these
EXPLAINED_METHODS = 'fit', 'validate', 'get_preds', 'predict', 'tta', 'show_results', 'one_batch', 'create_opt'
_one_batch, _to_fp16, _load = Learner.one_batch, Learner.to_fp16, Learner.load


@patch
def one_batch(self:Learner, i, b):
    "Train or evaluate `self.model` on batch `(xb,yb)`"
    # `MixedPrecision` turns autocast on before the batch and off after the loss; no event tells it that the model or
    # the loss raised in between, and the whole session would go on in half precision. Replaced forwards serve until the
    # backward pass is over: checkpointing calls them again there. The last one put on is the first one off.
    ours = [cb for kind in (FoldBatchNorm, DeviceMixedPrecision, ChannelsLast) for cb in self._grab_cbs(kind)]
    own = any(isinstance(cb, (DeviceMixedPrecision, ChannelsLast)) for cb in ours)  # they replace forwards themselves
    convs = nullcontext() if own or fit_device(self).type != 'cpu' else _safe_convs_3d(self)
    with restore_autocast(fit_device(self).type), convs:
        try: _one_batch(self, i, b)
        finally:
            for cb in ours: cb.leave()


_caches = WeakKeyDictionary()


def _safe_convs_3d(learn):
    "Give 3-D convolutions, which PyTorch's CPU kernels compute wrongly in contiguous fp32 too, a safe forward."
    layers = [m for m in unique_modules(learn.model) if isinstance(m, CONVS_3D) and pads_in_kernel(m)]
    return ForwardPatch(layers, safe_forward, _caches.setdefault(learn, {}))


@patch
@delegates(_to_fp16)
def to_fp16(self:Learner,
    amp_mode:str|AMPMode=AMPMode.FP16, # `'fp16'` or `'bf16'`
    **kwargs
):
    "Train in mixed precision, in place of any other that the Learner has; returns the Learner."
    mode = check_amp_mode(amp_mode)
    check_scaler(**kwargs)
    ours = self._grab_cbs(DeviceMixedPrecision)
    self.remove_cb(MixedPrecision)
    return self.add_cb(DeviceMixedPrecision(mode, **kwargs)) if ours else _to_fp16(self, amp_mode=mode, **kwargs)


@patch
def to_bf16(self:Learner):
    "Train in bf16 mixed precision, in place of any other that the Learner has; returns the Learner."
    return self.to_fp16(amp_mode=AMPMode.BF16)


@patch
@delegates(_load)
def load(self:Learner,
    file, # Name, with or without `.pth`, or path
    device=None, # To load to; None: that of the DataLoaders
    **kwargs
):
    """Load model and optimizer state (if `with_opt`) from `self.path/self.model_dir/file` using `device`: fastai's own,
    but that the optimizer state takes the strides of the Learner's parameters, whatever format it was saved in."""
    _load(self, file, device=device, **kwargs)
    align_optimizer(self.opt)  # a checkpoint brings the strides of the Learner that saved it
    return self


for o in EXPLAINED_METHODS: setattr(Learner, o, explain_view_errors(getattr(Learner, o)))
