"Autocast: its dtypes, modules that run outside it, and its state after an error."
from contextlib import contextmanager

import torch
from fastai.callback.fp16 import AMPMode

from .nested_tensors import map_tensors

__all__ = ['DTYPES', 'HALF_DTYPES', 'cast_floats', 'fp32_forward', 'restore_autocast']

DTYPES = {AMPMode.FP16: torch.float16, AMPMode.BF16: torch.bfloat16}
HALF_DTYPES = tuple(DTYPES.values())


def cast_floats(x, to: torch.dtype, types: tuple):
    "`x`, a tensor or containers of them, with tensors of these types cast; all else, and every type, stays."
    return map_tensors(lambda t: t.to(to) if t.dtype in types else t, x)


def fp32_forward(forward, device_type: str, half: torch.dtype):
    """A module's forward outside autocast: half-precision inputs as fp32, fp32 outputs as half, so that nothing around
    it changes."""
    def _forward(*args, **kwargs):
        if not torch.is_autocast_enabled(device_type): return forward(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            args, kwargs = cast_floats((args, kwargs), torch.float32, HALF_DTYPES)
            out = forward(*args, **kwargs)
        return cast_floats(out, half, (torch.float32,))
    return _forward


def _depth() -> int:
    "How many autocast contexts are open."
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


@contextmanager
def restore_autocast(device_type: str):
    "Context manager: autocast is on or off afterwards as it was before, whoever left it in whatever state."
    if not torch.amp.is_autocast_available(device_type):
        yield
        return
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    depth = _depth()
    try: yield
    finally:
        if (left := _depth() - depth) > 0:
            for _ in range(left): torch.autocast_decrement_nesting()
            torch.clear_autocast_cache()
            torch.set_autocast_enabled(device_type, enabled)
            torch.set_autocast_dtype(device_type, dtype)
