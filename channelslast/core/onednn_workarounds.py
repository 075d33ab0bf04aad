"A mode that computes with correct kernels what PyTorch's CPU kernels (oneDNN) compute wrongly: some convolutions."
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode

from .misread_convolutions import BLOCK, has_empty_phase, hits_onednn_6035, misreads_column, misreads_padding, misses_input

PLAIN = 'input', 'weight', 'bias', 'stride', 'padding', 'dilation', 'groups'
TRANSPOSED = 'input', 'weight', 'bias', 'stride', 'padding', 'output_padding', 'groups', 'dilation'
ARGUMENTS = {torch.conv1d: PLAIN, torch.conv2d: PLAIN, torch.conv3d: PLAIN, torch.conv_transpose1d: TRANSPOSED,
             torch.conv_transpose2d: TRANSPOSED, torch.conv_transpose3d: TRANSPOSED}
HALF, ONES, ZEROS = (torch.bfloat16, torch.float16), (1, (1, 1), (1, 1, 1)), (0, (0, 0), (0, 0, 0))
BACKWARD = {Tensor.backward: torch.autograd.backward, **{f: f for f in (torch.autograd.backward, torch.autograd.grad)}}


def _list(values): return [*values] if isinstance(values, (tuple, list)) else [values]
def _per_dim(value, n) -> list: return (_list(value)*n)[:max(n, len(_list(value)))]


def needs_safe_convolutions(
    modules, # Of a model that runs on the CPU
    half=True, # Under autocast, or with half-precision weights?
    channels_last=True, # In this format?
) -> bool:
    "True if the modules may run a convolution that a CPU kernel computes wrongly, also by `torch.nn.functional`."
    avx512, plain = torch.cpu._is_avx512_supported(), not (half or channels_last)
    def _kernels(m, dims):
        return [t for t in (*m._parameters.values(), *m._buffers.values()) if t is not None and t.ndim in dims]
    def _may_crash(m): # with any CPU
        if not isinstance(m, nn.modules.conv._ConvNd):
            return any(t.shape[2:] == (1, 1) and t.shape[1] < BLOCK for t in _kernels(m, [4]))
        k, s, d = (_per_dim(o, len(m.output_padding)) for o in (m.kernel_size, m.stride, m.dilation))
        return max(s) > 1 and (d[-1] > 1 or ({*k} == {1} and m.in_channels < BLOCK))
    def _may_be_wrong(m): # with AVX-512; of 2-D layers in fp32 only those of one channel
        is_layer = isinstance(m, nn.modules.conv._ConvNd)
        def _is_right(t): return t.ndim == 3 or (t.ndim == 4 and is_layer and (t.shape[1] > 1 or m.groups > 1))
        return any(half or t.dtype in HALF or not _is_right(t) for t in _kernels(m, [5] if plain else [3, 4, 5]))
    return any((avx512 and _may_be_wrong(m)) or (not plain and _may_crash(m)) for m in modules)


