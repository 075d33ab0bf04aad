"Run a private copy with folded batch norms and weights that are cast in advance."
from functools import partial

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..core.model_copy import HOOKS, own_dicts
from .fold_trace import STATISTICS, WEIGHTS, Cast, ForwardTrace, Pair, layer_tensors
from .prepared_model import NotPrepared

ORDER = 'it does not run the same layers for every batch'


def fold(conv, norm, eps, dtype) -> dict: # Tensors of the layers
    "Folded weight and bias, in the dtype and strides that the convolution runs in. Computed in at least fp32."
    wide = torch.promote_types(conv['weight'].dtype, torch.float32)
    def _get(tensors, names): return [tensors[k].to(wide) if k in tensors else None for k in names]
    weight, bias = fuse_conv_bn_weights(*_get(conv, WEIGHTS), *_get(norm, STATISTICS), eps, *_get(norm, WEIGHTS))
    return dict(weight=torch.empty_like(conv['weight'], dtype=dtype).copy_(weight), bias=bias.to(dtype))


class Pairing:
    "Checks that each folded convolution runs once, and that its batch norm gets the output."
    def __init__(self): self.pending = {}

    def mark(self, key, m, args, out):
        if key in self.pending: raise NotPrepared(ORDER)
        self.pending[key] = out

    def skip_norm(self, key, after, input):
        "The rest of a folded batch norm's forward."
        if self.pending.pop(key, None) is not input: raise NotPrepared(ORDER)
        for m in after: input = m(input)
        return input


def trace_pass(model, args, kwargs) -> tuple: # The plan of `Pair`s and `Cast`s; number of batch norms after convolutions
    "Trace one pass of a private copy."
    with ForwardTrace(model) as trace: out = model(*args, **kwargs)
    plan = trace.plan()
    del out  # only now: what the pass still holds is read by others
    for c in (*trace.calls, *trace.stack): vars(c).clear()  # calls and operations name each other, and hold modules
    return plan, trace.found


class FoldedModel:
    "Runs a copy with the folded and cast weights of a plan."
    def __init__(self, copy, plan):
        self.copy, self.pairing = copy, Pairing()
        self.pairs = [(o, layer_tensors(o.conv), layer_tensors(o.norm)) for o in plan if isinstance(o, Pair)]
        self.casts = [(o, layer_tensors(o.module)[o.name]) for o in plan if isinstance(o, Cast)]
        for i, (pair, *_) in enumerate(self.pairs):
            for k in HOOKS: vars(pair.norm)[k].clear()  # casts around a layer that does not compute
            pair.conv.register_forward_hook(partial(self.pairing.mark, i))
            pair.norm.forward = partial(self.pairing.skip_norm, i, pair.after)
        self.refresh()

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self):
        "Compute the weights from those that the user's model has now."
        self.copy.follow()
        for pair, conv, norm in self.pairs: self._set(pair.conv, fold(conv, norm, pair.norm.eps, pair.dtype))
        for o, t in self.casts: self._set(o.module, {o.name: t.to(o.dtype)})
        return True

    def _set(self, m, tensors):
        own_dicts(m)[0].update({k: nn.Parameter(t, requires_grad=False) for k, t in tensors.items()})

    def __call__(self, *args, **kwargs):
        self.pairing.pending.clear()
        out = self.copy.model(*args, **kwargs)
        if self.pairing.pending: raise NotPrepared(ORDER)
        return out
