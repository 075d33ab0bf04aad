"""Memory formats of tensors, modules and optimizers. Contiguous images are also called NCHW, channels-last ones NHWC.

Introduction: https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html"""
import warnings
from functools import lru_cache
from operator import itemgetter

import torch
from torch import Tensor, nn

from .nested_tensors import map_tensors

CHANNELS_LAST_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of dimensions
CONV = nn.modules.conv._ConvNd  # base class of all convolutions, transposed ones too


def can_be_channels_last(t) -> bool:
    "True for a dense, floating-point 4-D or 5-D tensor: only such tensors can be channels last."
    return (isinstance(t, Tensor) and t.ndim in CHANNELS_LAST_FORMATS and not t.is_nested  # lazy ones have no `dim()`
            and t.layout is torch.strided and t.is_floating_point())


@lru_cache(maxsize=4096)
def format_strides(shape: torch.Size, channels_last: bool = True) -> tuple:
    "The strides that PyTorch gives a new channels-last or contiguous tensor of this 4-D or 5-D shape."
    fmt = CHANNELS_LAST_FORMATS[len(shape)] if channels_last else torch.contiguous_format
    return torch.empty(shape, device='meta', memory_format=fmt).stride()


def needs_conversion(t, channels_last=True) -> bool:
    "True if `convert(t, channels_last)` changes the strides of `t`."
    if not can_be_channels_last(t): return False
    stride, last = t.stride(), format_strides(t.shape)
    return stride != last if channels_last else (stride == last and last != format_strides(t.shape, False))


def can_restride(t, stride) -> bool:
    "True if `t` can take these strides without a copy: they differ only in dimensions of size 1."
    return t.data_ptr() != 0 and all(n == 1 or a == b for n, a, b in zip(t.shape, t.stride(), stride))


def convert(t, channels_last: bool = True):
    """`t` in channels last, or back in contiguous if `channels_last` is False. Returns `t` itself if nothing has to
    change (`t` may be anything), a view if new strides on the same memory are enough, and otherwise a copy.

    Strides are compared instead of calling `is_contiguous`. A 1×1 convolution's weight and a one-channel image are
    contiguous in both formats, but PyTorch chooses the format of a convolution and its gradient by their strides."""
    if not needs_conversion(t, channels_last): return t
    stride = format_strides(t.shape, channels_last)
    if can_restride(t, stride): return t.as_strided(t.shape, stride)
    return t.to(memory_format=CHANNELS_LAST_FORMATS[t.dim()] if channels_last else torch.contiguous_format, copy=True)


def convert_nested(x, dims=tuple(CHANNELS_LAST_FORMATS)):
    "`x`, nested containers of tensors, with all tensors of these numbers of dimensions in channels last."
    return map_tensors(lambda t: convert(t) if t.dim() in dims else t, x)


def match_strides(t: Tensor, ref: Tensor) -> Tensor:
    "`t` with the strides of `ref`, if their shapes are equal."
    if t.layout is not torch.strided or t.shape != ref.shape or t.stride() == ref.stride(): return t
    if can_restride(t, ref.stride()): return t.as_strided(t.shape, ref.stride())
    new = torch.empty_like(ref, dtype=t.dtype, device=t.device)
    return new.copy_(t) if new.stride() == ref.stride() else t  # no new tensor has the strides of an overlapping `ref`


def _match_in_place(t: Tensor, ref: Tensor):
    new = match_strides(t, ref)
    if new is not t: t.data = new


def unique_modules(module: nn.Module) -> list:
    "All modules, each once, like `module.modules()` but faster: each fit and each prediction needs them."
    modules, seen = [module], {module}
    for m in modules:
        for c in m._modules.values():
            if c is not None and c not in seen: modules.append(c); seen.add(c)
    return modules


def kernel_dims(modules: list) -> dict: # By module; the value of `None` is that of all other modules
    """Number of dimensions of the kernels that a model's modules hold, found without running the model.

    A convolution module and its parametrizations hold kernels of the convolution's own dimensions. Another module may
    hold kernels for `F.conv2d`, or banks of kernels with one more dimension, which the model takes apart with `view`.
    So other modules get the smallest number among the model's 2-D and 3-D convolutions. Without convolution modules,
    that is 4 if a parameter has so many, whose first dimension is not 1: such ones are usually added to activations."""
    # not `kernel_size`, which subclasses with their own forward may set to a number
    dims = {m: len(c.output_padding) + 2 for c in modules if isinstance(c, CONV) for m in unique_modules(c)}
    params = [] if dims else [p for m in modules for p in m._parameters.values()]
    found = {*dims.values(), *(4 for p in params if can_be_channels_last(p) and p.dim() == 4 and len(p) > 1)}
    return {**dims, None: min(found & CHANNELS_LAST_FORMATS.keys(), default=None)}


