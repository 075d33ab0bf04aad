"""Replay one step's operations in another step, with the same values in the forward pass: rounding is not amplified, and
random numbers are the same.

Plain PyTorch. Two steps of a deep network in two precisions differ by far more than the rounding of one operation,
since activations fall on the other side of a ReLU's kink, and all that follows differs. If each operation of the second
step continues with the first step's value, the gradients differ only by the rounding of operations on their way."""
from collections import defaultdict

import torch
from torch import Tensor

from .compare import FACTOR, PASSES
from .nested_tensors import map_tensors, tensors_of
from .rounding import Rounding

HALF = torch.float16, torch.bfloat16
STATISTICS = 'statistics'  # of a batch norm's input in training mode: its result stays the same if a channel is scaled
RANDOM = 'random numbers'  # in the order of memory: other ones in another format, even from the same state
# Operations whose results are replayed, by name. A linear layer adds its bias in one operation or in two, which depends on its input's
# strides: the sum is what both have.
REPLAYED = dict(convolution='convolution', mm='mm', bmm='mm', addmm='add', baddbmm='add', add='add', add_='add', batch_norm='batch_norm',
                native_layer_norm='layer_norm', native_group_norm='group_norm')


def _var_mean(x) -> tuple: return torch.var_mean(x.float() if x.dtype in HALF else x, [0, *range(2, x.dim())])  # of channels


def _mean_rms(var, mean) -> Tensor:
    "Mean and root mean square of each channel."
    return torch.stack([mean, (var.nan_to_num() + mean.square()).sqrt()])  # the variance of one number is NaN


class Record(Rounding):
    "Keep the results of a forward pass's operations, until `.backward` is set to True, or only count them."
    def __init__(self, model, keep=True, eps=0., **kwargs): # The model's parameters name the operations
        super().__init__(eps, **kwargs)
        self.names, self.casts = {self._memory(p): n for n, p in model.named_parameters()}, []
        self.values, self.keep, self.rounded = defaultdict(list), keep, False
        self.statistics = {}  # variance and mean of inputs of batch norms in training mode, by the address of their running mean

    def _memory(self, t): return t.untyped_storage()._cdata if t.layout is torch.strided else id(t)

    def _names(self, args) -> tuple:
        "Names of the parameters among an operation's arguments, also of their views and of autocast's copies."
        return tuple(self.names[k] for k in (self._memory(o) for o in args if isinstance(o, Tensor)) if k in self.names)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name.endswith('_batch_norm'): name = 'batch_norm'  # native or cuDNN's, which depends on dtype and format
        kind = REPLAYED.get(name)
        if torch.Tag.nondeterministic_seeded in func.tags and 'attention' not in name: kind = RANDOM  # attention need not drop
        out = self.run(func, args, kwargs) if self.rounded and (self.backward or not kind) else func(*args, **kwargs)
        if self.backward or not (kind or name == '_to_copy'): return out
        names = self._names(args)
        if name == 'batch_norm': self.on_batch_norm(names, *args[:7])
        if name == '_to_copy' and names:
            self.names[self._memory(out)] = names[0]
            self.casts.append(out)  # kept alive, so that no later tensor gets its memory
        results = tensors_of(out) if kind else []
        if kind != RANDOM: results = [o for o in results[:1] if o.is_floating_point()]  # later ones are statistics
        for o in results: self.on_result((kind, names[:1], o.numel()), o, func, args, kwargs)
        return out

    def on_result(self, key, result, *call): self.values[key].append(result.detach().clone() if self.keep else None)

    def on_batch_norm(self, names, x, weight, bias, mean, var, training, momentum):
        if not training: return
        moments = _var_mean(x)
        if mean is not None and momentum == 1: self.statistics[mean.data_ptr()] = moments
        self.on_result((STATISTICS, names, x.numel()), _mean_rms(*moments), lambda x: _mean_rms(*_var_mean(x)), (x,), {})

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
        eps, rounded=False, **kwargs # Arguments of `Rounding`
    ):
        super().__init__(model, False, eps, **kwargs)
        self.recorded = {k: iter(v) for k, v in record.values.items() if len(v) == len(counts.values[k])}
        self.tolerance, self.rounded, self.wrong = tolerance, rounded, []

    def on_result(self, key, result, *call):
        value = next(self.recorded.get(key, iter(())), None)
        if value is None: return
        kind, params, _ = key
        value = value.to(result).reshape(result.shape)
        if not self.rounded and kind != RANDOM and self._differs(value, result, *call):
            where = (params[0].rpartition('.')[0] or params[0]) if params else kind
            self.wrong.append(f"{'input' if kind == STATISTICS else 'result'} of {where}")
        result.copy_(value)

    def _differs(self, value, result, func, args, kwargs) -> bool:
        "True if a result differs from the recorded value by more than rounding explains."
        norm = result.norm().clamp_min(torch.finfo(result.dtype).tiny)
        def _error(t): return ((t - result).norm()/norm).item()
        if _error(value) <= self.tolerance: return False
        if args[0] is result: args = result - args[1]*kwargs.get('alpha', 1), *args[1:]  # `add_`: as it was before
        for _ in range(PASSES):
            rounded = map_tensors(self.perturb, func(*map_tensors(self.perturb, args), **kwargs))
            if _error(value) <= FACTOR*_error(rounded if isinstance(rounded, Tensor) else rounded[0]): return False
        return True
