"Autocast dtypes, layers that run in fp32 under autocast, and the autocast state."
import sys
import threading
from contextlib import contextmanager
from functools import cache, partial

import torch
from fastai.callback.fp16 import AMPMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from .nested_tensors import map_tensors

DTYPES = {AMPMode.FP16: torch.float16, AMPMode.BF16: torch.bfloat16}
HALF_DTYPES = tuple(DTYPES.values())


def cast_floats(x, to: torch.dtype, types: tuple):
    "`x`, a tensor or containers of tensors, with tensors of these dtypes cast to `to`. Container types are kept."
    return map_tensors(lambda t: t.to(to) if t.dtype in types else t, x)


_calls = threading.local()  # `.left`: modules of this thread that run in fp32, and True if they left autocast


class _Fp32Hook:
    "Pickles as a function that does nothing, so that a model pickled in a batch loads without this library."
    def __init__(self, device_type, half): self.device_type, self.half = device_type, half
    def __deepcopy__(self, memo): return self
    def __reduce__(self): return partial, (sys.audit, 'torch.nn.Module.forward')


class _LeaveAutocast(_Fp32Hook):
    "Forward pre-hook: leave autocast and cast the inputs to fp32."
    def __call__(self, module, args, kwargs=None): # Without `kwargs` while another thread registers or removes it
        leaves = torch.is_autocast_enabled(self.device_type)
        vars(_calls).setdefault('left', []).append((module, leaves))
        if not leaves: return None
        torch.set_autocast_enabled(self.device_type, False)
        return cast_floats(args if kwargs is None else (args, kwargs), torch.float32, HALF_DTYPES)


class _ReturnToAutocast(_Fp32Hook):
    "Forward hook: return to autocast and cast the output back. Also called after an error, maybe of an earlier hook."
    def __call__(self, module, args, out):
        left = vars(_calls).get('left')
        if not left or left[-1][0] is not module or not left.pop()[1]: return None
        torch.set_autocast_enabled(self.device_type, True)
        return cast_floats(out, self.half, (torch.float32,))


@cache
def _fp32_hooks(device_type, half) -> tuple: # The same objects in each batch: a copy of the model has them, too
    return _LeaveAutocast(device_type, half), _ReturnToAutocast(device_type, half)


def run_in_fp32(module, device_type: str, half: torch.dtype) -> list: # Handles, whose `remove()` undoes it
    """Have a module run outside autocast: half-precision inputs are cast to fp32, and fp32 outputs back to `half`. Hooks
    get the module that runs, so copies and replicas of the module do the same, each in its own thread."""
    leave, back = _fp32_hooks(device_type, half)
    if not isinstance(module, torch.jit.ScriptModule):
        return [module.register_forward_pre_hook(leave, with_kwargs=True),
                module.register_forward_hook(back, always_call=True)]
    def _own(hook): return lambda m, *args: hook(m, *args) if m is module else None
    return [register_module_forward_pre_hook(_own(leave)),  # scripts take hooks of all modules only
            register_module_forward_hook(_own(back), always_call=True)]


def _open_contexts() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()  # the depth, which PyTorch gives no other way


@contextmanager
def restore_autocast(device_type: str):
    "Context manager: restores autocast's state on exit if the code inside left autocast contexts open."
    if not torch.amp.is_autocast_available(device_type):
        yield
        return
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    before = _open_contexts()
    try: yield
    finally:
        left_open = _open_contexts() - before
        if left_open > 0:
            for _ in range(left_open): torch.autocast_decrement_nesting()
            torch.clear_autocast_cache()
            torch.set_autocast_enabled(device_type, enabled)
            torch.set_autocast_dtype(device_type, dtype)