def _memory_range(t: Tensor) -> tuple: # Device, storage, first byte, end
    "The memory that `t` uses. Tensors without strides or memory get a range of their own."
    if nn.parameter.is_lazy(t) or t.layout is not torch.strided or t.is_nested or not t.data_ptr():
        return '', id(t), 0, 1
    start, size = t.storage_offset(), t.element_size()
    end = start + 1 + sum((n - 1)*s for n, s in zip(t.shape, t.stride()))
    return str(t.device), t.untyped_storage().data_ptr(), start*size, end*size


def group_by_memory(tensors) -> list: # Lists of tensors
    "Groups of tensors whose memory ranges overlap. Each tensor is in one group, once."
    ranges = {id(t): (_memory_range(t), t) for t in tensors}
    groups, group_storage, group_end = [], None, 0
    for memory, t in sorted(ranges.values(), key=itemgetter(0)):
        *storage, start, end = memory
        if storage != group_storage: group_end = 0
        if start < group_end: groups[-1].append(t)
        else: groups.append([t])
        group_storage, group_end = storage, max(end, group_end)
    return groups


@torch.no_grad()
def convert_module(module: nn.Module, channels_last: bool = True) -> bool: # True if any tensor was converted
    """Convert parameters and buffers with the dimensions of kernels (see `kernel_dims`) to channels last. With
    `channels_last=False`, convert all channels-last tensors to contiguous. Gradients get their parameters' strides.

    Parameters keep their identity, so optimizers, hooks and tied weights stay valid. Tensors that share memory still
    share it. If their shapes or strides differ (a 1×1 convolution and a linear layer), they are converted only if new
    strides are enough, as their memory can't be reordered. Tensors that have their format are not touched."""
    modules, converted = unique_modules(module), False
    owned = [(m, t) for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    pending = [(m, t) for m, t in owned if needs_conversion(t, channels_last)]
    if pending and channels_last:
        dims = kernel_dims(modules)
        pending = [(m, t) for m, t in pending if t.dim() == dims.get(m, dims[None])]
    pending = {t for _, t in pending}
    for group in group_by_memory(t for _, t in owned) if pending else []:
        tensors = pending.intersection(group)
        if tensors and len({(_memory_range(t), t.shape, t.stride(), t.dtype) for t in group}) == 1:
            new = convert(group[0].data, channels_last)
            for t in group: t.data = new
        else:
            tensors = {t for t in tensors if can_restride(t, format_strides(t.shape, channels_last))}
            for t in tensors: t.data = convert(t.data, channels_last)
        converted = converted or bool(tensors)
    for _, t in owned:
        grad = getattr(t, 'grad', None)
        if grad is not None: _match_in_place(grad, t)
    return converted


@torch.no_grad()
def align_optimizer(opt): # A `torch.optim` or fastai optimizer, wrapped or not, or None
    """Give state tensors of their parameter's shape (momenta, averages, slow weights) their parameter's strides.

    Fused kernels go through the memory of parameter, gradient and state in parallel. With different strides, they pair
    the wrong elements (https://github.com/pytorch/pytorch/issues/106951). 8-bit state (bitsandbytes) has one scale per
    block of memory, so its elements can't move. It is dropped with a warning and starts again."""
    while opt is not None:
        for p, state in getattr(opt, 'state', {}).items():
            if isinstance(p, Tensor): _align_state(state, p)
        attributes = vars(opt)
        if attributes.get('slow_weights') is not None:  # fastai's Lookahead keeps them in lists, outside of its state
            for params, slow_weights in zip(opt.param_lists, attributes['slow_weights']):
                for p, slow in zip(params, slow_weights): _align_state(slow, p)
        inner = attributes.get('opt', attributes.get('optimizer'))  # OptimWrapper and Lookahead; Accelerate
        opt = inner if hasattr(inner, 'state') else None


def _align_state(state, p):
    if type(state) is Tensor: _match_in_place(state, p)  # subclasses may order their elements differently
    elif isinstance(state, dict):
        tensors = [s for s in state.values() if isinstance(s, Tensor) and s.dtype is torch.uint8 and s.shape == p.shape]
        # one scale per block of memory, but the elements are in another order than the parameter's
        if any('absmax' in str(k) for k in state) and not all(can_restride(s, p.stride()) for s in tensors):
            state.clear()
            warnings.warn("8-bit optimizer state can't change its memory format, so momentum and averages start again. "
                          "Switch the format before training.", stacklevel=2)
        for s in state.values(): _align_state(s, p)
    elif isinstance(state, (list, tuple)):
        for s in state: _align_state(s, p)
