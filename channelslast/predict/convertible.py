"Traced graphs, and whole numbers in their inputs, for which runtimes compute the same as PyTorch."
import torch
from torch import SymBool, SymFloat, SymInt, Tensor

from ..core.nested_tensors import tensors_of
from .prepared_model import NotPrepared

INT32 = -2**31, 2**31 - 1  # OpenVINO computes in 32 bits
NUMBERS = bool, int, float, SymBool, SymFloat, SymInt
SIZES = {'size', 'numel', 'nelement', 'stride', 'storage_offset'}  # operations that give numbers of a tensor, but not its elements
QUOTIENTS = {'floordiv', 'ifloordiv', 'floor_divide'}
# operations on whole numbers of an input, within its limits; with results that a size limits; that only move elements
EXACT = {'embedding', 'float', 'to', 'eq', 'ne', 'lt', 'le', 'gt', 'ge'}
INDICES = {'argmax', 'argmin', 'argsort', 'searchsorted', 'bucketize'}
MOVES = {'reshape', 'flatten', 'contiguous', 'clone', 'cat', 'stack', 'chunk', 'split', 'unbind', 'repeat', 'flip', 'roll'}


def _operation(node) -> str:
    "Name of an operation, the same in PyTorch, in NumPy and in place."
    name = getattr(node.target, '__name__', str(node.target)) if node.op.startswith('call') else ''
    return name.removeprefix('wrapped_').rstrip('_')

def _value(node): return node.meta.get('example_value')
def _is_whole(x) -> bool: return not (x.is_floating_point() or x.is_complex() or x.dtype is torch.bool)
def _has_whole(node) -> bool: return any(map(_is_whole, tensors_of(_value(node))))
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
        if operation.startswith('_assert'): raise NotPrepared(f'it checks its input, and {name} would not')
        if isinstance(n.target, torch._ops.HigherOrderOperator): raise NotPrepared(f'{name} has no `{operation}`')  # no public name
        if operation.strip('_') not in QUOTIENTS: continue
        if takes_tensors: raise NotPrepared(f'{name} rounds quotients in another way')
        n.target = _floor_divide
    graph.recompile()


def limits_of(graph, name) -> list:
    """Least and largest number that each input tensor may hold, or None for inputs that hold no whole numbers. Raises
    `NotPrepared` if the graph does more with whole numbers than look them up in embeddings, compare them, cast them or move
    them: runtimes wrap around at other numbers, and raise no error for a wrong index."""
    limits, variable, sources = {}, set(), {}  # tensors that depend on elements of inputs; whole ones: the inputs they come from
    for n in graph.graph.nodes:
        operation, own = _operation(n), _has_whole(n)
        if n.op == 'placeholder' and isinstance(_value(n), Tensor):
            limits[n], sources[n] = (INT32, {n}) if own else (None, set())
            variable.add(n)
        args = [a for a in n.all_input_nodes if a in variable]
        if not args or operation.startswith('new_') or operation.endswith('_like') or not tensors_of(_value(n)): continue
        variable.add(n)
        whole = [a for a in args if _has_whole(a)]
        sources[n] = {o for a in whole for o in sources[a]}
        if operation == 'embedding':
            for o in sources[n]: limits[o] = 0, min(limits[o][1], n.args[1].meta['example_value'].shape[0] - 1)
        bounded = not sources[n] and (not own or operation in INDICES or _has_floats(n) or all(map(_is_bool, args)))
        if not (bounded or (_moves(n, whole) if own else operation in EXACT)):
            raise NotPrepared(f'it computes with whole numbers, and {name} has other limits')
    return [*limits.values()]


def _moves(node, whole) -> bool:
    "True if an operation only moves whole numbers, and takes none of them as an index."
    if _operation(node) == 'getitem': return whole == [node.args[0]]
    return bool(whole) and (_operation(node) in MOVES or _is_view(_value(node), _value(whole[0])))


def _is_bool(node) -> bool: return all(t.dtype is torch.bool for t in tensors_of(_value(node)))
def _has_floats(node) -> bool: return any(t.is_floating_point() for t in tensors_of(_value(node)))  # as `topk`, next to indices


def check_numbers(t, limits):
    "Raise `NotPrepared` for whole numbers outside of the limits."
    if limits and t.numel() and not limits[0] <= t.min().item() <= t.max().item() <= limits[1]:
        raise NotPrepared('a whole number is too small or too large')
