"Convolutions that PyTorch's CPU kernels (oneDNN) compute wrongly, and the same convolutions by kernels that are right."
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.functional import pad

__all__ = ['hits_onednn_6035', 'slice_first', 'pads_in_kernel', 'misreads_padding', 'pad_first', 'crop_last', 'safe_forward']

BLOCK = 16  # channels that oneDNN's kernel takes at a time: 16 with AVX-512, 8 with AVX2


def hits_onednn_6035(m: nn.Module) -> bool:
    """True if this layer's backward pass in channels last, on a CPU, writes past its memory.

    oneDNN's gradient of a 1×1 convolution's weights does, with a stride, without padding and with fewer input channels
    than a block: wrong gradients, a crash or a hang (https://github.com/uxlfoundation/oneDNN/issues/6035). The first
    layers of RepVGG-like networks, MobileOne among them, are such."""
    return (isinstance(m, nn.Conv2d) and _has_tuples(m) and m.in_channels < BLOCK and m.groups == 1
            and set(m.kernel_size) == {1} and max(m.stride) > 1 and m.padding in ('valid', (0, 0)))


def slice_first(m: nn.Conv2d, forward):
    "`forward` of a 1×1 convolution without stride, on a slice of the input: the same result, by a safe kernel."
    def _forward(x, *args, **kwargs):
        h, w = stride = m.stride
        m.stride = 1, 1
        try: return forward(x[..., ::h, ::w], *args, **kwargs)
        finally: m.stride = stride
    return _forward


def pads_in_kernel(m: nn.Module) -> bool:
    "True if this layer pads its input (or crops its output, if transposed) in a kernel for CPUs with AVX-512."
    return (isinstance(m, nn.modules.conv._ConvNd) and _has_tuples(m) and m.padding_mode == 'zeros' and any(_zeros_per_side(m))
            and torch.cpu._is_avx512_supported())


def _has_tuples(m) -> bool:
    "False for subclasses that keep plain numbers, and so have a forward of their own."
    return all(isinstance(o, tuple) for o in (m.kernel_size, m.stride)) and isinstance(m.padding, (tuple, str))


def _zeros_per_side(m) -> list:
    "Zeros that a convolution adds, as `torch.nn.functional.pad` takes them: from the last dimension, before and after."
    if m.padding == 'same': return m._reversed_padding_repeated_twice
    return [] if m.padding == 'valid' else [p for p in reversed(m.padding) for _ in range(2)]


def misreads_padding(
    kernel, stride, padding, size, # Of each spatial dimension; `padding` before it, `size` of the input
    half:bool, # In bf16 or fp16?
) -> bool:
    """True if oneDNN's kernels on CPUs with AVX-512 may compute this convolution wrongly because it pads its input.

    Some of their loops count wrongly where a kernel reaches far into the padding: they read, or write, memory that
    belongs to nothing. Each comment names the place in oneDNN 3.12; each condition includes a few convolutions that are
    right. The weights' gradient is wrong, and in 3-D with few input channels the result."""
    n, k, s, p, i = len(kernel), kernel, stride, padding, size
    if half:
        # a phase of the stride that no column falls in: not written (`jit_transpose_utils.cpp`, `nrows`)
        if p[-1] and s[-1] > i[-1]: return True
        # all rows in padding: an unsigned comparison of a negative count (`jit_avx512_core_bf16_conv_kernel.cpp`)
        if n > 1 and i[-2] < p[-2]: return True
        # the same file's loops over depth, and over rows in it; `jit_brgemm_conv.cpp` at depth 1
        if n == 3 and (p[0] and k[0] > i[0] or p[1] and k[1] > i[1] + p[1]): return True
    # `jit_avx512_common_conv_kernel.cpp`: the first depths behind the padding
    return n == 3 and 1 < s[0] < p[0] and i[0] < k[0] + s[0]


def _is_misread(m, x, size) -> bool:
    half = torch.is_autocast_enabled('cpu') or x.dtype in (torch.bfloat16, torch.float16)
    return x.device.type == 'cpu' and misreads_padding(m.kernel_size, m.stride, _zeros_per_side(m)[::-2], size, half)


@contextmanager
def _unpadded(m):
    padding, m.padding = m.padding, (0,)*len(m.kernel_size)
    try: yield
    finally: m.padding = padding


def pad_first(m, forward):
    "`forward` of a convolution that gets its zeros from `torch.nn.functional.pad` where its kernel `misreads_padding`."
    def _forward(x, *args, **kwargs):
        if not _is_misread(m, x, x.shape[-len(m.kernel_size):]): return forward(x, *args, **kwargs)
        zeros = pad(x, _zeros_per_side(m))
        with _unpadded(m): return forward(zeros, *args, **kwargs)
    return _forward


def crop_last(m, forward):
    """`forward` of a transposed convolution whose output is cropped by a slice where its kernel `misreads_padding`: the
    gradient of its weights is that of a convolution from its output to its input."""
    def _forward(x, output_size=None):
        n = len(m.kernel_size)
        each = zip(x.shape[-n:], m.stride, m.padding, m.dilation, m.kernel_size, m.output_padding)
        size = output_size[-n:] if output_size else [(i - 1)*s - 2*p + d*(k - 1) + o + 1 for i, s, p, d, k, o in each]
        if not _is_misread(m, x, size): return forward(x, output_size)
        sides = _zeros_per_side(m)
        if output_size: output_size = [o + 2*p for o, p in zip(size, m.padding)]
        with _unpadded(m): out = forward(x, output_size)
        return pad(out, [-q for q in sides])
    return _forward


def safe_forward(m, forward):
    "`forward` by kernels that are right, for a layer that `hits_onednn_6035` or `pads_in_kernel`."
    return (slice_first if hits_onednn_6035(m) else crop_last if m.transposed else pad_first)(m, forward)
