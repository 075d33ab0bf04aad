"Traced graphs, and whole numbers in their inputs, for which runtimes compute the same as PyTorch."
import torch
from torch import SymBool, SymFloat, SymInt, Tensor

from ..core.nested_tensors import tensors_of
from .prepared_model import NotPrepared

INT32 = -2**31, 2**31 - 1  # OpenVINO computes in 32 bits
NUMBERS = bool, int, float, SymBool, SymFloat, SymInt
SIZES = {'size', 'numel', 'nelement', 'stride', 'storage_offset'}  # operations that give numbers of a tensor, but not its elements
QUOTIENTS = {'floordiv', 'ifloordiv', 'floor_divide'}
EXACT = {'embedding', 'float', 'to', 'eq', 'ne', 'lt', 'le', 'gt', 'ge'}  # on whole numbers of an input, within its limits
MOVES = {'setitem', 'copy', 'reshape', 'flatten', 'contiguous', 'clone', 'cat', 'stack', 'chunk', 'split', 'unbind', 'repeat', 'flip', 'roll'}
CASTS = {'long', 'int', 'to', 'type', 'type_as'}
INDICES = {'argmax', 'argmin', 'argsort', 'searchsorted', 'bucketize'}  # their results are at most a size
SMALL = {'add', 'sub', 'mul', 'mod', 'remainder', 'clamp', 'cumsum', 'where', 'masked_fill', 'one_hot'}  # of such numbers, too


def _operation(node) -> str:
    "Name of an operation, the same in PyTorch, in NumPy and in place."
    return _target(node).removeprefix('wrapped_').strip('_')

def _target(node) -> str: return getattr(node.target, '__name__', str(node.target)) if node.op.startswith('call') else ''
def _value(node): return getattr(node, 'meta', {}).get('example_value') # None for constants and lists
def _is_whole(x) -> bool: return not (x.is_floating_point() or x.is_complex() or x.dtype is torch.bool)
def _has_whole(node) -> bool: return any(map(_is_whole, tensors_of(_value(node))))
def _has_floats(node) -> bool: return any(t.is_floating_point() for t in tensors_of(_value(node)))
def _is_bool(node) -> bool: return all(t.dtype is torch.bool for t in tensors_of(_value(node)))
def _is_view(a, b) -> bool: # No public name
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.untyped_storage()._cdata == b.untyped_storage()._cdata
def _floor_divide(a, b): return (a - a % b)//b  # exact: both converters round towards zero


def check_operations(graph, name):
    """Raise `NotPrepared` for operations that a runtime would replace by constants, leave out or round in another way.
    Divisions of sizes are rewritten, so that they round as in PyTorch."""
    for n in graph.graph.nodes:
        operation, takes_tensors = _operation(n), any(isinstance(_value(a), Tensor) for a in n.all_input_nodes)
        if isinstance(_value(n), NUMBERS) and takes_tensors and operation not in SIZES:
            raise NotPrepared('it computes with numbers that it takes out of tensors')
        if operation.startswith('assert'): raise NotPrepared(f'it checks its input, and {name} would not')
        if isinstance(n.target, torch._ops.HigherOrderOperator): raise NotPrepared(f'{name} has no `{operation}`')  # no public name
        if operation not in QUOTIENTS: continue
        if takes_tensors: raise NotPrepared(f'{name} rounds quotients in another way')
        n.target = _floor_divide
    graph.recompile()


def limits_of(graph, name) -> list:
    """Least and largest number that each input tensor may hold, or None for inputs that hold no whole numbers.

    Runtimes wrap around at other numbers than PyTorch, and raise no error for a wrong index. So whole numbers of inputs may
    only be looked up in embeddings, compared, cast and moved. Others may be indices, counts and small numbers made of
    these, but not parts of floating-point numbers. Of several indices for one tensor, none may be negative. Raises
    `NotPrepared` for a graph that does more."""
    limits, sources, nodes = {}, {}, list(graph.graph.nodes)  # `sources`: inputs whose whole numbers a tensor holds
    for i, n in enumerate(nodes):
        if n.op == 'placeholder' and isinstance(_value(n), Tensor): limits[n], sources[n] = (INT32, {n}) if _has_whole(n) else (None, set())
        operation, args = _operation(n), [a for a in n.all_input_nodes if a in sources]
        out = n.args[0] if operation == 'setitem' else n
        if not args or operation.startswith('new_') or operation.endswith('_like') or not tensors_of(_value(out)): continue
        whole = [a for a in args if _has_whole(a)]
        sources[n] = {o for a in whole for o in sources[a]}
        if operation == 'embedding':
            _, table = [*n.args, *n.kwargs.values()][:2]
            for o in sources[n]: limits[o] = 0, min(limits[o][1], _value(table).shape[0] - 1)
        if not _is_exact(n, out, operation, args, whole, sources[n]):
            raise NotPrepared(f'it computes with whole numbers, and {name} has other limits')
        if operation == 'setitem' or _target(n).endswith('_'):  # in place: into all that share this memory
            for m in nodes[:i]:
                if _is_view(_value(m), _value(n.args[0])): sources[m] = sources.get(m, set()) | sources[n]
    return [*limits.values()]


def _is_exact(node, out, operation, args, whole, sources) -> bool:
    "True if an operation on variable tensors gives no whole numbers, or the same ones in each runtime."
    if operation == 'getitem' and _wraps_around(node, whole): return False
    if not _has_whole(out): return not sources or operation in EXACT
    if operation == 'getitem': moves = whole == [node.args[0]]  # others would be indices
    elif operation in CASTS: moves = whole and _value(out).dtype in (torch.int32, torch.int64)
    else: moves = whole and (operation in MOVES or _is_view(_value(out), _value(whole[0])))
    if sources or moves: return bool(moves)
    return operation in INDICES or _has_floats(out) or all(map(_is_bool, args)) or (bool(whole) and operation in SMALL)


def _wraps_around(node, whole) -> bool:
    "True if one of several indices may be negative: runtimes then read other elements than PyTorch."
    def _is_signed(n): # also if a negative number was moved or cast since
        if _operation(n) in SMALL | INDICES: return _operation(n) in SMALL
        return any(_is_signed(a) for a in n.all_input_nodes if _has_whole(a))
    x, index = node.args
    several = isinstance(index, tuple) and sum(isinstance(_value(i), Tensor) for i in index) > 1
    return several and any(_is_signed(a) for a in whole if a is not x)


def check_numbers(t, limits):
    "Raise `NotPrepared` for whole numbers outside of the limits."
    if limits and t.numel() and not limits[0] <= t.min().item() <= t.max().item() <= limits[1]:
        raise NotPrepared('a whole number is too small or too large')
