"Outputs of models compared, and inputs with rounding errors."
import math
from numbers import Number

import numpy as np
import torch
from torch import Tensor

from .nested_tensors import leaves_of, map_tensors

__all__ = ['perturb', 'numbers_of', 'relative_error']


@torch.no_grad()
def perturb(inputs, eps, generator=None):
    "The inputs with each number off by a rounding error, up or down; whole numbers may be codes, and stay."
    def _off(t):
        if not t.is_floating_point(): return t
        up = (torch.rand(t.shape, device=t.device, generator=generator) < 0.5).to(t.dtype)
        by = max(eps, torch.finfo(t.dtype).eps)*(2*up - 1)
        return torch.where(t == t.round(), t, t + t*by)
    return map_tensors(_off, inputs)


def numbers_of(x) -> list:
    "All tensors, arrays and numbers in an output, as tensors: what can be compared."
    kinds = Tensor, Number, np.ndarray, np.bool_
    found = [o for o in leaves_of(x) if isinstance(o, kinds)]
    return [torch.as_tensor(o) for o in found if isinstance(o, Tensor) or np.asarray(o).dtype.kind in 'biufc']


def relative_error(found, truth) -> float:
    """The largest difference of any tensor, array or number in two outputs, relative to its norm (to a thousandth of
    the largest, for those near zero)."""
    a, b = numbers_of(found), numbers_of(truth)
    if not b or [(t.shape, t.dtype) for t in a] != [(t.shape, t.dtype) for t in b]: return math.inf
    offs, norms = [], []
    for x, y in zip(a, b):
        x, y = (t.detach().cpu().to(torch.complex128 if t.is_complex() else torch.float64) for t in (x, y))
        offs.append(torch.where((x == y) | x.isnan() & y.isnan(), 0, x - y).norm().item())
        norms.append(y.where(y.isfinite(), 0).norm().item())
    least = 1e-3*max(norms)
    def _relative(off, norm): return off and (off/norm if norm and math.isfinite(off) else math.inf)
    return max(_relative(o, max(n, least)) for o, n in zip(offs, norms))
