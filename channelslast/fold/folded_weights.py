"Running a model with its batch norms folded, by a plan; and what such a plan depends on. Plain PyTorch."
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..core.memory_format import modules_of
from ..core.nested_tensors import leaves
from ..core.undo import replace_forwards
from .fold_trace import HOOKS, STATISTICS, WEIGHTS, Cast, Pair, foreign, memory_of, state_of

__all__ = ['Prepared', 'is_eager', 'hooked_globally', 'structure_of', 'signature_of']

SWITCHES, PLAIN = {bool, str, type(None)}, (bool, int, float, str)
WRAPPED = nn.DataParallel, nn.parallel.DistributedDataParallel, torch.jit.ScriptModule


@torch.inference_mode(False)
@torch.no_grad()
def fold(pair: Pair) -> dict:
    """Weight and bias that compute both, in the type and the strides that the convolution runs in; computed in fp32 at
    least."""
    conv, norm = state_of(pair.conv), state_of(pair.norm)
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


class Prepared:
    "The weights that a plan needs, computed once; runs the model with them."
    def __init__(self, plan: tuple):
        self.plan, self.sources = plan, [t for o in plan for t in _sources(o)]
        self.marks = _marks(plan, self.sources)
        self.held = [t if t is None else memory_of(t) for t in self.sources]  # whose addresses no later memory gets
        self.pairs = {m: o for o in plan if isinstance(o, Pair) for m in o[:2]}
        self.tensors = {o.conv: fold(o) for o in plan if isinstance(o, Pair)}
        for o in plan:
            if not isinstance(o, Cast): continue
            self.tensors.setdefault(o.module, {})[o.name] = o.module._parameters[o.name].detach().to(o.dtype)

    def fits(self) -> bool:
        "Are the model's weights and statistics those that these were computed from?"
        return self.marks == _marks(self.plan, [t for o in self.plan for t in _sources(o)])

    def run(self, forward, args, kwargs) -> tuple: # Output; True
        "What `forward` gives, and whether each folded batch norm got just what its convolution had made."
        waiting, astray = {}, []
        def _wrap(m, own):
            pair = self.pairs.get(m)
            if pair and m is pair.norm: return _passes_on(pair, own, waiting, astray)
            return _computes(m, own, self.tensors[m], pair, waiting, astray)
        undo = replace_forwards({*self.pairs, *self.tensors}, _wrap, {})
        try: out = forward(*args, **kwargs)
        except Exception:
            if not astray: raise
            return None, False
        finally: undo()
        return out, not (waiting or astray)


def _computes(m, forward, tensors, pair, waiting, astray):
    "`forward` with these in place of the module's parameters, and right after with its own."
    own = m._parameters
    def _forward(*args, **kwargs):
        kept = {k: own[k] for k in tensors}
        try:
            own.update(tensors)
            out = forward(*args, **kwargs)
        finally: own.update(kept)
        if pair:
            if m in waiting: astray.append(m)
            waiting[m] = out
        return out
    return _forward


def _passes_on(pair, forward, waiting, astray):
    "What is left of a batch norm's forward; its own for what is not its convolution's."
    def _forward(input):
        if waiting.pop(pair.conv, None) is not input:
            astray.append(pair.norm)
            return forward(input)
        for m in pair.after: input = m(input)
        return input
    return _forward


def structure_of(model) -> tuple: # Modules; their modes; hooks; forwards; switches
    "What a plan depends on beside the input. Each batch asks."
    found = modules_of(model)
    own = [vars(m) for m in found]
    modes, attached = [d.get('training') for d in own], [(*d[k],) for d in own for k in HOOKS if d.get(k)]
    forwards = [(m, d.get('_compiled_call_impl'), foreign(m)) for m, d in zip(found, own)
                if 'forward' in d or '_compiled_call_impl' in d]
    # of the models' own classes, whose forward may ask for them: `self.return_features = True`
    theirs = (d for m, d in zip(found, own) if type(m).__module__[:8] != 'torch.nn')
    return found, modes, attached, forwards, [v for d in theirs for v in d.values() if type(v) in SWITCHES]


def is_eager(modules) -> bool:
    "Are these plain modules? Not compiled, scripted or wrapped to run on several devices."
    def _is(m): return not isinstance(m, WRAPPED) and '_orig_mod' not in m._modules and m._compiled_call_impl is None
    return all(map(_is, modules))


def hooked_globally() -> bool:
    "Do hooks of all modules see each layer's output?"
    return any(getattr(hooks, f'_global{k}') for k in HOOKS)


def signature_of(args, kwargs) -> tuple: # Of the kind of input, and of the shapes but for the batch
    "What a plan depends on in the input."
    found = leaves((args, kwargs))
    devices = {t.device.type for t in found if isinstance(t, Tensor)}
    def _kind(x): return (x.dtype, x.device) if isinstance(x, Tensor) else x if isinstance(x, PLAIN) else type(x)
    def _casts(d): return torch.amp.is_autocast_available(d) and torch.is_autocast_enabled(d)
    kind, autocast = map(_kind, found), [(d, torch.get_autocast_dtype(d)) for d in sorted(devices) if _casts(d)]
    return (*kind, *autocast), tuple(t.shape[1:] for t in found if isinstance(t, Tensor))
