"Where a model is, what that device is fast at, waiting for it, and timing on it."
import time
from itertools import chain

import torch
from fastai.callback.fp16 import AMPMode
from torch import nn

__all__ = ['model_device', 'fit_device', 'unwrapped', 'accelerates', 'synchronize', 'elapsed_ms', 'rank0s']


def model_device(model) -> torch.device:
    "The device of the model's first parameter or buffer; the CPU for a model that has neither."
    t = next(chain(model.parameters(), model.buffers()), None)
    return torch.device('cpu') if t is None else t.device


def fit_device(learn) -> torch.device:
    "The device that the Learner will train on: fastai moves the model there when a fit begins."
    return torch.device(getattr(learn.dls, 'device', None) or model_device(learn.model))


def unwrapped(model) -> nn.Module:
    "The user's own module inside `torch.compile`, `DataParallel` and `DistributedDataParallel`."
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)): model = model.module
        elif '_orig_mod' in vars(model).get('_modules', ()): model = model._orig_mod
        else: return model


def accelerates(
    device_type: str, # `'cpu'`, `'cuda'`, `'mps'`, …
    amp_mode: AMPMode,
) -> bool:
    """True where autocast to this type makes a device compute faster, not only differently.

    A CPU without instructions for it emulates it many times slower than fp32. oneDNN knows which it is, but calls two
    things supported that are slow: bf16 on CPUs with AVX512 and without AVX512-BF16, which takes 4 times as long as
    fp32; and fp16 on CPUs with AVX512-FP16 (Xeons since 2023), where a convolution's two passes take 8 to 139 times
    as long. Its list of kernels (`src/cpu/cpu_convolution_list.cpp`) has one for the weights' gradient in fp16 with
    AMX-FP16 alone, and CPUs with that have bf16, too: so fp16 is for other devices."""
    if not torch.amp.is_autocast_available(device_type): return False
    if device_type == 'cpu':
        if amp_mode is AMPMode.FP16: return False
        test = getattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', None)  # no such op: no oneDNN here
        return bool(test and test()) and not _emulates_bf16()
    if device_type == 'cuda' and amp_mode is AMPMode.BF16:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True


def _emulates_bf16() -> bool:
    "An x86 CPU with AVX512, but neither its extension for bf16 nor AMX: Skylake to Ice Lake, or a cloud hides them."
    def _has(feature): return getattr(torch.cpu, f'_is_{feature}_supported')()
    return _has('avx512') and not _has('avx512_bf16') and not _has('amx_tile')


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


def rank0s(x):
    "Rank 0's `x` in a distributed run, that all processes do the same; elsewhere `x`. Whatever pickles."
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()): return x
    torch.distributed.broadcast_object_list(shared := [x], src=0)
    return shared[0]
