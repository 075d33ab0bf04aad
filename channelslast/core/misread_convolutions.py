"Convolutions that PyTorch's CPU kernels (oneDNN 3.12) compute wrongly. Each condition includes a few that are correct."

BLOCK = 16  # channels per block in oneDNN's kernel: 16 with AVX-512, 8 with AVX2


def hits_onednn_6035(kernel, stride, padding, channels, groups) -> bool:
    """True if the backward pass of this convolution, in channels last on a CPU, writes outside its memory.

    This happens in the weight gradient of a 1×1 convolution with a stride, without padding and with fewer input
    channels than a block, such as the first layer of RepVGG-like networks, among them MobileOne. Gradients are wrong,
    or the process crashes or hangs (https://github.com/uxlfoundation/oneDNN/issues/6035)."""
    return [*kernel] == [1, 1] and max(stride) > 1 and not any(padding) and channels < BLOCK and groups == 1


def misreads_padding(
    kernel, stride, padding, size, # Per spatial dimension; `padding` is the padding before, `size` that of the input
    half:bool, # True for bf16 and fp16
) -> bool:
    """True if oneDNN's AVX-512 kernels may compute this convolution wrongly because of its padding.

    Some of their loops miscount where a kernel reaches far into the padding: they read or write memory outside of all
    tensors. The weight gradient is then wrong, and in 3-D with few input channels also the output. Each comment names
    the place in oneDNN 3.12."""
    n, k, s, p, i = len(kernel), kernel, stride, padding, size
    if half:
        if p[-1] and has_empty_phase(s, i, half): return True
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


def has_empty_phase(stride, size, half:bool) -> bool: # Per spatial dimension; `size` is that of the input
    """True if oneDNN's AVX-512 kernels may compute this convolution's weight gradient wrongly because its input has fewer
    columns than the stride.

    They copy the columns of each phase of the stride apart, and do not write phases without columns (`nrows` in
    `jit_transpose_utils.cpp`). The values there are multiplied by zero: NaN or infinity among them makes the gradient NaN."""
    return half and stride[-1] > size[-1]


def misses_input(kernel, stride, padding, dilation, size) -> bool: # Arguments as for `misreads_padding`
    """True if oneDNN's kernels, also with AVX2, may crash because several columns of a result read only padding.

    If this holds for all columns, kernels that only write the bias fill them, some to the left of the input and some to
    the right. `jit_brgemm_conv.cpp` makes these kernels for as many columns as the tap before the first one leaves out
    (`kw_f - 1` in `init`), and runs them for as many as the first one leaves out (`perform_outwork`)."""
    k, s, p, d, i = kernel[-1], stride[-1], padding[-1], dilation[-1], size[-1]
    if s == 1 or d == 1 or p < k: return False
    first = range(-p, i + p - d*(k - 1), s)  # the column that each column of the result reads first
    return len(first) > 1 and not any(0 <= c + j*d < i for c in first for j in range(k))
