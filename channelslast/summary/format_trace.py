"""Watch every operation of a forward and backward pass and note where tensors change their memory format.

Plain PyTorch. A `TorchDispatchMode` sees each ATen operation that really runs, backward included; PyTorch's own
`torch.utils.flop_counter` is built so."""
from bisect import bisect_right
from collections import namedtuple
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.memory_format import has_channels_last_format
from ..core.nested_tensors import tensors_of

__all__ = ['Conversion', 'FormatTrace', 'layout_of']


@dataclass(frozen=True)
class Conversion:
    "One copy of an activation or gradient from one memory format to another."
    module: str     # Qualified name as in `named_modules`; `''` is the model itself, `'loss'` all that follows it
    cls: str        # Class name of that module
    op: str         # `'aten.cat'`
    backward: bool  # In the backward pass?
    kind: str       # `'lost'`: out of channels last, `'regained'`: back into it, `'entry'`: into it for the first time
    shape: tuple    # Of the tensor copied; of the largest, where the operation copies several
    bytes: int      # Its elements × element size, counted once


def _nested(t: Tensor, order: tuple) -> bool:
    "Do the strides of `t` grow in this order of its dimensions, whatever lies between its elements?"
    least = 1
    for d in order:
        if t.shape[d] == 1: continue
        if t.stride(d) < least: return False
        least = t.stride(d) * t.shape[d]
    return True


def layout_of(
    t: Tensor,
):
    """`'channels_last'`, `'other'`, or `None` where there is nothing to tell: no 4-D or 5-D floating-point tensor, one
    channel or 1×1 pixels (both formats are one, or a clip's can't be told from a view's), elements that share memory
    (`expand`).

    Judged by the order of the strides, as PyTorch's kernels do, so that a slice of a channels-last tensor is channels
    last. The stride of a dimension of size 1 means nothing, so a batch of one is judged by its channels and pixels
    alone."""
    if t.dim() not in (4, 5) or not t.is_floating_point() or t.layout is not torch.strided: return None
    pixels = range(t.dim() - 1, 1, -1)
    if not t.numel() or t.shape[1] == 1 or t.shape[-1] == t.shape[-2] == 1: return None
    if any(t.stride(d) == 0 and t.shape[d] > 1 for d in range(t.dim())): return None
    return 'channels_last' if _nested(t, (1, *pixels, 0)) else 'other'


Owner = namedtuple('Owner', 'name cls')
# of an activation's memory: is it channels last? did it come from such? was it made in the backward pass?
Past = namedtuple('Past', 'is_last was_last backward')


def _pooled(t: Tensor) -> bool:
    "1×1 pixels, or one value expanded over them?"
    return t.dim() in (4, 5) and all(t.shape[d] == 1 or t.stride(d) == 0 for d in range(2, t.dim()))


def _innermost(t: Tensor):
    "The dimension along which neighbours in memory lie."
    return min((d for d in range(t.dim()) if t.shape[d] > 1), key=t.stride, default=None)


def _ref(t: Tensor): return StorageWeakRef(t.untyped_storage())  # views are one with what they view


# rules: what an operation does to the formats of what it gets

def _strided(tree) -> list:
    """The strided tensors in nested containers, each with its memory; sparse and quantized ones have no strides to
    judge."""
    return [(t, _ref(t)) for t in tensors_of(tree) if t.layout is torch.strided]


def _made(func, ins, outs, sources) -> tuple:
    """Those results that are new, and the sources that they were made from. Views and what is written in place are not
    new, but `copy_` is a copy from one tensor into another: all of its result is new, and its target no source."""
    if func is torch.ops.aten.copy_.default: return outs, [(t, p) for t, p in sources if t is not ins[0][0]]
    known = {r for _, r in ins}
    return [(t, r) for t, r in outs if r not in known], sources


def _stays_innermost(t, sources) -> bool:
    """In any number of dimensions: a tensor of a channels-last source's shape whose memory runs along the same
    dimension is channels last too, as with pixels flattened or channels moved to the end."""
    return any(p.is_last and o.shape == t.shape and _innermost(o) == _innermost(t) for o, p in sources)


def _rearranged(func, new, sources) -> list:
    """The sources that are rearranged views of channels-last memory, of any number of dimensions, where the result has
    something else than channels innermost: what a channel shuffle copies, or attention over flattened pixels."""
    if not new or func.overloadpacket is torch.ops.aten.bmm: return []  # a matrix product's result has no channels
    return [t for t, p in sources if p.is_last and t.dim() > 2 and t.shape == new[0].shape
            and layout_of(t) != 'channels_last' and _innermost(t) != _innermost(new[0])]


