"Mixed precision on the device the model is on, with some layers in fp32; and the checks of its arguments."
import math
import operator
import warnings
from contextlib import ExitStack
from difflib import get_close_matches
from itertools import accumulate

import torch
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastcore.foundation import L
from torch import nn

from ..core import devices
from ..core.autocast import DTYPES, HALF_DTYPES, cast_floats, fp32_forward
from ..core.devices import model_device, unwrap_model
from ..core.memory_format import unique_modules
from ..core.onednn_workarounds import pads_in_kernel, safe_forward
from ..core.pickle_as import pickle_as
from ..core.undo import ForwardPatch

__all__ = ['check_amp_mode', 'check_scaler', 'resolve_layers', 'DeviceMixedPrecision']

# what users ask for

def check_amp_mode(amp_mode) -> AMPMode:
    "The `AMPMode` of a name or an `AMPMode`; `ValueError` for anything else."
    try: return AMPMode(amp_mode)
    except ValueError: pass
    raise ValueError(f"amp_mode={amp_mode!r}: use 'fp16' or 'bf16' (or `to_fp16=False` to train in fp32)")


_scaler_rules = dict(
    init_scale      = (lambda v: 0 < v <= torch.finfo(torch.float32).max, 'a number above 0 that fp32 can hold'),
    growth_factor   = (lambda v: 1 < v < math.inf, 'a number above 1'),
    backoff_factor  = (lambda v: 0 < v < 1, 'a number between 0 and 1, both excluded'),
    growth_interval = (lambda v: operator.index(v) >= 1, 'a whole number from 1'),
    enabled         = (lambda v: v in (True, False), 'True or False'))


def check_scaler(**kwargs):
    "Raise `TypeError` for an argument that `GradScaler` does not have, `ValueError` for a value that it can't use."
    for k, v in kwargs.items():
        if k not in _scaler_rules:
            raise TypeError(f"to_channelslast() has no argument {k!r}; it takes to_fp16, amp_mode and GradScaler's "
                            + ', '.join(_scaler_rules))
        valid, rule = _scaler_rules[k]
        try: ok = valid(v)
        except Exception: ok = False  # no number at all
        if not ok: raise ValueError(f'{k}={v!r}: use {rule}')


# layers in fp32

def _means(asked, name, module) -> bool:
    "Is this module meant by a name, a module, a class or a function?"
    if isinstance(asked, str): return name == asked
    if isinstance(asked, nn.Module): return module is asked
    return isinstance(module, asked) if isinstance(asked, type) else asked(module)


def resolve_layers(
    model: nn.Module,
    layers, # Names as in `named_modules`, modules, classes of modules, or functions of a module; one or several
) -> list: # Names, in the model's order
    "The names of the modules meant; `ValueError` for one that the model does not have or that can't run on its own."
    modules = dict(unwrap_model(model).named_modules())
    asked = [layers] if isinstance(layers, str) or callable(layers) else list(layers)
    for o in asked:
        if isinstance(o, str) and o in modules and o or any(m is o for m in modules.values()): continue
        if callable(o) and not isinstance(o, nn.Module): continue
        near = get_close_matches(str(o), modules, 3, 0.4)
        hint = (f"did you mean {', '.join(map(repr, near))}?" if near else
                "use names as in `model.named_modules()`, or a function of a module that returns True or False")
        raise ValueError(f"fp32_layers: the model has no module {o!r}; {hint}")
    names = [n for n, m in modules.items() if n and any(_means(o, n, m) for o in asked)]
    for n in names:
        above = ['', *accumulate(n.split('.'), '{}.{}'.format)][:-1]
        script = next((o for o in above if isinstance(modules[o], torch.jit.ScriptModule)), None)
        if script is None or not {*above}.isdisjoint(names): continue
        where, use = (f'module {script!r}', f'fp32_layers={script!r}') if script else ('model', 'to_fp16=False')
        raise ValueError(f"fp32_layers: {n!r} is inside the scripted {where}, whose layers run in C++ and can't be set "
                         f"one by one; `{use}` keeps all of it in fp32")
    return names


# the callback

@pickle_as(MixedPrecision)
class DeviceMixedPrecision(MixedPrecision):
    """fastai's `MixedPrecision` on the device the model is on (fastai's own names `'cuda'` whatever the device), with
    every `GradScaler` argument kept. Where the device has no fast arithmetic of the asked type it trains in fp32 and
    says so once."""
    name, fp32_layers = 'mixed_precision', ()
    _warned, _entered, _patch = False, ExitStack(), ForwardPatch()

    def __init__(self,
        amp_mode: str|AMPMode = AMPMode.FP16, # `'fp16'` or `'bf16'`
        fp32_layers = (), # Names of modules to run outside autocast, in fp32
        **kwargs # Of `torch.amp.GradScaler`, which only fp16 uses
    ):
        super().__init__(check_amp_mode(amp_mode), **kwargs)
        self.fp32_layers = tuple(fp32_layers)

    def before_fit(self):
        self.leave()  # of a fit that this one interrupts
        where = model_device(self.model)
        device, fast = where.type, devices.autocast_is_fast(where, self.amp_mode)
        if not fast: self._warn_once(where)
        self.autocast = torch.autocast(device, DTYPES[self.amp_mode], enabled=fast)
        names = resolve_layers(self.model, self.fp32_layers) if fast else ()
        kept = [unwrap_model(self.model).get_submodule(n) for n in names]
        padded = [m for m in unique_modules(self.model) if device == 'cpu' and pads_in_kernel(m)]
        def _wrap(m, forward):
            if m in padded: forward = safe_forward(m, forward)
            return fp32_forward(forward, device, DTYPES[self.amp_mode]) if m in kept else forward
        self._patch = ForwardPatch({*padded, *kept}, _wrap)
        # bf16 has the range of fp32: nothing to scale
        enabled = fast and self.amp_mode is AMPMode.FP16 and self.kwargs.get('enabled', True)
        self.learn.scaler, self.scales = torch.amp.GradScaler(device, **{**self.kwargs, 'enabled': enabled}), L()

    def _warn_once(self, device):
        if self._warned: return
        self._warned = True
        other = next((o for o in AMPMode if o is not self.amp_mode and devices.autocast_is_fast(device, o)), None)
        use = f"use `amp_mode='{other.value}'`, which it has, or `to_fp16=False`" if other else (
              "use `to_fp16=False` to say so yourself (`amp_mode='bf16'` needs a CPU with AVX512-BF16 or AMX)")
        warnings.warn(f"This {device.type} has no fast {self.amp_mode.value}: training stays in fp32. "
                      f"To silence this, {use}.", stacklevel=2)

    def before_batch(self):
        self.leave()  # a callback may have cancelled the last batch before its loss
        self._entered = ExitStack()
        self._entered.enter_context(self.autocast)
        # on the instance and for this batch alone: outside it the model is as it was
        self._patch.apply()

    # fastai's casts float64 too, and takes every output for tensors in lists and dictionaries
    def after_pred(self): self.learn.pred = cast_floats(self.pred, torch.float32, HALF_DTYPES)

    def after_loss(self): self._entered.close()

    def leave(self):
        "Leave autocast if it is still on, and give its layers their own forward back."
        self.after_loss()
        self._patch.undo()

    after_cancel_batch = leave

    def after_fit(self):
        self.leave()
        self._patch = ForwardPatch()
        super().after_fit()
