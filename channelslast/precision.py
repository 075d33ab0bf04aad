"Mixed precision on the device the model is on."
import copyreg
import math
import operator
import time
import warnings
from contextlib import contextmanager
from copy import deepcopy
from difflib import get_close_matches
from itertools import chain

import torch
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastcore.foundation import L
from torch import nn
from torch.utils._pytree import tree_map_only

from .workarounds import replace_forwards

__all__ = ['model_device', 'fit_device', 'synchronize', 'elapsed_ms', 'unwrapped', 'accelerates', 'check_amp_mode', 'check_scaler', 'layer_names',
           'fp32_forward', 'keep_autocast', 'pickled_as', 'DeviceMixedPrecision']

DTYPES = {AMPMode.FP16: torch.float16, AMPMode.BF16: torch.bfloat16}


def model_device(model) -> torch.device:
    "The device of the model's first parameter or buffer; the CPU for a model that has neither."
    t = next(chain(model.parameters(), model.buffers()), None)
    return torch.device('cpu') if t is None else t.device


def synchronize(device: torch.device):
    "Wait until the device has done all that it was given."
    getattr(torch, device.type).synchronize()


def elapsed_ms(device: torch.device, f) -> float:
    "Milliseconds from an idle device until it has done all that `f()` gave it."
    synchronize(device)
    start = time.perf_counter()
    f()
    synchronize(device)
    return (time.perf_counter() - start)*1e3


def unwrapped(model) -> nn.Module:
    "The user's own module inside `torch.compile`, `DataParallel` and `DistributedDataParallel`."
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)): model = model.module
        elif isinstance(inner := vars(model).get('_modules', {}).get('_orig_mod'), nn.Module): model = inner
        else: return model


def fit_device(learn) -> torch.device:
    "The device that the Learner will train on: fastai moves the model there when a fit begins."
    return torch.device(getattr(learn.dls, 'device', None) or model_device(learn.model))


def accelerates(
    device_type: str, # `'cpu'`, `'cuda'`, `'mps'`, …
    amp_mode: AMPMode,
) -> bool:
    """True where autocast to this type makes a device compute faster, not only differently.

    A CPU without fp16 instructions emulates it many times slower than fp32; oneDNN knows which it is."""
    if not torch.amp.is_autocast_available(device_type): return False
    if device_type == 'cpu':
        test = getattr(torch.ops.mkldnn, f'_is_mkldnn_{amp_mode.value}_supported', None)  # no such op: no oneDNN here
        return bool(test and test())
    if device_type == 'cuda' and amp_mode is AMPMode.BF16: return torch.cuda.is_bf16_supported(including_emulation=False)
    return True


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


def pickled_as(base):
    """Class decorator: instances pickle as `base`, fastai's own class, so that an exported Learner loads where this
    library is not installed. Copies keep their class."""
    def _decorate(cls):
        def __reduce_ex__(self, protocol):
            if type(self) is not cls: return object.__reduce_ex__(self, protocol) # a user's own subclass
            passing = {k for k in vars(cls) if k.startswith('_') and not k.startswith('__')}  # what a fit keeps, its functions among it
            return copyreg._reconstructor, (base, object, None), {k: v for k, v in self.__getstate__().items() if k not in passing}
        def __copy__(self):
            new = type(self).__new__(type(self))
            new.__dict__.update(self.__dict__)
            return new
        def __deepcopy__(self, memo):
            new = memo[id(self)] = type(self).__new__(type(self))
            new.__dict__.update(deepcopy(self.__dict__, memo))
            return new
        cls.__reduce_ex__, cls.__copy__, cls.__deepcopy__ = __reduce_ex__, __copy__, __deepcopy__
        return cls
    return _decorate


def layer_names(
    model: nn.Module,
    layers, # Names as in `named_modules`, modules, classes of modules, or functions of a module; one or several
) -> list: # Names, in the model's order
    "The names of the modules meant; `ValueError` for a name that the model does not have."
    modules = dict(unwrapped(model).named_modules())
    asked = [layers] if isinstance(layers, str) or callable(layers) else list(layers)
    def _means(o, n, m):
        if isinstance(o, str): return n == o
        if isinstance(o, nn.Module): return m is o
        return isinstance(m, o) if isinstance(o, type) else o(m)
    for o in asked:
        if isinstance(o, str) and o in modules and o or any(m is o for m in modules.values()): continue
        if callable(o) and not isinstance(o, nn.Module): continue
        near = get_close_matches(str(o), modules, 3, 0.4)
        raise ValueError(f"fp32_layers: the model has no module {o!r}; " + (f"did you mean {', '.join(map(repr, near))}?" if near else
                         "use names as in `model.named_modules()`, or a function of a module that returns True or False"))
    return [n for n, m in modules.items() if n and any(_means(o, n, m) for o in asked)]


