"""Which batch norms can be folded into the convolution before them, seen in one real forward pass.

Plain PyTorch. The pass is followed operation by operation: what counts is what runs, also in models that `torch.fx`
can't trace."""
from collections import Counter, defaultdict, namedtuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.nested_tensors import tensors_of

__all__ = ['WEIGHTS', 'STATISTICS', 'HOOKS', 'Pair', 'Cast', 'ForwardTrace', 'memory_ref', 'layer_tensors',
           'foreign_forward', 'is_complete']

CONVS = nn.Conv1d, nn.Conv2d, nn.Conv3d
NORM = nn.modules.batchnorm._BatchNorm  # in eval mode `SyncBatchNorm` is like any other
AUTOCAST = nn.modules.conv._ConvNd, nn.Linear  # what autocast runs in half; transposed convolutions are among the first
CONVOLUTIONS, COPIES = {'convolution', 'conv1d', 'conv2d', 'conv3d'}, {'_to_copy', 'to'}  # the latter in inference mode
WEIGHTS, STATISTICS = ('weight', 'bias'), ('running_mean', 'running_var')  # named so by modules and by operations
HOOKS = '_forward_pre_hooks', '_forward_hooks', '_backward_pre_hooks', '_backward_hooks'

# `after`: modules that the batch norm's own forward calls, as timm's do
Pair = namedtuple('Pair', 'conv norm after dtype')
Cast = namedtuple('Cast', 'module name dtype')      # a parameter that each pass casts to this type
Op = namedtuple('Op', 'name call ins named out dtype')


def memory_ref(t: Tensor):
    "The same for views of one memory; keeps nothing alive, and is no other memory's as long as somebody holds it."
    return StorageWeakRef(t.untyped_storage()) if t.layout is torch.strided and not t.is_nested else id(t)


def _hooks(m) -> bool: return any(vars(m).get(k) for k in HOOKS)


def foreign_forward(m):
    "What anybody but this library put in place of this one module's forward, if so."
    own = vars(m).get('forward')
    ours = (getattr(own, '__module__', None) or '').partition('.')[0] == __name__.partition('.')[0]
    return None if ours else own


def _plain(t) -> bool: return type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided and not t.is_inference()


def layer_tensors(m) -> dict:
    "The tensors that a layer computes with. What a parametrization computes is not among them."
    return {k: t for k in WEIGHTS + STATISTICS if (t := m._parameters.get(k, m._buffers.get(k))) is not None}


def is_complete(o) -> bool:
    "Is there, in plain tensors, what this pair is folded from, or this parameter cast?"
    if isinstance(o, Cast): return _plain(o.module._parameters.get(o.name))
    conv, norm = layer_tensors(o.conv), layer_tensors(o.norm)
    return 'weight' in conv and {*STATISTICS} <= {*norm} and all(map(_plain, (*conv.values(), *norm.values())))


class Call:
    "One call of a module: what it got and gave, its own operations, and the calls in it."
    def __init__(self, module, args=()):
        self.module, self.ops, self.inner, self.gave, self.dtype = module, [], [], None, None
        self.got = memory_ref(args[0]) if len(args) == 1 and isinstance(args[0], Tensor) else None


