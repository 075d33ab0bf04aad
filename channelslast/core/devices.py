"Devices: where a model is, what the device computes fast, its known problems, its memory, and timing on it."
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

NO_TENSOR_CORES = re.compile(r'GTX 16|MX[45]50|\bT(400|500|550|600|1000|1200|2000)\b')  # small Turing GPUs


def model_device(model) -> torch.device:
    "The device of the model's first parameter or buffer, or the CPU if the model has neither."
    t = next(chain(model.parameters(), model.buffers()), None)
    return torch.device('cpu') if t is None else t.device


def fit_device(learn) -> torch.device:
    """The device that the Learner will train on: fastai moves the model there when a fit begins. In a distributed run,
    `DistributedTrainer` uses the process's own device, while DataLoaders made earlier stay on the first GPU."""
    accelerator = next((vars(cb)['accelerator'] for cb in learn.cbs if 'accelerator' in vars(cb)), None)
    if accelerator: return accelerator.device
    if not hasattr(learn.dls, 'device'): return default_device()  # PyTorch's own DataLoaders; this call starts CUDA
    return model_device(learn.model) if learn.dls.device is None else torch.device(learn.dls.device)


def unwrap_model(model) -> nn.Module:
    "The user's module inside `torch.compile`, `DataParallel` and `DistributedDataParallel`."
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)): model = model.module
        elif '_orig_mod' in vars(model).get('_modules', ()): model = model._orig_mod
        else: return model


def autocast_is_fast(
    device, # A `torch.device` or its name: `'cpu'`, `'cuda:1'`, `'mps'`, …
    amp_mode: AMPMode,
) -> bool:
    """True if autocast to this dtype makes the device faster. Some devices support a dtype, but are not faster in it.

    CPU: a dtype without CPU instructions is emulated many times slower than fp32. oneDNN reports two slow cases as
    supported. bf16 with AVX512 but without AVX512-BF16 takes 4 times as long as fp32. fp16 with AVX512-FP16 (Xeons
    since 2023) takes 8 to 139 times as long in a convolution's two passes: only CPUs with AMX-FP16 have a kernel for
    the weight gradient (oneDNN's `src/cpu/cpu_convolution_list.cpp`). As these also have bf16, this returns False for
    fp16 on every CPU. CUDA: GPUs without tensor cores gain nothing from fp16, and the GTX 16 series gives NaN
    (https://github.com/pytorch/pytorch/issues/77955). MPS: Apple's M1 and M2 lack bf16 instructions
    (https://github.com/huggingface/transformers/issues/40458). XPU: fp16 needs a gradient scaler, which
    computes in fp64 and raises on Intel GPUs without it."""
    device = torch.device(device)
    if not torch.amp.is_autocast_available(device.type): return False
    if device.type == 'cpu':
        if amp_mode is AMPMode.FP16: return False
        is_supported = getattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', None)  # missing without oneDNN
        if not is_supported or not is_supported(): return False
        def _has(feature): return getattr(torch.cpu, f'_is_{feature}_supported')()
        # CPUs with AVX512 alone emulate bf16: Skylake to Ice Lake, and clouds that hide the other two features
        return not _has('avx512') or _has('avx512_bf16') or _has('amx_tile')
    if device.type == 'cuda':
        with torch.cuda.device(device):
            if amp_mode is AMPMode.BF16: return torch.cuda.is_bf16_supported(including_emulation=False)
            name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
            return capability >= (7, 0) and not NO_TENSOR_CORES.search(name)
    if device.type == 'xpu' and amp_mode is AMPMode.FP16: return torch.xpu.get_device_properties(device).has_fp64
    if device.type != 'mps': return True
    return amp_mode is AMPMode.FP16 or not _apple_chip().startswith(('Apple M1', 'Apple M2'))


def torch_version() -> tuple: # Such as `(2, 14)`
    return tuple(map(int, torch.__version__.split('.')[:2]))


@cache
def _apple_chip() -> str: # Such as `'Apple M2 Pro'`; `''` if unknown
    try: return subprocess.check_output(['sysctl', '-n', 'machdep.cpu.brand_string'], text=True, timeout=10).strip()
    except (OSError, subprocess.SubprocessError): return ''


