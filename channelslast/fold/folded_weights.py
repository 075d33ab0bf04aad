"Running a model with its batch norms folded, by a plan; and what such a plan depends on. Plain PyTorch."
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..core.memory_format import unique_modules
from ..core.nested_tensors import leaves_of
from ..core.undo import ForwardPatch
from .fold_trace import HOOKS, STATISTICS, WEIGHTS, Cast, Pair, foreign_forward, layer_tensors, memory_ref

__all__ = ['FoldedWeights', 'is_eager', 'has_global_hooks', 'structure_key', 'input_key']

SWITCHES, PLAIN = {bool, str, type(None)}, (bool, int, float, str)
WRAPPED = nn.DataParallel, nn.parallel.DistributedDataParallel, torch.jit.ScriptModule


@torch.inference_mode(False)
@torch.no_grad()
def fold(pair: Pair) -> dict:
    """Weight and bias that compute both, in the type and the strides that the convolution runs in; computed in fp32 at
    least."""
    conv, norm = layer_tensors(pair.conv), layer_tensors(pair.norm)
    wide = torch.promote_types(conv['weight'].dtype, torch.float32)
    def _get(state, names): return [state[k].to(wide) if k in state else None for k in names]
    weight, bias = fuse_conv_bn_weights(*_get(conv, WEIGHTS), *_get(norm, STATISTICS), pair.norm.eps,
                                        *_get(norm, WEIGHTS))
    weight = torch.empty_like(conv['weight'], dtype=pair.dtype).copy_(weight)
    return dict(weight=weight, bias=bias.detach().to(pair.dtype))


def _sources(o) -> list:
    "The tensors, or None, that a pair's or a cast's numbers come from."
    if isinstance(o, Cast): return [o.module._parameters.get(o.name)]
    conv, norm, stats = o.conv._parameters, o.norm._parameters, o.norm._buffers
    counted = *STATISTICS, 'num_batches_tracked'  # training counts its batches, which tells that it wrote statistics
    return [*(p.get(k) for p in (conv, norm) for k in WEIGHTS), *(stats.get(k) for k in counted)]


def _mark(t):
    return None if t is None else (id(t), t._version, t.untyped_storage()._cdata, t.storage_offset(), t.stride())


def _marks(plan, tensors) -> list:
    "Others after each change that PyTorch counts, and after `t.data = …`; `t.data.add_(…)` it can't see."
    try: marks = [_mark(t) for t in tensors]
    except RuntimeError: return []  # an inference tensor, whose changes are not counted
    return marks + [o.norm.eps for o in plan if isinstance(o, Pair)]


class FoldedWeights:
    "The weights that a plan needs, computed once; runs the model with them."
    def __init__(self, plan: tuple):
        self.plan, self.sources = plan, [t for o in plan for t in _sources(o)]
        self.marks = _marks(plan, self.sources)
        self.held = [t if t is None else memory_ref(t) for t in self.sources]  # whose addresses no later memory gets
        self.pairs = {m: o for o in plan if isinstance(o, Pair) for m in o[:2]}
        self.tensors = {o.conv: fold(o) for o in plan if isinstance(o, Pair)}
        for o in plan:
            if not isinstance(o, Cast): continue
            self.tensors.setdefault(o.module, {})[o.name] = o.module._parameters[o.name].detach().to(o.dtype)

    def is_current(self) -> bool:
        "Are the model's weights and statistics those that these were computed from?"
        return self.marks == _marks(self.plan, [t for o in self.plan for t in _sources(o)])

    def run(self, forward, args, kwargs) -> tuple: # Output; True
        "What `forward` gives, and whether each folded batch norm got just what its convolution had made."
        pending, mismatched = {}, []
        def _wrap(m, own):
            pair = self.pairs.get(m)
            if pair and m is pair.norm: return _passes_on(pair, own, pending, mismatched)
            return _computes(m, own, self.tensors[m], pair, pending, mismatched)
        try:
            with ForwardPatch({*self.pairs, *self.tensors}, _wrap): out = forward(*args, **kwargs)
        except Exception:
            if not mismatched: raise
            return None, False
        return out, not (pending or mismatched)


def _computes(m, forward, tensors, pair, pending, mismatched):
    "`forward` with these in place of the module's parameters, and right after with its own."
    own = m._parameters
    def _forward(*args, **kwargs):
        kept = {k: own[k] for k in tensors}
        try:
            own.update(tensors)
            out = forward(*args, **kwargs)
        finally: own.update(kept)
        if pair:
            if m in pending: mismatched.append(m)
            pending[m] = out
        return out
    return _forward


def _passes_on(pair, forward, pending, mismatched):
    "What is left of a batch norm's forward; its own for what is not its convolution's."
    def _forward(input):
        if pending.pop(pair.conv, None) is not input:
            mismatched.append(pair.norm)
            return forward(input)
        for m in pair.after: input = m(input)
        return input
    return _forward


def structure_key(model) -> tuple: # Modules; their modes; hooks; forwards; switches
    "What a plan depends on beside the input. Each batch asks."
    found = unique_modules(model)
    own = [vars(m) for m in found]
    modes, attached = [d.get('training') for d in own], [(*d[k],) for d in own for k in HOOKS if d.get(k)]
    forwards = [(m, d.get('_compiled_call_impl'), foreign_forward(m)) for m, d in zip(found, own)
                if 'forward' in d or '_compiled_call_impl' in d]
    # of the models' own classes, whose forward may ask for them: `self.return_features = True`
    theirs = (d for m, d in zip(found, own) if type(m).__module__[:8] != 'torch.nn')
    return found, modes, attached, forwards, [v for d in theirs for v in d.values() if type(v) in SWITCHES]


def is_eager(modules) -> bool:
    "Are these plain modules? Not compiled, scripted or wrapped to run on several devices."
    def _is(m): return not isinstance(m, WRAPPED) and '_orig_mod' not in m._modules and m._compiled_call_impl is None
    return all(map(_is, modules))


def has_global_hooks() -> bool:
    "Do hooks of all modules see each layer's output?"
    return any(getattr(hooks, f'_global{k}') for k in HOOKS)


def input_key(args, kwargs) -> tuple: # Of the kind of input, and of the shapes but for the batch
    "What a plan depends on in the input."
    found = leaves_of((args, kwargs))
    devices = {t.device.type for t in found if isinstance(t, Tensor)}
    def _kind(x): return (x.dtype, x.device) if isinstance(x, Tensor) else x if isinstance(x, PLAIN) else type(x)
    def _casts(d): return torch.amp.is_autocast_available(d) and torch.is_autocast_enabled(d)
    kind, autocast = map(_kind, found), [(d, torch.get_autocast_dtype(d)) for d in sorted(devices) if _casts(d)]
    return (*kind, *autocast), tuple(t.shape[1:] for t in found if isinstance(t, Tensor))
