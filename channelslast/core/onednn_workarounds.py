"Convolutions that PyTorch's CPU kernels (oneDNN) compute wrongly, and forwards that use correct kernels."
import torch
from torch import nn
from torch.nn.functional import pad

__all__ = ['hits_onednn_6035', 'slice_first', 'pads_in_kernel', 'misreads_padding', 'misreads_column', 'misses_input',
           'is_misread', 'pad_first', 'crop_last', 'safe_forward']

BLOCK = 16  # channels per block in oneDNN's kernel: 16 with AVX-512, 8 with AVX2


def hits_onednn_6035(m: nn.Module) -> bool:
    """True if the backward pass of this layer, in channels last on a CPU, writes outside its memory.

    This happens in the weight gradient of a 1×1 convolution with a stride, without padding and with fewer input
    channels than a block, such as the first layer of RepVGG-like networks, among them MobileOne. Gradients are wrong,
    or the process crashes or hangs (https://github.com/uxlfoundation/oneDNN/issues/6035)."""
    return (isinstance(m, nn.Conv2d) and _has_tuples(m) and m.in_channels < BLOCK and m.groups == 1
            and set(m.kernel_size) == {1} and max(m.stride) > 1 and m.padding in ('valid', (0, 0)))


def slice_first(m: nn.Conv2d, forward):
    "`forward` of a 1×1 convolution that slices the input, then runs with stride 1: same result, correct kernel."
    def _forward(x, *args, **kwargs):
        h, w = m.stride
        m.stride = 1, 1
        try: return forward(x[..., ::h, ::w], *args, **kwargs)
        finally: m.stride = h, w
    return _forward


def pads_in_kernel(m: nn.Module) -> bool:
    """True if a CPU kernel may compute this layer wrongly for some input (see `is_misread`): an AVX-512 kernel that
    pads the input (or crops the output, if transposed) or skips columns, or any kernel for which `misses_input`."""
    if not isinstance(m, nn.modules.conv._ConvNd) or not _has_tuples(m) or m.padding_mode != 'zeros': return False
    zeros = _zeros_per_side(m)
    if m.stride[-1] > 1 and m.dilation[-1] > 1 and zeros and zeros[0] >= m.kernel_size[-1]: return True
    return torch.cpu._is_avx512_supported() and (any(zeros) or (m.kernel_size[-1] > 1 and m.stride[-1] > 1))


def _has_tuples(m) -> bool:
    "False for subclasses that keep plain numbers, and so have their own forward."
    return all(isinstance(o, tuple) for o in (m.kernel_size, m.stride)) and isinstance(m.padding, (tuple, str))


def _zeros_per_side(m) -> list:
    "The padding of a convolution as `torch.nn.functional.pad` takes it: last dimension first, before and after."
    if m.padding == 'same': return m._reversed_padding_repeated_twice
    return [] if m.padding == 'valid' else [p for p in reversed(m.padding) for _ in range(2)]


def misreads_padding(
    kernel, stride, padding, size, # Per spatial dimension; `padding` is the padding before, `size` that of the input
    half:bool, # True for bf16 and fp16
) -> bool:
    """True if oneDNN's AVX-512 kernels may compute this convolution wrongly because of its padding.

    Some of their loops miscount where a kernel reaches far into the padding: they read or write memory outside of all
    tensors. The weight gradient is then wrong, and in 3-D with few input channels also the output. Each comment names
    the place in oneDNN 3.12. Each condition also includes a few convolutions that are computed correctly."""
    n, k, s, p, i = len(kernel), kernel, stride, padding, size
    if half:
        # a phase of the stride without columns is not written (`jit_transpose_utils.cpp`, `nrows`)
        if p[-1] and s[-1] > i[-1]: return True
        # all rows in padding: a negative count is compared as unsigned (`jit_avx512_core_bf16_conv_kernel.cpp`)
        if n > 1 and i[-2] < p[-2]: return True
        # loops over depth, and over its rows, in the same file; `jit_brgemm_conv.cpp` at depth 1
        if n == 3 and ((p[0] and k[0] > i[0]) or (p[1] and k[1] > i[1] + p[1])): return True
    # the first depths after the padding (`jit_avx512_common_conv_kernel.cpp`)
    return n == 3 and 1 < s[0] < p[0] and i[0] < k[0] + s[0]


def misreads_column(
    kernel, stride, result, # Per spatial dimension; `result` is the size of the result
    one_channel:bool, # True if the input has one channel, and the convolution no groups
    half:bool, # True for bf16 and fp16
) -> bool:
    """True if oneDNN's AVX-512 kernels may compute this result wrongly because it is one column wide.

    They compute all its rows in one matrix product, from a copy of the input. They take the rows of the copy to be
    `stride*kernel` columns long (`LDA` in `jit_brgemm_conv_utils.cpp`, `estimate_brgemm_ur`), but the rows are
    `kernel` columns long, rounded up to a multiple of the stride (`jit_brgemm_conv_trans_kernel.cpp`, `dst_w`). So all
    rows after the first are read from elsewhere, also from memory that was never written. In fp32, this kernel takes
    one channel only, and no stride in the height. In bf16 with AMX, it takes any."""
    if len(kernel) == 1 or kernel[-1] == 1 or stride[-1] == 1 or result[-1] > 1 or result[-2] == 1: return False
    return half or (one_channel and stride[-2] == 1)