class FormatTrace(TorchDispatchMode):
    """Context manager: notes each `Conversion` in `.rows`, in order of execution, and in `.counts[backward]` how many
    operations `(kept, had)` channels last: of those that took a channels-last activation and made a new one; in
    `.has_images`, whether any input or activation has a channels-last format.

    An activation is what was computed from the `inputs`; what was computed from parameters alone never counts. Set
    `.backward` when the backward pass starts. The module named is the one whose forward ran the operation, or, in the
    backward pass, the one whose forward created the autograd node that is running."""
    def __init__(self,
        model: nn.Module, # Its `named_modules` give the names
        inputs, # Tensors, nested as you like, that activations are computed from
        loss_name: str, # Class name to show for the loss
    ):
        super().__init__()
        self.names = {id(m): Owner(n, type(m).__name__) for n, m in model.named_modules()}
        self.root, self.loss = self.names[id(model)], Owner('loss', loss_name)
        self.model, self.rows, self.counts, self.backward = model, [], {False: [0, 0], True: [0, 0]}, False
        self.stack = []  # modules that are running
        self.idle = self.last = self.root  # who owns what no module runs
        self.since, self.owners = [], []  # from which autograd sequence number on who creates the nodes
        self.has_images = any(map(has_channels_last_format, tensors_of(inputs)))
        self.past = {_ref(t): Past(*[layout_of(t) == 'channels_last']*2, False)
                     for t in tensors_of(inputs)}

    def __enter__(self):
        self._handles = [hooks.register_module_forward_pre_hook(self._enter_module),
                         hooks.register_module_forward_hook(self._leave_module, always_call=True)]
        self._note_owner()
        # otherwise CUDA's backward pass runs in a thread of its own, with its own sequence numbers
        self._threads = torch.autograd.set_multithreading_enabled(False)
        return super().__enter__()

    def __exit__(self, *exc):
        for h in self._handles: h.remove()
        self._threads.__exit__(*exc)
        return super().__exit__(*exc)

    # who is running

    @property
    def running(self): return self.stack[-1] if self.stack else self.idle

    def _note_owner(self):
        self.since.append(torch._C._autograd._get_sequence_nr())
        self.owners.append(self.running)

    def _enter_module(self, m, args):
        self.stack.append(self.names.get(id(m), self.running))
        self._note_owner()

    def _leave_module(self, m, args, out):
        if self.stack: self.stack.pop()
        if m is self.model: self.idle = self.loss
        self._note_owner()

    def _owner(self):
        if not self.backward or self.stack: return self.running  # a stack in the backward pass: checkpoints recompute
        node = torch._C._current_autograd_node()
        # between nodes the engine sums gradients; to parameters it is all the same who hands them on
        if node is not None and (nr := node._sequence_nr()) < 2**63:
            self.last = self.owners[max(bisect_right(self.since, nr) - 1, 0)]
        return self.last

    # what it does

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # the other outputs of a convolution's backward pass belong to weight and bias
        result = out[0] if func is torch.ops.aten.convolution_backward.default else out
        self._look(func, _strided((args, kwargs)), _strided(result))
        return out

    def _look(self, func, ins, outs):
        owner, sources = self._owner(), [(t, self.past[r]) for t, r in ins if r in self.past]
        if not sources: return
        made, sources = _made(func, ins, outs, sources)
        self._remember(outs, made, sources)
        self.has_images = self.has_images or any(has_channels_last_format(t) for t, _ in outs)
        new, layouts = [t for t, _ in made], {layout_of(t) for t, _ in made} - {None}
        last = [t for t, _ in sources if layout_of(t) == 'channels_last']
        if not last and (last := _rearranged(func, new, sources)): layouts = {'other'}
        lost = bool(last) and 'other' in layouts
        if last and layouts:
            self.counts[self.backward][1] += 1
            self.counts[self.backward][0] += not lost
        if lost: self._note(owner, func, 'lost', max(last, key=Tensor.numel))
        elif 'channels_last' in layouts: self._note_return(owner, func, sources)

    def _remember(self, outs, made, sources):
        "What the results are, and whether they come from channels last."
        # a gradient's past is its own, not that of saved activations that it meets; pooled to 1×1 pixels it has none
        was = any(p.was_last for t, p in sources if p.backward == self.backward and not _pooled(t))
        made = {r for _, r in made}
        for t, r in outs:
            if r in self.past and r not in made: continue
            is_last = layout_of(t) == 'channels_last' or _stays_innermost(t, sources)
            self.past[r] = Past(is_last, was or is_last, self.backward)

    def _note_return(self, owner, func, sources):
        "An operation that made channels last of what was not: again, or for the first time?"
        other = [(t, p) for t, p in sources if layout_of(t) == 'other']
        if not other: return
        t, p = max(other, key=lambda o: o[0].numel())
        self._note(owner, func, 'regained' if p.was_last else 'entry', t)

    def _note(self, owner, func, kind, t):
        self.rows.append(Conversion(*owner, str(func.overloadpacket), self.backward, kind, tuple(t.shape),
                                    t.numel() * t.element_size()))
