"""Find batch norms that can be folded into the convolution before them, by tracing one forward pass.

Plain PyTorch. The trace sees each operation that really runs, also in models that `torch.fx` can't trace."""
from collections import Counter, defaultdict, namedtuple
from itertools import product

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.module_hooks import module_hooks
from ..core.nested_tensors import tensors_of

__all__ = ['WEIGHTS', 'STATISTICS', 'HOOKS', 'Pair', 'Cast', 'ForwardTrace', 'memory_ref', 'layer_tensors',
           'foreign_forward', 'is_complete']

CONVS = nn.Conv1d, nn.Conv2d, nn.Conv3d
NORM = nn.modules.batchnorm._BatchNorm  # includes `SyncBatchNorm`, which is like the others in eval mode
AUTOCAST = nn.modules.conv._ConvNd, nn.Linear  # layers that autocast runs in half precision; includes transposed ones
CONVOLUTIONS, COPIES = {'convolution', 'conv1d', 'conv2d', 'conv3d'}, {'_to_copy', 'to'}  # `to` in inference mode
WEIGHTS, STATISTICS = ('weight', 'bias'), ('running_mean', 'running_var')  # names in modules and in operations
HOOKS = '_forward_pre_hooks', '_forward_hooks', '_backward_pre_hooks', '_backward_hooks'

Pair = namedtuple('Pair', 'conv norm after dtype')  # `after`: modules that the batch norm's forward calls, as in timm
Cast = namedtuple('Cast', 'module name dtype')      # a parameter that each pass casts to this dtype
Op = namedtuple('Op', 'name call ins named out dtype')


def memory_ref(t: Tensor):
    "A key for the memory of `t`, the same for its views. Keeps no memory alive; unique as long as the key exists."
    return StorageWeakRef(t.untyped_storage()) if t.layout is torch.strided and not t.is_nested else id(t)


def _has_hooks(m) -> bool: return any(vars(m).get(k) for k in HOOKS)
def _plain(t) -> bool: return type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided and not t.is_inference()


def foreign_forward(m):
    "The forward that code outside this library has set on this module instance, or None."
    own, library = vars(m).get('forward'), __name__.partition('.')[0]
    while (getattr(own, '__module__', None) or '').partition('.')[0] == library: own = getattr(own, 'replaced', None)
    return own


def layer_tensors(m) -> dict:
    "The tensors that a layer computes with, except those that a parametrization computes."
    tensors = {k: m._parameters.get(k, m._buffers.get(k)) for k in WEIGHTS + STATISTICS}
    return {k: t for k, t in tensors.items() if t is not None}


def is_complete(o) -> bool:
    "True if all tensors that a `Pair` or a `Cast` needs exist and are plain."
    if isinstance(o, Cast): return _plain(o.module._parameters.get(o.name))
    conv, norm = layer_tensors(o.conv), layer_tensors(o.norm)
    return 'weight' in conv and {*STATISTICS} <= {*norm} and all(map(_plain, (*conv.values(), *norm.values())))


class Call:
    "One call of a module: memory of its input and output, its own operations, and the calls inside it."
    def __init__(self, module, args=()):
        self.module, self.ops, self.inner, self.output, self.dtype = module, [], [], None, None
        self.input = memory_ref(args[0]) if len(args) == 1 and isinstance(args[0], Tensor) else None


