"Mixed precision on the model's device, optionally with some layers in fp32, and the checks of its arguments."
import inspect
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
from ..core.autocast import DTYPES, HALF_DTYPES, cast_floats, run_in_fp32
from ..core.devices import model_device, unwrap_model
from ..core.pickle_as import pickle_as


def check_amp_mode(amp_mode, caller, fp32_hint='') -> AMPMode:
    "`amp_mode`, a name or an `AMPMode`, as an `AMPMode`; anything else raises a `ValueError` that names `caller`."
    try: return AMPMode(amp_mode)
    except ValueError:
        raise ValueError(f"{caller}(amp_mode={amp_mode!r}): pass 'fp16' or 'bf16'{fp32_hint}") from None


_SCALER_RULES = dict(
    init_scale      = (lambda v: 0 < v <= torch.finfo(torch.float32).max, 'a number above 0 that fp32 can hold'),
    growth_factor   = (lambda v: 1 < v < math.inf, 'a number above 1'),
    backoff_factor  = (lambda v: 0 < v < 1, 'a number between 0 and 1, both excluded'),
    growth_interval = (lambda v: operator.index(v) >= 1, 'a whole number of at least 1'),
    enabled         = (lambda v: v in (True, False), 'True or False'))


def check_scaler(method, kwargs):
    "Check a call of this Learner method: `TypeError` for arguments it doesn't have, `ValueError` for invalid values."
    name, known = method.__name__, list(inspect.signature(method).parameters)[1:]
    for k, v in kwargs.items():
        if k not in known: raise TypeError(f"{name}() has no argument {k!r}; it takes {', '.join(known)}")
        if k not in _SCALER_RULES: continue
        is_valid, rule = _SCALER_RULES[k]
        try: valid = is_valid(v)
        except Exception: valid = False  # not a number
        if not valid: raise ValueError(f'{name}({k}={v!r}): use {rule}')


def _matches(asked, name, module) -> bool:
    "True if this name, module, class or function selects the module."
    if isinstance(asked, str): return name == asked
    if isinstance(asked, nn.Module): return module is asked
    return isinstance(module, asked) if isinstance(asked, type) else asked(module)


def resolve_layers(model, layers, caller='to_channelslast') -> list:
    """Names, in the model's order, of the modules selected by one or several names, modules, classes or functions of a
    module. Raises a `ValueError` that names `caller` for a module that is not in the model or can't run on its own."""
    modules = dict(unwrap_model(model).named_modules())
    asked = [layers] if isinstance(layers, str) or callable(layers) else list(layers)
    for o in asked:
        if any(m is o for m in modules.values()) or (isinstance(o, str) and o and o in modules): continue
        if callable(o) and not isinstance(o, nn.Module): continue
        near = get_close_matches(str(o), modules, 3, 0.4)
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else 'pass names as in `model.named_modules()`'
        raise ValueError(f"{caller}(fp32_layers=…): the model has no module {o!r}; {hint}")
    names = [n for n, m in modules.items() if n and any(_matches(o, n, m) for o in asked)]
    for n in names:
        parents = ['', *accumulate(n.split('.'), '{}.{}'.format)][:-1]
        script = next((o for o in parents if isinstance(modules[o], torch.jit.ScriptModule)), None)
        if script is None or not {*parents}.isdisjoint(names): continue
        where, use = (f'module {script!r}', f'fp32_layers={script!r}') if script else ('model', 'to_fp16=False')
        raise ValueError(f"{caller}(fp32_layers=…): {n!r} is inside the scripted {where}, whose layers run in C++ "
                         f"and can't be set one by one; pass `{use}` to keep all of it in fp32")
    return names


@pickle_as(MixedPrecision)
class DeviceMixedPrecision(MixedPrecision):
    """fastai's `MixedPrecision`, but on the model's device (fastai's uses `'cuda'` on every device) and with every
    `GradScaler` argument respected. If the dtype is slow on the device, it trains in fp32 and warns once."""
    name, fp32_layers = 'mixed_precision', ()
    is_on = False  # in a fit on a device that is fast in the dtype
    _warned, _entered, _in_fp32, _handles = False, ExitStack(), (), ()

    def __init__(self,
        amp_mode: str|AMPMode = AMPMode.FP16, # `'fp16'` or `'bf16'`
        fp32_layers = (), # Names of modules to run outside autocast, in fp32
        **kwargs # Arguments of `torch.amp.GradScaler`, which only fp16 uses
    ):
        super().__init__(check_amp_mode(amp_mode, 'DeviceMixedPrecision'), **kwargs)
        self.fp32_layers = tuple(fp32_layers)

    def before_fit(self):
        self.leave()  # a fit inside a batch of another fit ends that batch's changes
        device = model_device(self.model)
        kind, fast = device.type, devices.autocast_is_fast(device, self.amp_mode)
        if not fast: self._warn_once(device)
        self.is_on, self.autocast = fast, torch.autocast(kind, DTYPES[self.amp_mode], enabled=fast)
        self._in_fp32 = resolve_layers(self.model, self.fp32_layers, 'DeviceMixedPrecision') if fast and self.fp32_layers else ()
        enabled = fast and self.amp_mode is AMPMode.FP16 and self.kwargs.get('enabled', True)  # bf16 has fp32's range
        self.learn.scaler, self.scales = torch.amp.GradScaler(kind, **{**self.kwargs, 'enabled': enabled}), L()

    def _warn_once(self, device):
        if self._warned: return
        self._warned = True
        mode, kind, advice = self.amp_mode.value, device.type.upper(), '`learn.to_fp32()`'
        other = next(o for o in AMPMode if o is not self.amp_mode)
        if devices.autocast_is_fast(device, other):
            advice = f"`learn.to_channelslast(amp_mode='{other.value}')` (fast here) or {advice}"
        elif kind == 'CPU': advice += ' (bf16 is fast on x86 CPUs with AVX512-BF16 or AMX)'
        problem = 'slow on this CPU' if kind == 'CPU' else f'unsupported or no faster than fp32 on this {kind} device'
        warnings.warn(f'{mode} is {problem}, so training continues in fp32. To avoid this warning, call {advice}.',
                      stacklevel=2)

    def before_batch(self):
        self.leave()  # a callback may have canceled the previous batch before its loss
        self._entered = ExitStack()
        self._entered.enter_context(self.autocast)
        half = DTYPES[self.amp_mode]  # hooks exist only in a batch: between batches the model is as without them
        modules = map(unwrap_model(self.model).get_submodule, self._in_fp32)  # `DistributedTrainer` makes new batch norms
        self._handles = [h for m in modules for h in run_in_fp32(m, self.autocast.device, half)]

    # fastai's `after_pred` casts float64 too, and expects every element of lists and dictionaries to be a tensor
    def after_pred(self): self.learn.pred = cast_floats(self.pred, torch.float32, HALF_DTYPES)

    def after_loss(self):
        self._entered.close()
        for name in 'loss', 'loss_grad':  # of a loss that runs a network; fastai's `Recorder` takes fp32 only
            if name in vars(self.learn): setattr(self.learn, name, cast_floats(vars(self.learn)[name], torch.float32, HALF_DTYPES))

    def leave(self):
        "Leave autocast if it is still on, and remove the hooks of layers in fp32."
        self._entered.close()
        for h in self._handles: h.remove()
        self._handles = ()

    after_cancel_batch = leave

    def after_fit(self):
        self.leave()
        self._in_fp32 = ()
        super().after_fit()
