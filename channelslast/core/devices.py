"Where a model is, what that device is fast at, its memory, waiting for it, and timing on it."
import gc
import os
import re
import subprocess
import time
from functools import cache
from itertools import chain

import torch
from fastai.callback.fp16 import AMPMode
from fastai.torch_core import default_device
from fastcore.basics import noop
from torch import nn

__all__ = ['model_device', 'fit_device', 'unwrap_model', 'autocast_is_fast', 'known_problem', 'fp32_setting',
           'fp32_precision', 'is_out_of_memory', 'free_memory', 'synchronize', 'elapsed_ms']


# Turing's small chips, of capability 7.5
NO_TENSOR_CORES = re.compile(r'GTX 16|MX[45]50|\bT(400|500|550|600|1000|1200|2000)\b')


def model_device(model) -> torch.device:
    "The device of the model's first parameter or buffer; the CPU for a model that has neither."
    t = next(chain(model.parameters(), model.buffers()), None)
    return torch.device('cpu') if t is None else t.device


def fit_device(learn) -> torch.device:
    """The device that the Learner will train on: fastai moves the model there when a fit begins. In a distributed run
    `DistributedTrainer` moves it on to the process's own, while loaders made earlier stay on the first GPU."""
    accelerator = next((vars(cb)['accelerator'] for cb in learn.cbs if 'accelerator' in vars(cb)), None)
    if accelerator: return accelerator.device
    if not hasattr(learn.dls, 'device'): return default_device()  # of PyTorch's own loaders; asking starts CUDA
    return model_device(learn.model) if learn.dls.device is None else torch.device(learn.dls.device)


def unwrap_model(model) -> nn.Module:
    "The user's own module inside `torch.compile`, `DataParallel` and `DistributedDataParallel`."
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)): model = model.module
        elif '_orig_mod' in vars(model).get('_modules', ()): model = model._orig_mod
        else: return model


def autocast_is_fast(
    device, # A `torch.device` or its name: `'cpu'`, `'cuda:1'`, `'mps'`, …
    amp_mode: AMPMode,
) -> bool:
    """True where autocast to this type makes a device compute faster, not only differently.

    A CPU without instructions for it emulates it many times slower than fp32. oneDNN knows which it is, but calls two
    things supported that are slow: bf16 on CPUs with AVX512 and without AVX512-BF16, which takes 4 times as long as
    fp32; and fp16 on CPUs with AVX512-FP16 (Xeons since 2023), where a convolution's two passes take 8 to 139 times
    as long. Its list of kernels (`src/cpu/cpu_convolution_list.cpp`) has one for the weights' gradient in fp16 with
    AMX-FP16 alone, and CPUs with that have bf16, too: so fp16 is for other devices. CUDA GPUs without tensor cores
    gain nothing from fp16, and the GTX 16 series gives NaN (https://github.com/pytorch/pytorch/issues/77955). Apple's
    M1 and M2 have no instructions for bf16 (https://github.com/huggingface/transformers/issues/40458); fp16 needs a
    gradient scaler, which computes in fp64 and so raises on Intel GPUs without it, and on MPS before PyTorch 2.8
    (https://github.com/pytorch/pytorch/issues/142397)."""
    device = torch.device(device)
    if not torch.amp.is_autocast_available(device.type): return False
    if device.type == 'cpu':
        if amp_mode is AMPMode.FP16: return False
        test = getattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', None)  # no such op: no oneDNN here
        return bool(test and test()) and not _emulates_bf16()
    if device.type == 'cuda':
        with torch.cuda.device(device):
            if amp_mode is AMPMode.BF16: return torch.cuda.is_bf16_supported(including_emulation=False)
            name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
            return capability >= (7, 0) and not NO_TENSOR_CORES.search(name)
    if device.type == 'xpu' and amp_mode is AMPMode.FP16: return torch.xpu.get_device_properties(device).has_fp64
    if device.type != 'mps': return True
    if amp_mode is AMPMode.FP16: return torch_version() >= (2, 8)
    return not _apple_chip().startswith(('Apple M1', 'Apple M2'))


def torch_version() -> tuple: # `(2, 14)`
    return tuple(map(int, torch.__version__.split('.')[:2]))


@cache
def _apple_chip() -> str: # `'Apple M2 Pro'`; `''` if it can't be told
    try: return subprocess.check_output(['sysctl', '-n', 'machdep.cpu.brand_string'], text=True, timeout=10).strip()
    except (OSError, subprocess.SubprocessError): return ''


