"""Compare random convolutions, trained as by this library, with float64: `python -m tests.conv_fuzz seed cases seconds`.

Each convolution runs in its own process, since a wrong kernel may crash it. Before each pass, free memory is filled with
NaN, which reveals values that were never written; set MALLOC_MMAP_MAX_=0, with which glibc keeps free memory. The cases
have small spatial sizes, large kernels, strides, paddings and dilations, often one channel, 1-D to 3-D, plain and
transposed, both formats, fp32 and bf16. Prints one line per wrong convolution, then how many ran."""
import json
import os
import random
import sys
import time
from contextlib import nullcontext
from copy import deepcopy

import torch
from torch import nn

from channelslast.core.memory_format import convert_module, convert_nested
from channelslast.core.onednn_workarounds import SafeConvolutions, needs_safe_convolutions

CONVS = {(1, False): nn.Conv1d, (2, False): nn.Conv2d, (3, False): nn.Conv3d,
         (1, True): nn.ConvTranspose1d, (2, True): nn.ConvTranspose2d, (3, True): nn.ConvTranspose3d}
TOLERANCE = dict(fp32=1e-3, bf16=5e-2)  # relative to the largest number


def convolution(rng):
    "A random layer, its input and the gradient of its output, or None if the kernel does not fit."
    n, transposed = rng.choice([1, 2, 2, 3, 3, 3]), rng.random() < 0.25
    def _each(values): return [rng.choice(values) for _ in range(n)]
    k, s, size = _each([1, 2, 3, 3, 5, 7]), _each([1, 1, 2, 2, 3]), _each([1, 1, 2, 2, 3, 4, 5, 6])
    d = _each([1, 2, 3]) if rng.random() < 0.25 else [1]*n
    p = [rng.randrange(d*(k - 1) + 2 if d > 1 else k) for k, d in zip(k, d)]
    depthwise = rng.random() < 0.15
    c_in = rng.choice([1, 1, 3, 8, 16, 32, 64])
    c_out = c_in if depthwise else rng.choice([1, 1, 8, 16, 32, 64])
    try:
        m = CONVS[n, transposed](c_in, c_out, k, stride=s, padding=p, dilation=d, groups=c_in if depthwise else 1)
        x = torch.randn(rng.choice([1, 2, 4, 4]), c_in, *size)  # PyTorch computes some batches of one image without oneDNN
        with torch.no_grad(): y = m.double()(x.double())
    except RuntimeError: return None
    m.float()
    with torch.no_grad():  # values that are exact in bf16
        for p in (*m.parameters(), x): p.copy_(p.bfloat16())
    return (m, x, torch.randn(y.shape).bfloat16()) if 0 < y.numel() < 2e5 else None


def fill_free_memory():
    tensors = [torch.full((2**n,), torch.nan) for n in range(4, 19) for _ in range(8)]
    del tensors


def trained(m, x, g, half=False, last=False, safe=True):
    "Output, and gradients of input, weights and bias."
    m, x = deepcopy(m), x.clone().to(next(m.parameters()).dtype)
    if last: convert_module(m); x = convert_nested(x)
    x.requires_grad_()
    with SafeConvolutions() if safe and needs_safe_convolutions([m], half, last) else nullcontext():
        fill_free_memory()
        with torch.autocast('cpu', torch.bfloat16, enabled=half): y = m(x)
        fill_free_memory()
        y.backward(g.to(y.dtype))
    return [t.detach().double() for t in (y, x.grad, m.weight.grad, m.bias.grad)]


def errors(seed, safe=True) -> dict:
    "Names of the wrong tensors, by format and precision."
    rng = random.Random(seed)
    torch.manual_seed(seed)
    case = convolution(rng)
    if case is None: return {}
    m, x, g = case
    truth, found = trained(deepcopy(m).double(), x.double(), g, safe=False), {}
    for last in False, True:
        for p in 'fp32', 'bf16':
            parts = zip(('result', 'dx', 'dw', 'db'), trained(m, x, g, p == 'bf16', last, safe), truth)
            offs = {k: ((a - b).abs().max()/b.abs().max().clamp_min(1e-30)).item() for k, a, b in parts}
            found['channels last' if last else 'contiguous', p] = [k for k, off in offs.items() if not off <= TOLERANCE[p]]
    return {f'{k}, {m}, {tuple(x.shape)}': v for k, v in found.items()}


def in_own_process(f):
    "The result of `f()` in its own process, or the signal that ended the process."
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try: out = f()
        except BaseException as e: out = {repr(e): ['error']}
        os.write(write, json.dumps(out).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as f: result = f.read()
    status = os.waitpid(pid, 0)[1]
    return {f'signal {status}': ['crash']} if status else json.loads(result)


if __name__ == '__main__':
    first, cases, seconds = map(int, sys.argv[1:4])
    torch.set_num_threads(1)
    nn.Conv2d(3, 8, 3)(torch.randn(1, 3, 8, 8))  # load what every process needs
    end, ran, wrong = time.monotonic() + seconds, 0, 0
    for seed in range(first, first + cases):
        if time.monotonic() > end: break
        out = in_own_process(lambda: errors(seed, 'plain' not in sys.argv))
        if out: ran += 1
        for k, v in out.items():
            if v: print(seed, k, *v); wrong += 1
    print(f'{ran} convolutions, {wrong} wrong')