class ForwardTrace(TorchDispatchMode):
    """Context manager: follows one forward pass without gradients. Then, as long as the pass's output lives, `plan()`
    says what can be folded and cast, `.found` how many batch norms got what a convolution made, `.writes` whether the
    pass changed weights, statistics or its inputs: then a second one would be another one."""
    def __init__(self,
        model: nn.Module, # Its `forward` is to be called, not the model: its own hooks are not for this pass
        inputs,
    ):
        super().__init__()
        state = (*model.parameters(), *model.buffers())
        self.own, self.old = {id(t) for t in state}, {memory_ref(t) for t in (*state, *tensors_of(inputs))}
        self.calls, self.stack, self.reads, self.source = [], [Call(model)], defaultdict(list), {}
        self.shown, self.writes, self.found = set(), False, 0  # shown to users' hooks

    def __enter__(self):
        self._handles = [hooks.register_module_forward_pre_hook(self._enter_module),
                         hooks.register_module_forward_hook(self._leave_module, with_kwargs=True, always_call=True)]
        return super().__enter__()

    def __exit__(self, *exc):
        for h in self._handles: h.remove()
        return super().__exit__(*exc)

    def _enter_module(self, m, args):
        call = Call(m, args)
        self.stack[-1].inner.append(call)
        self.calls.append(call)
        self.stack.append(call)

    def _leave_module(self, m, args, *rest): # keywords and output; after an error the output alone
        call, out = self.stack.pop(), rest[-1]
        if isinstance(out, Tensor): call.gave, call.dtype = memory_ref(out), out.dtype
        if len(rest) > 1 and rest[0]: call.got = None
        if _hooks(m): self.shown |= {memory_ref(t) for t in tensors_of((args, rest))}

    def _key(self, t): return (id(t) if id(t) in self.own else memory_ref(t)) if isinstance(t, Tensor) else t

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        slots, call, made = func._schema.arguments, self.stack[-1], next(iter(tensors_of(out)), None)
        named = {s.name: self._key(a) for s, a in zip(slots, args) if isinstance(a, (Tensor, bool, float))}
        op = Op(func.overloadpacket.__name__, call, {self._key(t) for t in tensors_of((args, kwargs))}, named,
                *((None, None) if made is None else (memory_ref(made), made.dtype)))
        call.ops.append(op)
        for i in op.ins: self.reads[i].append(op)
        if op.name in COPIES: self.source[op.out] = self._key(args[0])
        written = [a for s, a in zip(slots, args) if s.alias_info is not None and s.alias_info.is_write]
        if 'batch_norm' in op.name and named.get('training'): written += args[3:5]  # which its schema doesn't say
        self.writes |= any(memory_ref(t) in self.old for t in tensors_of(written))
        return out

    def plan(self) -> tuple: # Of `Pair`s and `Cast`s
        "What can be folded into what, and what can be cast in advance."
        made = {c.gave: c for c in self.calls if isinstance(c.module, CONVS) and c.gave is not None}
        met = [(made[c.got], c) for c in self.calls if isinstance(c.module, NORM) and c.got in made]
        self.found, times = len({norm.module for _, norm in met}), Counter(c.module for c in self.calls)
        once = [(c, n) for c, n in met if times[c.module] == times[n.module] == 1]
        pairs = [p for c, n in once if (p := self._pair(c, n))]
        casts, folded = defaultdict(set), {p.conv for p in pairs}
        for c in self.calls:
            for k in WEIGHTS if isinstance(c.module, AUTOCAST) and c.module not in folded else ():
                if _plain(p := c.module._parameters.get(k)):
                    casts[c.module, k] |= {o.dtype if o.name in COPIES else None for o in c.ops if id(p) in o.ins}
        return *pairs, *(Cast(*o, *to) for o, to in casts.items() if to in ({torch.float16}, {torch.bfloat16}))

    def _pair(self, conv, norm):
        "The `Pair` of two calls, unless something could tell the model folded from the model as it is."
        pair = Pair(conv.module, norm.module, tuple(c.module for c in norm.inner), conv.dtype)
        if pair.norm.training or not is_complete(pair) or conv.inner: return None
        if any(_hooks(m) or foreign_forward(m) for m in pair[:2]): return None
        ops = self._computed(pair, conv, norm)
        if not ops or not self._ends_with(norm, ops[1], conv.dtype) or not self._unseen(conv, norm, *ops): return None
        return pair._replace(dtype=ops[0].dtype)

    def _origin(self, k):
        "What a tensor was cast from."
        return self.source.get(k, k)

    def _computed(self, pair, conv, norm):
        """The two operations. Whatever the layers' classes: one convolution in the layer's own weights, one batch norm
        in its own statistics."""
        wanted = [{k: id(t) for k, t in layer_tensors(m).items()} for m in pair[:2]]
        weights = {*wanted[0].values()}
        made = [o for o in conv.ops if o.name not in COPIES and (o.name in CONVOLUTIONS or o.ins & weights)]
        normed = [o for o in norm.ops if o.ins and (norm.inner or o.name not in COPIES)]
        if len(made) != 1 or len(normed) != 1: return None
        (made,), (normed,) = made, normed
        if made.name not in CONVOLUTIONS or 'batch_norm' not in normed.name: return None
        for o, own in zip((made, normed), wanted):
            if {k: self._origin(o.named[k]) for k in WEIGHTS + STATISTICS if k in o.named} != own: return None
        eps = normed.named.get('eps', normed.named.get('epsilon'))
        return None if made.named.get('transposed') or eps != pair.norm.eps else (made, normed)

    def _ends_with(self, norm, normed, dtype) -> bool:
        "Does the batch norm give what it computed, or what the modules in it make of that, one after the other?"
        end = normed.out
        for c in norm.inner:
            if c.got != end: return False
            end = c.gave
        return end in (norm.gave, self._origin(norm.gave)) and (normed.dtype if norm.inner else norm.dtype) == dtype

    def _unseen(self, conv, norm, made, normed) -> bool:
        "Has nobody but the batch norm read what the convolution made, and does nobody keep it?"
        between = {made.out, conv.gave}
        between |= {o.out for k in between for o in self.reads[k] if o.name in COPIES}
        own = conv, norm
        readers = [o for k in between for o in self.reads[k] if o.name not in COPIES or o.call not in own]
        if readers != [normed] or made.out not in (conv.gave, self._origin(conv.gave)): return False
        return not between & self.shown and all(isinstance(k, StorageWeakRef) and k.expired() for k in between)
