"""Replay one step's operations in another step, with the same values in the forward pass: rounding is not amplified, and
random numbers are the same.

Plain PyTorch. Two steps of a deep network in two precisions differ by far more than the rounding of one operation,
since activations fall on the other side of a ReLU's kink, and all that follows differs. If each operation of the second
step continues with the first step's value, the gradients differ only by the rounding of operations on their way."""
from collections import defaultdict

import torch
from torch import Tensor

from .compare import FACTOR, PASSES, perturb
from .rounding import Rounding

HALF = torch.float16, torch.bfloat16
DROPOUT = 'native_dropout'  # of GPUs: a mask and the result
STATISTICS = 'statistics'  # of a batch norm's input in training mode: its result stays the same if a channel is scaled
RANDOM = 'random numbers'  # drawn in the order of memory: the same state gives other ones in another format
# Operations whose results are replayed, by name. A linear layer adds its bias in one operation or in two, which depends on its input's
# strides: the sum is what both have.
REPLAYED = dict(convolution='convolution', mm='mm', bmm='mm', addmm='add', baddbmm='add', add='add', add_='add', batch_norm='batch_norm',
                native_layer_norm='layer_norm', native_group_norm='group_norm')


def _draws(func, operation, args) -> bool:
    "True for an operation that draws random numbers which depend on no other numbers."
    if torch.Tag.nondeterministic_seeded not in func.tags: return False
    if operation == DROPOUT: return args[2] is not False
    tensors = [o for o in args if isinstance(o, Tensor)]
    return not tensors or (len(tensors) == 1 and operation.endswith(('_like', '_')))  # of its shape, or in place


def _var_mean(x) -> tuple: return torch.var_mean(x.float() if x.dtype in HALF else x, [0, *range(2, x.dim())])  # of channels


def _mean_rms(var, mean) -> Tensor:
    "Mean and root mean square of each channel."
    return torch.stack([mean, (var.nan_to_num() + mean.square()).sqrt()])  # the variance of one number is NaN


class Record(Rounding):
    """Keep the results of a forward pass's operations in main memory, until `.backward` is set to True, or only count them."""
    def __init__(self, model, keep=True, eps=0., generator=None): # The model's parameters name the operations
        super().__init__(eps, generator)
        self.names, self.casts = {self._memory(p): n for n, p in model.named_parameters()}, []
        self.values, self.keep, self.backward, self.rounded = defaultdict(list), keep, False, False
        self.statistics = {}  # variance and mean of inputs of batch norms in training mode, by the address of their running mean

    def _memory(self, t): return t.untyped_storage()._cdata if t.layout is torch.strided else id(t)

    def _name(self, args) -> str:
        "Name of the first parameter among an operation's arguments, also of its views and of autocast's copies, or ''."
        return next((self.names[k] for k in (self._memory(o) for o in args if isinstance(o, Tensor)) if k in self.names), '')

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operation, kwargs = func.overloadpacket.__name__, kwargs or {}
        if operation.endswith('_batch_norm'): operation = 'batch_norm'  # native or cuDNN's, which depends on dtype and format
        kind = RANDOM if _draws(func, operation, args) else REPLAYED.get(operation)
        out = self.run(func, args, kwargs) if self.rounded and (self.backward or not kind) else func(*args, **kwargs)
        if self.backward or not (kind or operation == '_to_copy'): return out
        name = self._name(args)
        if operation == 'batch_norm': self.on_batch_norm(name, *args[:7])
        if operation == '_to_copy' and name:
            self.names[self._memory(out)] = name
            self.casts.append(out)  # kept alive, so that no later tensor gets its memory
        if operation == DROPOUT:
            if self.on_result((kind, '', out[1].numel()), out[1]): out[0].copy_(torch.where(out[1], args[0]/(1 - args[1]), 0))
        elif kind:
            result = out if isinstance(out, Tensor) else out[0]
            if result.is_floating_point() or kind == RANDOM: self.on_result((kind, name, result.numel()), result, func, args, kwargs)
        return out

    @property
    def draws(self) -> bool: return any(kind == RANDOM for kind, *_ in self.values)

    def on_result(self, key, result, *call): self.values[key].append(result.detach().to('cpu', copy=True) if self.keep else None)

    def on_batch_norm(self, name, x, weight, bias, mean, var, training, momentum):
        if not training: return
        moments = _var_mean(x)
        if mean is not None and momentum == 1: self.statistics[mean.data_ptr()] = moments
        self.on_result((STATISTICS, name, x.numel()), _mean_rms(*moments), lambda x: _mean_rms(*_var_mean(x)), (x,), {})

    def wrong_statistics(self, norms: dict, tolerance) -> list:
        "Names of batch norms with other running statistics than those of their last inputs."
        def _is_wrong(m):
            var, mean = self.statistics.get(m.running_mean.data_ptr(), (m.running_var, m.running_mean))
            power = var + mean.square() + torch.finfo(var.dtype).tiny  # a variance may be a difference of large numbers
            right = ((m.running_mean - mean).abs() <= tolerance*power.sqrt()) & ((m.running_var - var).abs() <= tolerance*power)
            return not right.all()
        return [n for n, m in norms.items() if _is_wrong(m)]


class Replay(Record):
    """Replace the results of operations by recorded ones. `.wrong` lists those that differed, and inputs of batch norms,
    by the module of their weights. With `rounded`, nothing is compared, and all other operations take and give perturbed
    numbers."""
    def __init__(self, model,
        record: Record, # Record of the step to replay
        counts: Record, # Record of this step without a replay: operations are replayed if both ran them equally often
        tolerance, # Relative error up to which a result is right; it is also right if rounding its factors explains more
        eps, tiny=0., # Relative rounding error, and distance of the smallest numbers
        generator=None, rounded=False,
    ):
        super().__init__(model, False, eps, generator)
        self.recorded = {k: iter(v) for k, v in record.values.items() if len(v) == len(counts.values[k])}
        self.tolerance, self.tiny, self.rounded, self.wrong = tolerance, tiny, rounded, []

    def on_result(self, key, result, *call) -> bool: # True if it was replaced
        value = next(self.recorded.get(key, iter(())), None)
        if value is None: return False
        kind, name, _ = key
        value = value.to(result)
        if value.shape != result.shape: value = value.reshape(result.shape)
        if not self.rounded and kind != RANDOM and self._differs(value, result, *call):
            self.wrong.append(f"{'input' if kind == STATISTICS else 'result'} of {name.rpartition('.')[0] or name or kind}")
        result.copy_(value)
        return True

    def _differs(self, value, result, func, args, kwargs) -> bool:
        "True if a result differs from the recorded value by more than rounding explains."
        norm = result.norm().clamp_min(torch.finfo(result.dtype).tiny)
        def _error(t): return ((t - result).norm()/norm).item()
        if _error(value) <= self.tolerance: return False
        if args[0] is result: args = result - args[1]*kwargs.get('alpha', 1), *args[1:]  # `add_`: as it was before
        def _perturb(x): return perturb(x, self.eps, self.generator, self.tiny)
        for _ in range(PASSES):
            rounded = _perturb(func(*_perturb(args), **kwargs))
            if _error(value) <= FACTOR*_error(rounded if isinstance(rounded, Tensor) else rounded[0]): return False
        return True
