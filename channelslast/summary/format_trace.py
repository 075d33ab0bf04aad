"""Trace each operation of a forward and backward pass, and note where tensors change their memory format.

Plain PyTorch. A `TorchDispatchMode` sees each ATen operation that really runs, in the backward pass too. PyTorch's
`torch.utils.flop_counter` works this way."""
from bisect import bisect_right
from collections import namedtuple
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..core.dispatch_mode import DispatchMode
from ..core.memory_format import can_be_channels_last
from ..core.module_hooks import module_hooks
from ..core.nested_tensors import tensors_of


@dataclass(frozen=True)
class Conversion:
    "One copy of an activation or gradient from one memory format to another."
    module: str     # Qualified name as in `named_modules`; `''` is the model itself, `'loss'` is everything after it
    cls: str        # Class name of that module
    op: str         # `'aten.cat'`
    backward: bool  # True in the backward pass
    kind: str       # `'lost'`: out of channels last, `'regained'`: back into it, `'entry'`: into it for the first time
    shape: tuple    # Shape of the copied tensor; of the largest if the operation copies several
    bytes: int      # Elements of that tensor × element size, counted once


def _strides_grow(t: Tensor, order: tuple) -> bool:
    "True if the strides of `t` grow in this order of dimensions. Gaps between elements don't matter."
    minimum = 1
    for d in order:
        if t.shape[d] == 1: continue
        if t.stride(d) < minimum: return False
        minimum = t.stride(d) * t.shape[d]
    return True


def layout_of(t: Tensor):
    """`'channels_last'`, `'other'`, or None for a tensor without a clear format: not 4-D or 5-D floating-point, one
    channel, height and width 1 (both formats are the same, or can't be told apart in 5-D), or expanded elements.

    The order of the strides decides, as in PyTorch's kernels, so a slice of a channels-last tensor is channels last.
    Strides of dimensions of size 1 don't count: of a batch of one, only channels and spatial dimensions decide."""
    if t.dim() not in (4, 5) or not t.is_floating_point() or t.layout is not torch.strided: return None
    spatial = range(t.dim() - 1, 1, -1)
    if not t.numel() or t.shape[1] == 1 or t.shape[-1] == t.shape[-2] == 1: return None
    if any(t.stride(d) == 0 and t.shape[d] > 1 for d in range(t.dim())): return None
    return 'channels_last' if _strides_grow(t, (1, *spatial, 0)) else 'other'


Owner = namedtuple('Owner', 'name cls')
# History of an activation: its format, whether it or a source of it was channels last, the pass that made it
Past = namedtuple('Past', 'is_channels_last was_channels_last backward')


def _is_pooled(t: Tensor) -> bool:
    "True if the spatial size is 1×1 or one value is expanded over it."
    return t.dim() in (4, 5) and all(t.shape[d] == 1 or t.stride(d) == 0 for d in range(2, t.dim()))


def _innermost(t: Tensor):
    "The dimension with the smallest stride."
    return min((d for d in range(t.dim()) if t.shape[d] > 1), key=t.stride, default=None)


def _ref(t: Tensor): return StorageWeakRef(t.untyped_storage())  # the same for views of one memory


def _strided(tree) -> list:
    "The strided tensors in nested containers, each with its memory. Sparse and quantized tensors have no strides."
    return [(t, _ref(t)) for t in tensors_of(tree) if t.layout is torch.strided]


def _new_results(func, ins, outs, sources) -> tuple:
    """The results in new memory, and the sources that they were made from. Views and in-place results are not new.
    The result of `copy_` counts as new, and its target is no source."""
    if func is torch.ops.aten.copy_.default: return outs, [(t, p) for t, p in sources if t is not ins[0][0]]
    known = {r for _, r in ins}
    return [(t, r) for t, r in outs if r not in known], sources


def _keeps_innermost(t, sources) -> bool:
    "True if `t` has the shape and innermost dimension of a channels-last source: it may be flattened or permuted."
    return any(p.is_channels_last and o.shape == t.shape and _innermost(o) == _innermost(t) for o, p in sources)


def _rearranged(func, new, sources) -> list:
    """The sources that are rearranged views of channels-last memory, if the result has another innermost dimension.
    A channel shuffle copies such views, and so does attention over flattened spatial dimensions."""
    if not new or func.overloadpacket is torch.ops.aten.bmm: return []  # a matrix product's result has no channels
    return [t for t, p in sources if p.is_channels_last and t.dim() > 2 and t.shape == new[0].shape
            and layout_of(t) != 'channels_last' and _innermost(t) != _innermost(new[0])]