def misses_input(kernel, stride, padding, dilation, size) -> bool: # Arguments as for `misreads_padding`
    """True if oneDNN's kernels, also with AVX2, may crash because several columns of a result read only padding.

    If this holds for all columns, kernels that only write the bias fill them, some to the left of the input and some to
    the right. `jit_brgemm_conv.cpp` makes these kernels for as many columns as the tap before the first one leaves out
    (`kw_f - 1` in `init`), and runs them for as many as the first one leaves out (`perform_outwork`)."""
    k, s, p, d, i = kernel[-1], stride[-1], padding[-1], dilation[-1], size[-1]
    if s == 1 or d == 1 or p < k: return False
    first = range(-p, i + p - d*(k - 1), s)  # the column that each column of the result reads first
    return len(first) > 1 and not any(0 <= c + j*d < i for c in first for j in range(k))


def _padded_size(m, x, output_size=None) -> list:
    "Size of the tensor that a layer pads: its input; of a transposed convolution, which crops, its output."
    n = len(m.kernel_size)
    if not m.transposed: return x.shape[-n:]
    dims = zip(x.shape[-n:], m.stride, m.padding, m.dilation, m.kernel_size, m.output_padding)
    return output_size[-n:] if output_size else [(i - 1)*s - 2*p + d*(k - 1) + o + 1 for i, s, p, d, k, o in dims]


def _is_column(m, x, size, half) -> bool:
    "True if a kernel `misreads_column`, when this layer (if transposed, the gradient of its input) is computed."
    n, zeros = len(m.kernel_size), _zeros_per_side(m)[::-1] or [0]*6
    dims = zip(size, zeros[::2], zeros[1::2], m.dilation, m.kernel_size, m.stride)
    result = x.shape[-n:] if m.transposed else [(i + a + b - d*(k - 1) - 1)//s + 1 for i, a, b, d, k, s in dims]
    one_channel = m.groups == 1 == (m.out_channels if m.transposed else m.in_channels)
    return torch.cpu._is_avx512_supported() and misreads_column(m.kernel_size, m.stride, result, one_channel, half)


def _misreads(m, x, output_size=None) -> tuple: # True if padded wrongly; True if the one column is wrong
    size = _padded_size(m, x, output_size)
    half = torch.is_autocast_enabled('cpu') or x.dtype in (torch.bfloat16, torch.float16)
    padding = _zeros_per_side(m)[::-2] or [0]*len(m.kernel_size)
    padded = torch.cpu._is_avx512_supported() and misreads_padding(m.kernel_size, m.stride, padding, size, half)
    missed = misses_input(m.kernel_size, m.stride, padding, m.dilation, size)
    return padded or missed, _is_column(m, x, size, half)


def is_misread(m, x, output_size=None) -> bool:
    "True if oneDNN may compute this call of a layer that `pads_in_kernel` wrongly."
    return x.device.type == 'cpu' and any(_misreads(m, x, output_size))


def _run(m, forward, stride, /, *args, **kwargs):
    "`forward` without padding, and with this stride."
    padding, m.padding = m.padding, (0,)*len(m.kernel_size)
    own_stride, m.stride = m.stride, stride
    try: return slice_first(m, forward)(*args, **kwargs) if hits_onednn_6035(m) else forward(*args, **kwargs)
    finally: m.padding, m.stride = padding, own_stride


def pad_first(m, forward):
    """`forward` of a convolution that pads with `torch.nn.functional.pad` if a kernel misreads the call. A result of
    one column is computed with stride 1 from the columns that it reads: the kernels compute that correctly."""
    def _forward(x, *args, **kwargs):
        if not is_misread(m, x): return forward(x, *args, **kwargs)
        sides, stride = _zeros_per_side(m) or [0, 0]*len(m.kernel_size), m.stride
        if _misreads(m, x)[1]:
            reach, stride = m.dilation[-1]*(m.kernel_size[-1] - 1) + 1, (*m.stride[:-1], 1)
            sides = [sides[0], reach - sides[0] - x.shape[-1], *sides[2:]]
        return _run(m, forward, stride, pad(x, sides), *args, **kwargs)
    return _forward


def crop_last(m, forward):
    """`forward` of a transposed convolution that crops its output by slicing if a kernel misreads the call. Its weight
    gradient is that of a convolution from its output to its input, and the gradient of its input is the result of that
    convolution. Where this result would be one column wide, a column of zeros is added to the input."""
    def _forward(x, output_size=None):
        if not is_misread(m, x, output_size): return forward(x, output_size)
        crop, size = [-p for p in _zeros_per_side(m)], _padded_size(m, x, output_size)
        if _misreads(m, x, output_size)[1]:
            x = pad(x, (0, 1))
            crop[1] -= m.stride[-1]
        if output_size:
            output_size = [o - a - b for o, a, b in zip(size, crop[-2::-2], crop[::-2])]
        return pad(_run(m, forward, m.stride, x, output_size), crop)
    return _forward


def safe_forward(m, forward):
    "`forward` with correct kernels, for a layer that `hits_onednn_6035` or `pads_in_kernel`."
    if hits_onednn_6035(m): return slice_first(m, forward)
    return crop_last(m, forward) if m.transposed else pad_first(m, forward)
