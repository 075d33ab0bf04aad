"Run a model with folded weights, and detect when they are no longer current. Plain PyTorch."
import torch
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..core.undo import ForwardPatch
from .fold_trace import STATISTICS, WEIGHTS, Cast, Pair, layer_tensors, memory_ref

__all__ = ['FoldedWeights']


@torch.inference_mode(False)
@torch.no_grad()
def fold(pair: Pair) -> dict:
    "Folded weight and bias, in the dtype and strides that the convolution runs in. Computed in at least fp32."
    conv, norm = layer_tensors(pair.conv), layer_tensors(pair.norm)
    wide = torch.promote_types(conv['weight'].dtype, torch.float32)
    def _get(tensors, names): return [tensors[k].to(wide) if k in tensors else None for k in names]
    weight, bias = fuse_conv_bn_weights(*_get(conv, WEIGHTS), *_get(norm, STATISTICS), pair.norm.eps,
                                        *_get(norm, WEIGHTS))
    weight = torch.empty_like(conv['weight'], dtype=pair.dtype).copy_(weight)
    return dict(weight=weight, bias=bias.detach().to(pair.dtype))


def _sources(o) -> list:
    "The tensors, or None, that the weights of a `Pair` or a `Cast` are computed from."
    if isinstance(o, Cast): return [o.module._parameters.get(o.name)]
    buffers = *STATISTICS, 'num_batches_tracked'  # the last counts the batches that wrote running statistics
    return [m._parameters.get(k) for m in (o.conv, o.norm) for k in WEIGHTS] + [o.norm._buffers.get(k) for k in buffers]


def _fingerprint(plan) -> list:
    "Changes with the version counters of all sources and with `t.data = …`, but not with `t.data.add_(…)`."
    def _of(t): return id(t), t._version, t.untyped_storage()._cdata, t.storage_offset(), t.stride()
    try: tensors = [t if t is None else _of(t) for o in plan for t in _sources(o)]
    except RuntimeError: return []  # inference tensors have no version counter
    return tensors + [o.norm.eps for o in plan if isinstance(o, Pair)]


class FoldedWeights:
    "The weights of a plan, computed once. `run` runs the model with them."
    def __init__(self, plan: tuple):
        self.plan, self.sources, self.fingerprint = plan, [t for o in plan for t in _sources(o)], _fingerprint(plan)
        self.refs = [t if t is None else memory_ref(t) for t in self.sources]  # new memory can't reuse their addresses
        self.pairs = {m: o for o in plan if isinstance(o, Pair) for m in o[:2]}
        self.tensors = {o.conv: fold(o) for o in plan if isinstance(o, Pair)}
        for o in plan:
            if isinstance(o, Pair): continue
            self.tensors.setdefault(o.module, {})[o.name] = o.module._parameters[o.name].detach().to(o.dtype)

    def is_current(self) -> bool:
        "True if the model's weights and running statistics are still those that these weights were computed from."
        return self.fingerprint == _fingerprint(self.plan)

    def run(self, forward, args, kwargs) -> tuple: # Output; True if it is valid
        "Run `forward` with these weights. Valid if each folded convolution ran once and its batch norm got the output."
        pending, mismatched = {}, []
        def _wrap(m, own):
            pair = self.pairs.get(m)
            if pair and m is pair.norm: return _skip_norm(pair, own, pending, mismatched)
            return _with_weights(m, own, self.tensors[m], pair, pending, mismatched)
        try:
            with ForwardPatch({*self.pairs, *self.tensors}, _wrap): out = forward(*args, **kwargs)
        except Exception:
            if not mismatched: raise
            return None, False
        return out, not (pending or mismatched)


def _with_weights(m, forward, tensors, pair, pending, mismatched):
    "`forward` with these tensors instead of the module's parameters, which are restored right after."
    own = m._parameters
    def _forward(*args, **kwargs):
        saved = {k: own[k] for k in tensors}
        try:
            own.update(tensors)
            out = forward(*args, **kwargs)
        finally: own.update(saved)
        if pair:
            if m in pending: mismatched.append(m)
            pending[m] = out
        return out
    return _forward


def _skip_norm(pair, forward, pending, mismatched):
    "The rest of a folded batch norm's forward; its own forward if the input is not its convolution's output."
    def _forward(input):
        if pending.pop(pair.conv, None) is not input:
            mismatched.append(pair.norm)
            return forward(input)
        for m in pair.after: input = m(input)
        return input
    return _forward