def known_problem(device: torch.device) -> str: # `''` if there is none
    """Why channels last is wrong or slow on this device with the installed PyTorch, and what to do about it.

    MPS: PyTorch issues 175189 (batch norms, fixed in 2.14's wheels) and 193349 (convolutions, in 2.15's)."""
    if device.type == 'mps' and torch_version() < (2, 15):
        problem = "2.15, the backward pass of convolutions in channels last takes up to 30 times as long"
        if torch_version() < (2, 14): problem = "2.14, batch norms in channels last give wrong gradients or fail"
        return f"On MPS before PyTorch {problem}. Update PyTorch, or let `learn.to_fastest()` choose the format."
    if device.type == 'cuda' and torch.version.hip and not _miopen_takes_nhwc():
        return ("MIOpen converts the tensors of each convolution from channels last and back. Set the environment "
                "variable PYTORCH_MIOPEN_SUGGEST_NHWC=1 before Python starts, or let `learn.to_fastest()` choose.")
    return ''


def _miopen_takes_nhwc() -> bool:
    "True if MIOpen does not convert (`ConvUtils.h`): the variable is 1, or PyTorch is 2.9 or 2.10 with MIOpen 3.5."
    setting = os.environ.get('PYTORCH_MIOPEN_SUGGEST_NHWC')
    if setting in ('0', '1'): return setting == '1'
    try: return (2, 9) <= torch_version() < (2, 11) and torch.backends.cudnn.version() >= 3_005_000
    except RuntimeError: return True  # raised if two versions of MIOpen are mixed


def fp32_setting(operation) -> str: # `'tf32'`, `'bf16'`, `'ieee'` or `'none'`
    """The user's setting for an operation, such as `torch.backends.cuda.matmul`. PyTorch before 2.9 has only
    `allow_tf32`. Later versions raise if it is read while it contradicts the new setting (PyTorch issue 179445)."""
    return getattr(operation, 'fp32_precision', None) or ('tf32' if getattr(operation, 'allow_tf32', False) else 'ieee')


def fp32_precision(device: torch.device) -> str: # `'fp32'`, `'fp16'` or `'bf16'`
    """The precision of convolutions and matrix products of fp32 tensors. TF32 counts as fp16, which has as many
    mantissa bits. cuDNN uses it by default since Ampere (https://docs.pytorch.org/docs/stable/notes/cuda.html)."""
    backends = torch.backends
    if device.type == 'cuda':
        if torch.cuda.get_device_capability(device) < (8, 0): return 'fp32'
        operations = [backends.cuda.matmul]
        if not torch.version.hip: operations.append(getattr(backends.cudnn, 'conv', backends.cudnn))
    elif device.type == 'cpu': operations = [getattr(backends.mkldnn, k, None) for k in ('conv', 'matmul')]
    else: return 'fp32'
    settings = {fp32_setting(o) for o in operations}
    return 'bf16' if 'bf16' in settings else 'fp16' if 'tf32' in settings else 'fp32'


def is_out_of_memory(e: BaseException) -> bool:
    "True if the error means that the device or main memory is full."
    messages = ('out of memory', 'DefaultCPUAllocator', 'ALLOC_FAILED', 'ALLOCATION_FAILED',  # MPS, CPU, cuBLAS, cuDNN
                'unable to find an engine')  # cuDNN, if no convolution has enough memory for its workspace
    if isinstance(e, RuntimeError) and any(o in str(e) for o in messages): return True
    return isinstance(e, (torch.OutOfMemoryError, MemoryError))


def free_memory(device: torch.device):
    "Collect unreachable objects (a Learner is a reference cycle), and release the device's unused memory."
    gc.collect()
    getattr(getattr(torch, device.type), 'empty_cache', noop)()


def synchronize(device: torch.device):
    "Wait until all work on this device is done. `torch.cuda.synchronize()` would wait for the current device."
    wait = getattr(torch, device.type).synchronize
    wait() if device.type == 'mps' else wait(device)  # there is only one MPS device


def elapsed_ms(device: torch.device, f) -> float:
    "Milliseconds from an idle device until all work that `f()` starts on it is done."
    synchronize(device)
    start = time.perf_counter()
    f()
    synchronize(device)
    return (time.perf_counter() - start)*1e3
