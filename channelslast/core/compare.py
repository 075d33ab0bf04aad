"Compare the outputs of models, and add rounding errors to inputs."
import math
from numbers import Number

import numpy as np
import torch
from torch import Tensor

from .devices import fp32_precision
from .nested_tensors import leaves_of, map_tensors

FACTOR = 3  # accept up to this many times the difference that rounding errors cause
SUM_ERROR = 2**-18  # relative rounding error of a sum in fp32
PASSES = 4  # with rounding errors: in a single one, they may cancel
HALF_ERROR = 5e-2  # relative error that half precision explains
REDUCED_FP32 = dict(fp16=(1e-2, 2**-10), bf16=(HALF_ERROR, 2**-7))  # fp32 in TF32 or bf16: the same; its rounding error


@torch.no_grad()
def perturb(inputs, eps, generator=None, tiny=0.): # `tiny`: distance of the smallest numbers of the precision
    """The inputs, each number changed by a rounding error, up or down. Whole numbers stay: they are exact, or codes. None is
    crossed where all are exact: a probability stays one."""
    def _perturb(t):
        if not t.is_floating_point(): return t
        change, low, high = t*max(eps, torch.finfo(t.dtype).eps), t.floor(), t.ceil()
        bounded = (low == high) | (change.abs() < 1)
        if tiny: change = torch.maximum(change.abs(), t.abs().clamp_max(tiny)/2)
        device = t.device if generator is None else generator.device  # numbers (0-D tensors) stay on the CPU
        up = torch.rand(t.shape, device=device, generator=generator).to(t.device) < 0.5
        new = torch.where(up, t + change, t - change)
        return torch.where(bounded, new.clamp(low, high), new)
    return map_tensors(_perturb, inputs)


def numbers_of(x) -> list:
    "All tensors, arrays and numbers in an output, as tensors."
    leaves = [o for o in leaves_of(x) if isinstance(o, (Tensor, Number, np.ndarray, np.bool_))]
    return [torch.as_tensor(o) for o in leaves if isinstance(o, Tensor) or np.asarray(o).dtype.kind in 'biufc']


def relative_error(output, reference) -> float:
    """The largest relative error of any tensor, array or number in an output.

    Each error is relative to the norm of the reference, or to a thousandth of the largest norm if that is larger."""
    outs, refs = numbers_of(output), numbers_of(reference)
    if not refs or [(t.shape, t.dtype) for t in outs] != [(t.shape, t.dtype) for t in refs]: return math.inf
    errors, norms = [], []
    for t, ref in zip(outs, refs):
        t, ref = (o.detach().cpu().to(torch.complex128 if o.is_complex() else torch.float64) for o in (t, ref))
        equal = (t == ref) | (t.isnan() & ref.isnan())
        errors.append(torch.where(equal, 0, t - ref).norm().item())
        norms.append(ref.where(ref.isfinite(), 0).norm().item())
    min_norm = 1e-3*max(norms)
    def _relative(error, norm): return error/norm if norm and math.isfinite(error) else math.inf
    return max(0. if error == 0 else _relative(error, max(norm, min_norm)) for error, norm in zip(errors, norms))


def rounding_error(dtypes, devices, full:dict) -> tuple: # Relative; of the least exact number
    "Error in outputs that rounding explains, by `full`, those of exact dtypes, and the rounding error of one number."
    precisions = {fp32_precision(d) for d in devices} if torch.float32 in dtypes else ()
    limits = [REDUCED_FP32[p] for p in precisions if p in REDUCED_FP32]
    return tuple(map(max, zip(*limits, *((full.get(t, HALF_ERROR), torch.finfo(t).eps) for t in dtypes))))
