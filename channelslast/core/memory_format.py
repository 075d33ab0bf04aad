"""Memory formats of tensors, modules and optimizers in plain PyTorch. Nothing here knows fastai.

What a memory format is: https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html"""
import warnings
from functools import lru_cache
from operator import itemgetter

import torch
from torch import Tensor, nn

from .nested_tensors import map_tensors

__all__ = ['CHANNELS_LAST_FORMATS', 'has_channels_last_format', 'format_strides', 'needs_conversion', 'convert', 'convert_nested', 'unique_modules', 'kernel_dims', 'group_by_memory',
           'convert_module', 'match_strides', 'align_optimizer']

# the channels-last format of a tensor of so many dimensions
CHANNELS_LAST_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
CONV = nn.modules.conv._ConvNd  # of any number of dimensions, transposed ones too


def has_channels_last_format(t) -> bool:
    "True for what has a channels-last format: a dense, floating-point 4-D or 5-D tensor."
    return (isinstance(t, Tensor) and t.ndim in CHANNELS_LAST_FORMATS and not t.is_nested  # lazy ones: `ndim` is 1, `dim()` raises
            and t.layout is torch.strided and t.is_floating_point())


@lru_cache(maxsize=4096)
def format_strides(
    shape: torch.Size, # Of a 4-D or 5-D tensor, channels second
    channels_last: bool = True,
) -> tuple: # In elements
    "The strides that PyTorch itself gives a new tensor of this shape in channels last, or contiguous."
    fmt = CHANNELS_LAST_FORMATS[len(shape)] if channels_last else torch.contiguous_format
    return torch.empty(shape, device='meta', memory_format=fmt).stride()


def needs_conversion(t, channels_last=True) -> bool:
    "True if `t` has other strides than in its channels-last (or, if it is channels last, its contiguous) format."
    if not has_channels_last_format(t): return False
    now, last = t.stride(), format_strides(t.shape)
    return now != last if channels_last else now == last != format_strides(t.shape, False)


def can_restride(t, stride) -> bool:
    "True if `t` can take these strides on its own memory: they differ only where a dimension has size 1."
    return t.data_ptr() != 0 and all(n == 1 or a == b for n, a, b in zip(t.shape, t.stride(), stride))


def convert(
    t, # Anything; only what is `has_channels_last_format` changes
    channels_last: bool = True, # False: to contiguous, if it is channels last now
):
    """`t` in its channels-last (or contiguous) format: `t` itself if it has those strides, a view of its memory if the
    order there is the same, otherwise a copy.

    The strides are compared, not `is_contiguous`: a 1×1 convolution's weight and a one-channel image are contiguous in
    both formats, yet PyTorch reads from their strides which one a convolution and its gradient shall take."""
    if not needs_conversion(t, channels_last): return t
    stride = format_strides(t.shape, channels_last)
    if can_restride(t, stride): return t.as_strided(t.shape, stride)
    return t.to(memory_format=CHANNELS_LAST_FORMATS[t.dim()] if channels_last else torch.contiguous_format, copy=True)


def convert_nested(
    x, # A tensor, or containers of them, nested as you like
    dims = tuple(CHANNELS_LAST_FORMATS), # Numbers of dimensions to cast
):
    "`x` with each tensor of so many dimensions in channels last; containers without one, and types, stay as they are."
    return map_tensors(lambda t: convert(t) if t.dim() in dims else t, x)


def match_strides(t: Tensor, ref: Tensor) -> Tensor:
    "`t` in the strides of `ref`, if both have one shape."
    if t.layout is not torch.strided or t.shape != ref.shape or t.stride() == ref.stride(): return t
    if can_restride(t, ref.stride()): return t.as_strided(t.shape, ref.stride())
    new = torch.empty_like(ref, dtype=t.dtype, device=t.device)
    return new.copy_(t) if new.stride() == ref.stride() else t  # `ref` may overlap itself: its strides can't be had


def unique_modules(module: nn.Module) -> list:
    "Each module once, as from `module.modules()`, but quicker: each fit and each prediction looks."
    found, known = [module], {module}
    for m in found:
        if m._modules: found += [c for c in m._modules.values() if c is not None and not (c in known or known.add(c))]
    return found


def kernel_dims(
    modules: list, # All modules of a model
) -> dict: # By module; those that are missing have what `None` has
    """Number of dimensions of the kernels that each module holds, judged without running the model.

    A convolution module, with its parametrizations, holds kernels of its own number of dimensions. Another module may
    hold kernels for `F.conv2d`, or a bank of kernels, which has one dimension more and which the model's own `view`
    takes apart. So there only the smallest number counts that the model's 2-D and 3-D convolutions have. In a model
    without convolution modules the parameters tell, except those whose first dimension is 1: these are no kernels, they
    are added to a batch."""
    # subclasses with a forward of their own may set `kernel_size` to a number, hardly `output_padding`
    dims = {m: len(c.output_padding) + 2 for c in modules if isinstance(c, CONV) for m in unique_modules(c)}
    found = {*dims.values()} or {p.dim() for m in modules for p in m._parameters.values() if has_channels_last_format(p) and len(p) > 1}
    return {**dims, None: min(found & CHANNELS_LAST_FORMATS.keys(), default=None)}