def _cast_floats(x, to: torch.dtype, types: tuple):
    "`x`, a tensor or containers of them, with tensors of these types cast."
    return tree_map_only(torch.Tensor, lambda t: t.to(to) if t.dtype in types else t, x)


def fp32_forward(forward, device_type: str, half: torch.dtype):
    "A module's forward outside autocast: half-precision inputs as fp32, fp32 outputs as half, so that nothing around it changes."
    def _forward(*args, **kwargs):
        if not torch.is_autocast_enabled(device_type): return forward(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            args, kwargs = _cast_floats((args, kwargs), torch.float32, (torch.float16, torch.bfloat16))
            out = forward(*args, **kwargs)
        return _cast_floats(out, half, (torch.float32,))
    return _forward


@pickled_as(MixedPrecision)
class DeviceMixedPrecision(MixedPrecision):
    """fastai's `MixedPrecision` on the device the model is on (fastai's own names `'cuda'` whatever the device), with
    every `GradScaler` argument kept. Where the device has no fast arithmetic of the asked type it trains in fp32 and says
    so once."""
    name, fp32_layers, _told, _entered, _layers, _made, _undo = 'mixed_precision', (), False, False, (), None, None

    def __init__(self,
        amp_mode: str|AMPMode = AMPMode.FP16, # `'fp16'` or `'bf16'`
        fp32_layers = (), # Names of modules to run outside autocast, in fp32
        **kwargs # Of `torch.amp.GradScaler`, which only fp16 uses
    ):
        super().__init__(check_amp_mode(amp_mode), **kwargs)
        self.fp32_layers = tuple(fp32_layers)

    def before_fit(self):
        self.leave()  # of a fit that this one interrupts
        device = model_device(self.model).type
        fast = accelerates(device, self.amp_mode)
        if not fast: self._tell(device)
        self.autocast = torch.autocast(device, DTYPES[self.amp_mode], enabled=fast)
        names = layer_names(self.model, self.fp32_layers) if fast else ()
        self._made, self._layers = {}, [unwrapped(self.model).get_submodule(n) for n in names]
        # bf16 has the range of fp32: nothing to scale
        enabled = fast and self.amp_mode is AMPMode.FP16 and self.kwargs.get('enabled', True)
        self.learn.scaler, self.scales = torch.amp.GradScaler(device, **{**self.kwargs, 'enabled': enabled}), L()

    def _tell(self, device):
        if self._told: return
        self._told = True
        other = next((o for o in AMPMode if o is not self.amp_mode and accelerates(device, o)), None)
        use = f"use `amp_mode='{other.value}'`, which it has, or `to_fp16=False`" if other else (
              "use `to_fp16=False` to say so yourself (`amp_mode='bf16'` needs a CPU with AVX512-BF16 or AMX)")
        warnings.warn(f"This {device} has no fast {self.amp_mode.value}: training stays in fp32. To silence this, {use}.",
                      stacklevel=2)

    def before_batch(self):
        self.leave()  # a callback may have cancelled the last batch before its loss
        self.autocast.__enter__()
        self._entered = True
        # on the instance and for this batch alone: outside it the model is as it was
        device, half = self.autocast.device, self.autocast.fast_dtype
        self._undo = replace_forwards(self._layers, lambda m, forward: fp32_forward(forward, device, half), self._made)

    def after_loss(self):
        if self._entered: self.autocast.__exit__(None, None, None)
        self._entered = False

    def leave(self):
        "Leave autocast if it is still on, and give its layers their own forward back."
        self.after_loss()
        if self._undo: self._undo()
        self._undo = None

    after_cancel_batch = leave

    def after_fit(self):
        self.leave()
        self._layers, self._made = (), None
        super().after_fit()


@contextmanager
def keep_autocast(device_type: str):
    "Context manager: autocast is on or off afterwards as it was before, whoever left it in whatever state."
    if not torch.amp.is_autocast_available(device_type):
        yield
        return
    def _depth():
        torch.autocast_increment_nesting()
        return torch.autocast_decrement_nesting()
    enabled, dtype, depth = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type), _depth()
    try: yield
    finally:
        if (left := _depth() - depth) > 0:
            for _ in range(left): torch.autocast_decrement_nesting()
            torch.clear_autocast_cache()
            torch.set_autocast_enabled(device_type, enabled)
            torch.set_autocast_dtype(device_type, dtype)
