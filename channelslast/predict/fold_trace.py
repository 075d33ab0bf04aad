"""Find batch norms that can be folded into the convolution before them, by tracing one pass of a private copy.

Plain PyTorch. The trace sees each operation that really runs, also in models that `torch.fx` can't trace."""
from collections import Counter, defaultdict, namedtuple
from itertools import product

from torch import Tensor, float16, bfloat16, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..core.dispatch_mode import DispatchMode
from ..core.nested_tensors import tensors_of
from ..core.model_copy import HOOKS, own_dicts

CONVS = nn.Conv1d, nn.Conv2d, nn.Conv3d
NORM = nn.modules.batchnorm._BatchNorm  # includes `SyncBatchNorm`, which is like the others in eval mode
AUTOCAST = nn.modules.conv._ConvNd, nn.Linear  # layers that autocast runs in half precision; includes transposed ones
CONVOLUTIONS, COPIES = {'convolution', 'conv1d', 'conv2d', 'conv3d'}, {'_to_copy', 'to'}  # `to` in inference mode
WEIGHTS, STATISTICS = ('weight', 'bias'), ('running_mean', 'running_var')  # names in modules and in operations

Pair = namedtuple('Pair', 'conv norm after dtype')  # `after`: modules that the batch norm's forward calls, as in timm
Cast = namedtuple('Cast', 'module name dtype')      # a parameter that each pass casts to this dtype
Op = namedtuple('Op', 'name call ins named out dtype')


def memory_ref(t: Tensor):
    "A key for the memory of `t`, the same for its views. Keeps no memory alive; unique as long as the key exists."
    return StorageWeakRef(t.untyped_storage()) if is_strided(t) else id(t)


def is_strided(t) -> bool: return not (t.is_sparse or t.is_mkldnn or t.is_nested)


def _hooks(m) -> list:
    "A module's hooks, except those of PyTorch and of this library, which leave convolutions and batch norms as they are."
    return [h for k in HOOKS for h in vars(m)[k].values() if type(h).__module__.partition('.')[0] != __name__.partition('.')[0]]


def layer_tensors(m) -> dict:
    "The tensors that a layer computes with, except those that a parametrization computes."
    tensors = {**own_dicts(m)[0], **own_dicts(m)[1]}
    return {k: tensors[k] for k in WEIGHTS + STATISTICS if tensors.get(k) is not None}


def _is_complete(pair) -> bool:
    "True if all tensors that a `Pair` needs exist."
    return 'weight' in layer_tensors(pair.conv) and {*STATISTICS} <= {*layer_tensors(pair.norm)}


class Call:
    "One call of a module: memory of its input and output, its own operations, and the calls inside it."
    def __init__(self, module, args=()):
        self.module, self.ops, self.inner, self.output, self.dtype = module, [], [], None, None
        self.input = memory_ref(args[0]) if len(args) == 1 and isinstance(args[0], Tensor) else None


class ForwardTrace(DispatchMode):
    """Context manager that traces one pass of a model that nothing else uses, without gradients.

    Afterwards, while the pass's output exists, `plan()` lists what can be folded and cast. `.found` is the number of
    batch norms whose input is a convolution's output."""
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.own = model, {id(t) for t in (*model.parameters(), *model.buffers())}
        self.calls, self.stack, self.reads, self.source = [], [Call(None)], defaultdict(list), {}
        self.hooked = {m for m in model.modules() if _hooks(m)}
        self.shown, self.found = set(), 0  # `shown`: memory of tensors that users' hooks got

    def __enter__(self):
        self.handles = []
        for m in self.model.modules():  # what a module gets, before its hooks, and what it gives, after them
            self.handles.append(m.register_forward_pre_hook(self._enter_module, prepend=True))
            self.handles.append(m.register_forward_hook(self._leave_module, with_kwargs=True))
        return super().__enter__()

    def __exit__(self, *exc):
        for h in self.handles: h.remove()
        return super().__exit__(*exc)

    def _enter_module(self, m, args):
        call = Call(m, args)
        self.stack[-1].inner.append(call)
        self.calls.append(call)
        self.stack.append(call)

    def _leave_module(self, m, args, kwargs, out):
        call = self.stack.pop()
        if isinstance(out, Tensor): call.output, call.dtype = memory_ref(out), out.dtype
        if kwargs: call.input = None
        if m in self.hooked: self.shown |= {memory_ref(t) for t in tensors_of((args, kwargs, out))}

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
            p = own_dicts(c.module)[0].get(k)
            if p is not None: casts[c.module, k] |= {o.dtype if o.name in COPIES else None for o in self.reads[id(p)]}
        return *pairs, *(Cast(*o, *to) for o, to in casts.items() if to in ({float16}, {bfloat16}))

    def _pair(self, conv, norm):
        "The `Pair` of two calls, or None if folding could change a tensor that is used elsewhere."
        pair = Pair(conv.module, norm.module, tuple(c.module for c in norm.inner), conv.dtype)
        if pair.norm.training or not _is_complete(pair) or conv.inner: return None
        if any(m in self.hooked or 'forward' in vars(m) for m in pair[:2]): return None
        if any(o.call is not conv for t in layer_tensors(pair.conv).values() for o in self.reads[id(t)]): return None
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