def _emulates_bf16() -> bool:
    "An x86 CPU with AVX512, but neither its extension for bf16 nor AMX: Skylake to Ice Lake, or a cloud hides them."
    def _has(feature): return getattr(torch.cpu, f'_is_{feature}_supported')()
    return _has('avx512') and not _has('avx512_bf16') and not _has('amx_tile')


def known_problem(device: torch.device) -> str: # `''` where there is none
    """A sentence on why channels last is wrong or slow on this device with the installed PyTorch, and on the remedy.

    MPS: PyTorch issues 175189 (batch norm; the fix is in 2.14's wheels) and 193349 (convolutions; in 2.15's)."""
    if device.type == 'mps' and torch_version() < (2, 15):
        has = "takes up to 30 times as long in the backward pass of convolutions before PyTorch 2.15"
        if torch_version() < (2, 14): has = "gives wrong gradients, or fails, behind batch norms before PyTorch 2.14"
        return f"On MPS, channels last {has}: update PyTorch, or let `learn.to_fastest()` decide."
    if device.type == 'cuda' and torch.version.hip and not _miopen_takes_nhwc():
        return ("MIOpen converts the tensors of each convolution from channels last and back: set the environment "
                "variable PYTORCH_MIOPEN_SUGGEST_NHWC=1 before Python starts, or let `learn.to_fastest()` decide.")
    return ''


def _miopen_takes_nhwc() -> bool:
    "PyTorch's `aten/src/ATen/native/ConvUtils.h`: 2.9 and 2.10 do so from MIOpen 3.5 on, others only if they are told."
    told = os.environ.get('PYTORCH_MIOPEN_SUGGEST_NHWC')
    if told in ('0', '1'): return told == '1'
    try: return (2, 9) <= torch_version() < (2, 11) and torch.backends.cudnn.version() >= 3_005_000
    except RuntimeError: return True  # of two versions, so that nothing is known


def fp32_setting(operation) -> str: # `'tf32'`, `'bf16'`, `'ieee'` or `'none'`
    """The user's setting for an operation, such as `torch.backends.cuda.matmul`. PyTorch before 2.9 has `allow_tf32`
    alone; later, reading that raises where it differs from the new setting (PyTorch issue 179445)."""
    return getattr(operation, 'fp32_precision', None) or ('tf32' if getattr(operation, 'allow_tf32', False) else 'ieee')


def fp32_precision(device: torch.device) -> str: # `'fp32'`, `'fp16'` or `'bf16'`
    """The precision to which the device computes convolutions and matrix products of fp32 tensors: TF32 keeps as many
    bits as fp16. cuDNN uses it by default, since Ampere (https://docs.pytorch.org/docs/stable/notes/cuda.html)."""
    backends = torch.backends
    if device.type == 'cuda':
        if torch.cuda.get_device_capability(device) < (8, 0): return 'fp32'
        own = [backends.cuda.matmul, *[getattr(backends.cudnn, 'conv', backends.cudnn)]*(not torch.version.hip)]
    elif device.type == 'cpu': own = [getattr(backends.mkldnn, k, None) for k in ('conv', 'matmul')]
    else: return 'fp32'
    used = {fp32_setting(o) for o in own}
    return 'bf16' if 'bf16' in used else 'fp16' if 'tf32' in used else 'fp32'


def is_out_of_memory(e: BaseException) -> bool:
    "True if the error means that the device, or main memory, has no room left."
    said = ('out of memory', 'DefaultCPUAllocator', 'ALLOC_FAILED', 'ALLOCATION_FAILED',  # MPS; CPUs; cuBLAS; cuDNN
            'unable to find an engine')  # cuDNN's convolutions, where none has enough memory for its workspace
    return (isinstance(e, (torch.OutOfMemoryError, MemoryError))
            or isinstance(e, RuntimeError) and any(o in str(e) for o in said))


def free_memory(device: torch.device):
    "Collect unreachable objects (a Learner is a cycle), and give the device's unused memory back."
    gc.collect()
    getattr(getattr(torch, device.type), 'empty_cache', noop)()


def synchronize(device: torch.device):
    "Wait until this device has done all that it was given; `torch.cuda.synchronize()` waits for the current one."
    wait = getattr(torch, device.type).synchronize
    wait() if device.type == 'mps' else wait(device)  # there is one MPS device


def elapsed_ms(device: torch.device, f) -> float:
    "Milliseconds from an idle device until it has done all that `f()` gave it."
    synchronize(device)
    start = time.perf_counter()
    f()
    synchronize(device)
    return (time.perf_counter() - start)*1e3
