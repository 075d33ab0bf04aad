"Convolutions that PyTorch's CPU kernels (oneDNN) compute wrongly, and forwards that use correct kernels."
import torch
from torch import nn
from torch.nn.functional import pad

__all__ = ['hits_onednn_6035', 'slice_first', 'pads_in_kernel', 'misreads_padding', 'is_misread', 'pad_first',
           'crop_last', 'safe_forward']

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
    "True if an AVX-512 kernel pads the input of this layer (or crops its output, if transposed)."
    return (isinstance(m, nn.modules.conv._ConvNd) and _has_tuples(m) and m.padding_mode == 'zeros'
            and any(_zeros_per_side(m)) and torch.cpu._is_avx512_supported())


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


def _padded_size(m, x, output_size=None) -> list:
    "Size of the tensor that a layer pads: its input; of a transposed convolution, which crops, its output."
    n = len(m.kernel_size)
    if not m.transposed: return x.shape[-n:]
    dims = zip(x.shape[-n:], m.stride, m.padding, m.dilation, m.kernel_size, m.output_padding)
    return output_size[-n:] if output_size else [(i - 1)*s - 2*p + d*(k - 1) + o + 1 for i, s, p, d, k, o in dims]


def is_misread(m, x, output_size=None) -> bool:
    "True if oneDNN may compute this call of a layer that `pads_in_kernel` wrongly."
    size = _padded_size(m, x, output_size)
    half = torch.is_autocast_enabled('cpu') or x.dtype in (torch.bfloat16, torch.float16)
    return x.device.type == 'cpu' and misreads_padding(m.kernel_size, m.stride, _zeros_per_side(m)[::-2], size, half)


def _run_unpadded(m, forward, /, *args, **kwargs):
    padding, m.padding = m.padding, (0,)*len(m.kernel_size)
    try: return forward(*args, **kwargs)
    finally: m.padding = padding


def pad_first(m, forward):
    "`forward` of a convolution that pads with `torch.nn.functional.pad` if the kernel `misreads_padding`."
    def _forward(x, *args, **kwargs):
        if not is_misread(m, x): return forward(x, *args, **kwargs)
        return _run_unpadded(m, forward, pad(x, _zeros_per_side(m)), *args, **kwargs)
    return _forward


def crop_last(m, forward):
    """`forward` of a transposed convolution that crops its output by slicing if the kernel `misreads_padding`. Its
    weight gradient is that of a convolution from its output to its input."""
    def _forward(x, output_size=None):
        if not is_misread(m, x, output_size): return forward(x, output_size)
        crop = [-p for p in _zeros_per_side(m)]
        if output_size: output_size = [o + 2*p for o, p in zip(_padded_size(m, x, output_size), m.padding)]
        return pad(_run_unpadded(m, forward, x, output_size), crop)
    return _forward


def safe_forward(m, forward):
    "`forward` with correct kernels, for a layer that `hits_onednn_6035` or `pads_in_kernel`."
    if hits_onednn_6035(m): return slice_first(m, forward)
    return crop_last(m, forward) if m.transposed else pad_first(m, forward)
