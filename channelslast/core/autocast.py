"Autocast dtypes, forwards that run in fp32 under autocast, and the autocast state."
from contextlib import contextmanager

import torch
from fastai.callback.fp16 import AMPMode

from .nested_tensors import map_tensors

__all__ = ['DTYPES', 'HALF_DTYPES', 'cast_floats', 'fp32_forward', 'restore_autocast']

DTYPES = {AMPMode.FP16: torch.float16, AMPMode.BF16: torch.bfloat16}
HALF_DTYPES = tuple(DTYPES.values())


def cast_floats(x, to: torch.dtype, types: tuple):
    "`x`, a tensor or containers of tensors, with tensors of these dtypes cast to `to`. Container types are kept."
    return map_tensors(lambda t: t.to(to) if t.dtype in types else t, x)


def fp32_forward(forward, device_type: str, half: torch.dtype):
    "`forward` outside autocast. Inputs in half precision are cast to fp32, and fp32 outputs back to `half`."
    def _forward(*args, **kwargs):
        if not torch.is_autocast_enabled(device_type): return forward(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            args, kwargs = cast_floats((args, kwargs), torch.float32, HALF_DTYPES)
            out = forward(*args, **kwargs)
        return cast_floats(out, half, (torch.float32,))
    return _forward


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