class ForwardTrace(TorchDispatchMode):
    """Context manager that traces one forward pass without gradients.

    Afterwards, while the pass's output exists, `plan()` lists what can be folded and cast. `.found` is the number of
    batch norms whose input is a convolution's output. `.writes` is True if the pass changed weights, running statistics
    or its inputs, so that a second pass would compute something else."""
    def __init__(self,
        model: nn.Module, # Call its `forward`, not the model: the trace leaves out the model's own hooks
        inputs,
    ):
        super().__init__()
        state = (*model.parameters(), *model.buffers())
        self.own, self.old = {id(t) for t in state}, {memory_ref(t) for t in (*state, *tensors_of(inputs))}
        self.calls, self.stack, self.reads, self.source = [], [Call(model)], defaultdict(list), {}
        self.shown, self.writes, self.found = set(), False, 0  # `shown`: memory of tensors that users' hooks got

    def __enter__(self):
        self._hooks = module_hooks(self._enter_module, self._leave_module, with_kwargs=True)
        self._hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *exc):
        self._hooks.__exit__(*exc)
        return super().__exit__(*exc)

    def _enter_module(self, m, args):
        call = Call(m, args)
        self.stack[-1].inner.append(call)
        self.calls.append(call)
        self.stack.append(call)

    def _leave_module(self, m, args, *rest): # `rest` is keyword arguments and output; after an error only the output
        call, out = self.stack.pop(), rest[-1]
        if isinstance(out, Tensor): call.output, call.dtype = memory_ref(out), out.dtype
        if len(rest) > 1 and rest[0]: call.input = None
        if _has_hooks(m): self.shown |= {memory_ref(t) for t in tensors_of((args, rest))}

    def _key(self, t): return (id(t) if id(t) in self.own else memory_ref(t)) if isinstance(t, Tensor) else t

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        slots, call, result = func._schema.arguments, self.stack[-1], next(iter(tensors_of(out)), None)
        named = {s.name: self._key(a) for s, a in zip(slots, args) if isinstance(a, (Tensor, bool, float))}
        op = Op(func.overloadpacket.__name__, call, {self._key(t) for t in tensors_of((args, kwargs))}, named,
                *((None, None) if result is None else (memory_ref(result), result.dtype)))
        call.ops.append(op)
        for i in op.ins: self.reads[i].append(op)
        if op.name in COPIES: self.source[op.out] = self._key(args[0])
        written = [a for s, a in zip(slots, args) if s.alias_info is not None and s.alias_info.is_write]
        if 'batch_norm' in op.name and named.get('training'): written += args[3:5]  # missing in the schema
        self.writes |= any(memory_ref(t) in self.old for t in tensors_of(written))
        return out

    def plan(self) -> tuple: # Of `Pair`s and `Cast`s
        "The pairs that can be folded, and the parameters that can be cast in advance."
        convs = {c.output: c for c in self.calls if isinstance(c.module, CONVS) and c.output is not None}
        met = [(convs[c.input], c) for c in self.calls if isinstance(c.module, NORM) and c.input in convs]
        self.found, times = len({norm.module for _, norm in met}), Counter(c.module for c in self.calls)
        pairs = [*filter(None, (self._pair(c, n) for c, n in met if times[c.module] == times[n.module] == 1))]
        casts, folded = defaultdict(set), {p.conv for p in pairs}
        layers = [c for c in self.calls if isinstance(c.module, AUTOCAST) and c.module not in folded]
        for c, k in product(layers, WEIGHTS):
            p = c.module._parameters.get(k)
            if _plain(p): casts[c.module, k] |= {o.dtype if o.name in COPIES else None for o in c.ops if id(p) in o.ins}
        return *pairs, *(Cast(*o, *to) for o, to in casts.items() if to in ({torch.float16}, {torch.bfloat16}))

    def _pair(self, conv, norm):
        "The `Pair` of two calls, or None if folding could change a tensor that is used elsewhere."
        pair = Pair(conv.module, norm.module, tuple(c.module for c in norm.inner), conv.dtype)
        if pair.norm.training or not is_complete(pair) or conv.inner: return None
        if any(_has_hooks(m) or foreign_forward(m) for m in pair[:2]): return None
        ops = self._operations(pair, conv, norm)
        if not ops or not self._ends_with(norm, ops[1], conv.dtype) or not self._unseen(conv, norm, *ops): return None
        return pair._replace(dtype=ops[0].dtype)

    def _origin(self, k): return self.source.get(k, k)  # key of the tensor that was cast

    def _operations(self, pair, conv, norm):
        "The convolution and batch-norm operations; None if a layer runs anything else, or uses foreign tensors."
        expected = [{k: id(t) for k, t in layer_tensors(m).items()} for m in pair[:2]]
        weights = {*expected[0].values()}
        convs = [o for o in conv.ops if o.name not in COPIES and (o.name in CONVOLUTIONS or o.ins & weights)]
        norms = [o for o in norm.ops if o.ins and (norm.inner or o.name not in COPIES)]
        if len(convs) != 1 or len(norms) != 1: return None
        conv_op, norm_op = *convs, *norms
        if conv_op.name not in CONVOLUTIONS or 'batch_norm' not in norm_op.name: return None
        for o, own in zip((conv_op, norm_op), expected):
            if {k: self._origin(o.named[k]) for k in WEIGHTS + STATISTICS if k in o.named} != own: return None
        eps = norm_op.named.get('eps', norm_op.named.get('epsilon'))
        return None if conv_op.named.get('transposed') or eps != pair.norm.eps else (conv_op, norm_op)

    def _ends_with(self, norm, norm_op, dtype) -> bool:
        "True if the batch norm returns the operation's result, passed through its inner modules in order."
        end = norm_op.out
        for c in norm.inner:
            if c.input != end: return False
            end = c.output
        return end in (norm.output, self._origin(norm.output)) and (norm_op if norm.inner else norm).dtype == dtype

    def _unseen(self, conv, norm, conv_op, norm_op) -> bool:
        "True if only the batch norm reads the convolution's output and nothing keeps it."
        between = {conv_op.out, conv.output}
        between |= {o.out for k in between for o in self.reads[k] if o.name in COPIES}
        readers = [o for k in between for o in self.reads[k] if o.name not in COPIES or o.call not in (conv, norm)]
        if readers != [norm_op] or conv_op.out not in (conv.output, self._origin(conv.output)): return False
        return not between & self.shown and all(isinstance(k, StorageWeakRef) and k.expired() for k in between)