def _span(t: Tensor) -> tuple: # Device, storage, first byte, the byte after the last
    "Where the memory of `t` lies; a place of its own for a tensor without strides or memory."
    if nn.parameter.is_lazy(t) or t.layout is not torch.strided or t.is_nested or not t.data_ptr():
        return '', id(t), 0, 1
    start, size = t.storage_offset(), t.element_size()
    end = start + 1 + sum((n - 1)*s for n, s in zip(t.shape, t.stride()))
    return str(t.device), t.untyped_storage().data_ptr(), start*size, end*size


def group_by_memory(
    tensors, # Any; each counts once
) -> list: # Of lists of tensors
    "The tensors in groups: those whose ranges of memory overlap are together."
    spans, groups, before, reach = {id(t): (_span(t), t) for t in tensors}, [], None, 0
    for span, t in sorted(spans.values(), key=itemgetter(0)):
        *place, start, end = span
        if place == before and start < reach: groups[-1].append(t)
        else: groups.append([t])
        before, reach = place, max(end, reach) if place == before else end
    return groups


@torch.no_grad()
def convert_module(
    module: nn.Module,
    channels_last: bool = True, # False: back to contiguous
) -> bool: # True if any tensor was converted
    """Convert the parameters and buffers that have the dimensions of a convolution's kernel (see `kernel_dims`) to
    channels last, or all that are channels last to contiguous; give each gradient its parameter's strides.

    Parameters keep their identity, so optimizers, hooks and tied weights stay valid. Two parameters on one memory stay
    so. If their shapes or strides differ (a 1×1 convolution and a linear layer), that memory is not reordered: they are
    converted only if new strides are enough. Tensors that already have their format are not touched."""
    modules, converted = unique_modules(module), False
    owned = [(m, t) for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    due = [(m, t) for m, t in owned if needs_conversion(t, channels_last)]
    if due and channels_last:
        dims = kernel_dims(modules)
        due = [(m, t) for m, t in due if t.dim() == dims.get(m, dims[None])]
    due = {t for _, t in due}
    for group in group_by_memory(t for _, t in owned) if due else ():
        found = due.intersection(group)
        if found and len({(_span(t), t.shape, t.stride(), t.dtype) for t in group}) == 1:
            new = convert(group[0].data, channels_last)
            for t in group: t.data = new
        else:
            found = {t for t in found if can_restride(t, format_strides(t.shape, channels_last))}
            for t in found: t.data = convert(t.data, channels_last)
        converted |= bool(found)
    for _, t in owned:
        if (grad := getattr(t, 'grad', None)) is not None and (new := match_strides(grad, t)) is not grad: grad.data = new
    return converted


@torch.no_grad()
def align_optimizer(
    opt, # A `torch.optim` or fastai optimizer, wrapped or not; `None` is fine
):
    """Give each state tensor of its parameter's shape (momenta, averages, slow weights) its parameter's strides.

    Fused kernels walk parameter, gradient and state through memory side by side: with other strides on the state they
    pair the wrong elements (https://github.com/pytorch/pytorch/issues/106951). State in 8 bits (bitsandbytes) has one
    scale per block of memory, so that its elements can't move: it is dropped with a warning, and starts again."""
    while opt is not None:
        for p, state in getattr(opt, 'state', {}).items():
            if isinstance(p, Tensor): _align_state(state, p)
        own = vars(opt)
        if own.get('slow_weights') is not None:  # fastai's Lookahead keeps them beside its state, in lists
            for pg, slow in zip(opt.param_lists, own['slow_weights']):
                for p, s in zip(pg, slow): _align_state(s, p)
        inner = own.get('opt', own.get('optimizer'))  # OptimWrapper and Lookahead; Accelerate
        opt = inner if hasattr(inner, 'state') else None


def _is_in_blocks(state, p) -> bool:
    "True for state in 8 bits, with the scales of its blocks beside it, in another order than the parameter's."
    def _is(s): return s.shape == p.shape and s.dtype is torch.uint8 and not can_restride(s, p.stride())
    return any('absmax' in str(k) for k in state) and any(_is(s) for s in state.values() if isinstance(s, Tensor))


def _align_state(state, p):
    if type(state) is Tensor:  # not its subclasses, which know themselves in which order their elements lie
        if (new := match_strides(state, p)) is not state: state.data = new
    elif isinstance(state, dict):
        if _is_in_blocks(state, p):
            state.clear()
            warnings.warn("Optimizer state in 8 bits can't change its memory format: momentum and averages start "
                          "again. Switch the format before training.", stacklevel=2)
        for s in state.values(): _align_state(s, p)
    elif isinstance(state, (list, tuple)):
        for s in state: _align_state(s, p)