class FormatTrace(DispatchMode):
    """Context manager that records each `Conversion` in `.rows`, in order of execution.

    `.counts[False]` (forward) and `.counts[True]` (backward) are `[kept, had]`: `had` operations made a new tensor from
    a channels-last activation, and `kept` of these new tensors are channels last too. `.has_images` is True if any
    input or activation is a floating-point 4-D or 5-D tensor.

    An activation is computed from the `inputs`; tensors computed only from parameters never count. Set `.backward` when
    the backward pass starts. Each conversion names the module whose forward ran the operation. In the backward pass, it
    names the module whose forward created the autograd node that is running."""
    def __init__(self,
        model: nn.Module, # Its `named_modules` give the names
        inputs, # Tensors, in any nested containers, that activations are computed from
        loss_name: str, # Class name to show for the loss
    ):
        super().__init__()
        self.names = {id(m): Owner(n, type(m).__name__) for n, m in model.named_modules()}
        self.root, self.loss = self.names[id(model)], Owner('loss', loss_name)
        self.model, self.rows, self.counts, self.backward = model, [], {False: [0, 0], True: [0, 0]}, False
        self.stack = []  # modules that are running
        self.idle = self.latest = self.root  # owner while no module runs; owner of the latest autograd node
        self.starts, self.owners = [], []  # `owners[i]` creates the autograd nodes numbered from `starts[i]` on
        tensors = tensors_of(inputs)
        self.has_images, layouts = any(map(can_be_channels_last, tensors)), [*map(layout_of, tensors)]
        self.past = {_ref(t): Past(o == 'channels_last', o == 'channels_last', False) for t, o in zip(tensors, layouts)}

    def __enter__(self):
        self._hooks = module_hooks(self._enter_module, self._leave_module)
        self._hooks.__enter__()
        self._note_owner()
        # otherwise CUDA's backward pass runs in a thread of its own, with its own sequence numbers
        self._threads = torch.autograd.set_multithreading_enabled(False)
        return super().__enter__()

    def __exit__(self, *exc):
        self._hooks.__exit__(*exc)
        self._threads.__exit__(*exc)
        return super().__exit__(*exc)

    @property
    def running(self): return self.stack[-1] if self.stack else self.idle

    def _note_owner(self):
        self.starts.append(torch._C._autograd._get_sequence_nr())
        self.owners.append(self.running)

    def _enter_module(self, m, args):
        self.stack.append(self.names.get(id(m), self.running))
        self._note_owner()

    def _leave_module(self, m, args, out):
        if self.stack: self.stack.pop()
        if m is self.model: self.idle = self.loss
        self._note_owner()

    def _owner(self):
        if not self.backward or self.stack: return self.running  # checkpoints run modules in the backward pass
        node = torch._C._current_autograd_node()
        number = 2**63 if node is None else node._sequence_nr()
        # outside of nodes the engine sums gradients, and nodes of parameters have the number 2**64 - 1
        if number < 2**63: self.latest = self.owners[max(bisect_right(self.starts, number) - 1, 0)]
        return self.latest

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # the other outputs of a convolution's backward pass belong to weight and bias
        result = out[0] if func is torch.ops.aten.convolution_backward.default else out
        self._record(func, _strided((args, kwargs)), _strided(result))
        return out

    def _record(self, func, ins, outs):
        owner, sources = self._owner(), [(t, self.past[r]) for t, r in ins if r in self.past]
        if not sources: return
        new, sources = _new_results(func, ins, outs, sources)
        self._remember(outs, new, sources)
        self.has_images = self.has_images or any(can_be_channels_last(t) for t, _ in outs)
        new, layouts = [t for t, _ in new], {layout_of(t) for t, _ in new} - {None}
        read = [t for t, _ in sources if layout_of(t) == 'channels_last']
        other = [(t, p) for t, p in sources if layout_of(t) == 'other']
        if not read:
            read = _rearranged(func, new, sources)
            if read: layouts = {'other'}
        lost = bool(read) and 'other' in layouts
        if read and layouts:
            self.counts[self.backward][1] += 1
            self.counts[self.backward][0] += not lost
        if lost: self._add_row(owner, func, 'lost', max(read, key=Tensor.numel))
        elif other and 'channels_last' in layouts:
            t, p = max(other, key=lambda o: o[0].numel())
            self._add_row(owner, func, 'regained' if p.was_channels_last else 'entry', t)

    def _remember(self, outs, new, sources):
        "Store the format of the results, and whether they come from channels last."
        # a gradient's past comes from gradients, not from saved activations; after pooling to 1×1 it has none
        was = any(p.was_channels_last for t, p in sources if p.backward == self.backward and not _is_pooled(t))
        new = {r for _, r in new}
        for t, r in outs:
            if r in self.past and r not in new: continue
            is_channels_last = layout_of(t) == 'channels_last' or _keeps_innermost(t, sources)
            self.past[r] = Past(is_channels_last, was or is_channels_last, self.backward)

    def _add_row(self, owner, func, kind, t):
        self.rows.append(Conversion(*owner, str(func.overloadpacket), self.backward, kind, tuple(t.shape),
                                    t.numel() * t.element_size()))