def _other_call(a, transposed, avx512) -> tuple: # Changed arguments, or None; padding of the output, or None
    """How correct kernels compute a convolution that its own kernels may compute wrongly. A transposed one is the
    backward pass of the convolution from its output to its input, and the reverse.

    The input is padded before the call, or the output of a transposed one cropped after it. A result of one column is
    computed with stride 1 from the columns that it reads. A transposed input of one column gets a second one, zeros."""
    x, w, s, p, groups = a.get('input'), a.get('weight'), a.get('stride', 1), a.get('padding', 0), a.get('groups', 1)
    if not isinstance(x, Tensor) or not isinstance(w, Tensor): return None, None
    n, half = w.ndim - 2, x.dtype in HALF or torch.is_autocast_enabled('cpu')
    if s in ONES and (p in ZEROS or not half): return None, None  # most calls: no condition can hold
    if any(t.layout is not torch.strided or t.is_nested for t in (x, w)) or x.device.type != 'cpu': return None, None
    if x.ndim not in (n + 1, n + 2): return None, None
    k, s, d = w.shape[2:], _per_dim(s, n), _per_dim(a.get('dilation', 1), n)
    reach = [d*(k - 1) + 1 for d, k in zip(d, k)]
    if isinstance(p, str): sides = [((r - 1)//2, r//2) if p == 'same' else (0, 0) for r in reach]
    else: sides = [(p, p) for p in _per_dim(p, n)]
    size, before, sums = x.shape[-n:], [b for b, _ in sides], map(sum, sides)
    if transposed:
        o = _per_dim(a.get('output_padding', 0), n)
        result, size = size, [(i - 1)*s - p + r + o for i, s, p, r, o in zip(size, s, sums, reach, o)]
    else: result = [(i + p - r)//s + 1 for i, s, p, r in zip(size, s, sums, reach)]
    column = avx512 and (misreads_column(k, s, result, w.shape[1] == 1 == groups, half)
                         or (not before[-1] and has_empty_phase(s, size, half)))
    padded = misses_input(k, s, before, d, size) or (avx512 and misreads_padding(k, s, before, size, half))
    if not column and not padded:
        trains = w.requires_grad and torch.is_grad_enabled() and not transposed
        if not trains or not hits_onednn_6035(k, s, before, w.shape[1], groups): return None, None
        return dict(input=x[..., ::s[0], ::s[1]], stride=1), None
    if column and not transposed: s[-1], sides[-1] = 1, (before[-1], reach[-1] - before[-1] - size[-1])
    zeros = [z for side in reversed(sides) for z in side]
    if not transposed: return dict(input=pad(x, zeros), stride=s, padding=0), None
    if column: x, zeros[1] = pad(x, (0, 1)), zeros[1] + s[-1]
    return dict(input=x, padding=0), [-z for z in zeros]


class SafeConvolutions(TorchFunctionMode):
    """Computes a convolution on the CPU in another way where its own kernels may compute it wrongly: result and
    gradients are the same up to rounding. Other calls run as they are. Modules and other threads are not affected."""
    def __init__(self, rewritten=None): # List that gets each function that is called in another way
        super().__init__()
        self.rewritten, self.avx512 = rewritten, torch.cpu._is_avx512_supported()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in ARGUMENTS: return self._convolve(func, args, kwargs)
        return self._backward(func, args, kwargs) if func in BACKWARD else func(*args, **kwargs)

    def _convolve(self, func, args, kwargs):
        a = {**dict(zip(ARGUMENTS[func], args)), **kwargs}
        changed, crop = _other_call(a, ARGUMENTS[func] is TRANSPOSED, self.avx512)
        if changed is None: return func(*args, **kwargs)
        if self.rewritten is not None: self.rewritten.append(func)
        out = self._convolve(func, (), {**a, **changed})
        return out if crop is None else pad(out, crop)

    def _backward(self, func, args, kwargs):
        """PyTorch leaves a mode for each call, but checkpointing runs layers again in these. So they are called in the
        mode, with edges of the graph instead of tensors: a mode does not see calls without tensors."""
        def _edges(tensors): return [get_gradient_edge(t) for t in _list(tensors)]
        inputs, unusual = kwargs.get('inputs'), kwargs.get('is_grads_batched') or kwargs.get('materialize_grads')
        try: edges, given = [*map(_edges, args)], {} if inputs is None else {'inputs': _edges(inputs)}
        except (RuntimeError, AttributeError): unusual = True  # a tensor that needs no gradient, or no tensor
        if unusual: return func(*args, **kwargs)
        for t in _list(inputs or []): t.retain_grad()
        changed = {k.replace('gradient', 'grad_tensors'): v for k, v in kwargs.items()} | given
        with self: return BACKWARD[func](*edges, **changed)


def note_rewritten(rewritten: list):
    "Context manager that appends to `rewritten` each convolution that `SafeConvolutions` computes in another way."
    return SafeConvolutions(rewritten)


@contextmanager
def pause_safe_convolutions():
    """For code without convolutions, such as an optimizer's step: the mode slows down each operation, and each reading of
    a tensor's attribute. Also a decorator."""
    try: from torch.overrides import _get_current_function_mode, _pop_mode_temporarily  # no public names
    except ImportError: _get_current_function_mode = lambda: None
    with _pop_mode_temporarily() if isinstance(_get_current_function_mode(), SafeConvolutions) else nullcontext(): yield
