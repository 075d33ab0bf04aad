"Traced graphs, and whole numbers in their inputs, for which runtimes compute the same as PyTorch."
import torch
from torch import SymInt, Tensor

from .prepared_model import NotPrepared

INT32 = -2**31, 2**31 - 1  # OpenVINO computes in 32 bits
EXACT = {'embedding', 'float', 'to', 'eq', 'ne', 'lt', 'le', 'gt', 'ge'}  # operations on whole numbers within these limits


def _operation(node) -> str: return getattr(node.target, '__name__', node.target) if node.op.startswith('call') else ''
def _is_whole(x) -> bool: return isinstance(x, Tensor) and not (x.is_floating_point() or x.is_complex() or x.dtype is torch.bool)
def _is_view(a, b) -> bool: return isinstance(a, Tensor) and a.untyped_storage()._cdata == b.untyped_storage()._cdata # no public name
def _floor_divide(a, b): return (a - a % b)//b  # exact: both converters round towards zero


def check_operations(graph, name):
    """Raise `NotPrepared` for operations that a runtime would replace by constants, leave out or round in another way.
    Divisions of sizes are rewritten, so that they round as in PyTorch."""
    for n in graph.graph.nodes:
        operation = _operation(n)
        if operation == 'item': raise NotPrepared('it computes with numbers that it takes out of tensors')
        if operation.startswith('_assert'): raise NotPrepared(f'it checks its input, and {name} would not')
        if operation not in ('floordiv', 'floor_divide'): continue
        if not isinstance(n.meta['example_value'], (SymInt, int)): raise NotPrepared(f'{name} rounds quotients in another way')
        n.target = _floor_divide
    graph.recompile()


def limits_of(graph, name) -> list:
    "Least and largest number that each input tensor may hold, or None for inputs that hold no whole numbers."
    inputs = [n for n in graph.graph.nodes if n.op == 'placeholder' and isinstance(n.meta['example_value'], Tensor)]
    return [_limits(n, name) if _is_whole(n.meta['example_value']) else None for n in inputs]


def _limits(node, name) -> tuple:
    """The limits of an input of whole numbers. Raises `NotPrepared` if the graph does more than look them up in embeddings,
    compare them or cast them: runtimes wrap around at other numbers, and raise no error for a wrong index."""
    value, (low, high), views = node.meta['example_value'], INT32, [node]
    for n in views:
        for user in n.users:
            operation, out = _operation(user), user.meta.get('example_value')
            if operation == 'embedding': low, high = 0, min(high, user.args[1].meta['example_value'].shape[0] - 1)
            if operation in EXACT and not _is_whole(out): continue
            if not _is_whole(out) or not _is_view(out, value): raise NotPrepared(f'it computes with whole numbers, and {name} has other limits')
            views.append(user)
    return low, high


def check_numbers(t, limits):
    "Raise `NotPrepared` for whole numbers outside of the limits."
    if limits and t.numel() and not limits[0] <= t.min().item() <= t.max().item() <= limits[1]:
        raise NotPrepared('a whole number is too small or too large')
