"Check that a candidate's numbers are those of contiguous fp32, as far as its precision allows."
import math
import warnings
from collections import namedtuple
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from fastai.callback.core import Callback, CancelBatchException
from fastai.torch_core import set_seed
from torch import nn

from ..core.compare import numbers_of, perturb, relative_error
from ..core.devices import fit_device, fp32_precision
from ..core.distributed import gather_from_ranks
from ..core.nested_tensors import map_tensors, tensors_of
from ..core.random_state import restore_random_states
from ..core.undo import restore_dict
from ..learner.step_callbacks import is_part_of_step
from .candidates import Eliminated

__all__ = ['TOLERANCE', 'PREDICTION_TOLERANCE', 'StopBeforeStep', 'not_finite', 'check_numbers', 'check_compiled',
           'check_predictions']

# Relative differences from fp32 that rounding explains: of the loss, an operation's result, the gradient of a weight,
# and the gradient of a vector (bias or norm), a sum over all positions: in bf16, one in Swin3D differed by 0.6 in one
# run and by 0.4 in another, where rounding the results explained 0.02.
Tolerance = namedtuple('Tolerance', 'loss result weight vector')
TOLERANCE = dict(fp32=Tolerance(1e-3, 1e-2, 5e-2, 5e-2), fp16=Tolerance(2e-2, 1e-2, 5e-2, 0.2),
                 bf16=Tolerance(5e-2, 2e-2, 0.12, 0.8))
ROUNDING = dict(fp32=2**-18, fp16=2**-11, bf16=2**-8)  # relative rounding error; for fp32 that of a sum
ROUNDING_FACTOR = 3  # accept up to this many times the difference that rounding errors cause
PREDICTION_TOLERANCE = dict(fp32=1e-3, fp16=2e-2, bf16=1e-1)  # relative difference of all outputs


class StopBeforeStep(Callback):
    "Stop each batch before the optimizer. Sets `mode.backward` when the backward pass begins."
    order = -1000
    def __init__(self, learn): self.learn, self.mode = learn, None
    def before_backward(self):
        if self.mode: self.mode.backward = True
    def before_step(self): raise CancelBatchException


def not_finite(named) -> str: # `''` if all are finite
    "First name in pairs `(name, tensor)` whose tensor holds NaN or infinity. None and integers pass."
    named = [(n, t._values() if t.layout is torch.sparse_coo else t) for n, t in named if t is not None]
    named = [(n, t) for n, t in named if t.layout is torch.strided and (t.is_floating_point() or t.is_complex())]
    if not named: return ''
    finite = torch.stack([t.isfinite().all().to(named[0][1].device) for _, t in named])  # synchronize only once
    return '' if finite.all() else named[finite.int().argmin().item()][0]


def _norm(tensors) -> float:
    "Norm of all tensors, in float64 if the device has it: a CPU's float32 norm of 100 million numbers is 1% off."
    def _one(t):
        wide = torch.promote_types(t.dtype, torch.float64) if t.is_cpu or t.is_cuda else None
        return torch.linalg.vector_norm(t, dtype=wide)
    return math.hypot(*map(_one, tensors))


def _wide_copy(grad):
    dense = grad.detach().to_dense() if grad.layout is not torch.strided else grad.detach()  # sparse: of embeddings
    return dense.to(torch.promote_types(dense.dtype, torch.float32), copy=True)  # complex numbers stay complex


def _pairs(grads, reference):
    "Pairs of gradients. A missing one counts as zeros if the other one exists."
    for a, b in zip(grads, reference):
        if a is None and b is not None: a = torch.zeros_like(b)
        elif b is None and a is not None: b = torch.zeros_like(a)
        yield a, b


def _error(a, b) -> float:
    """Relative difference of two gradients: the larger of that of the whole gradient, and an eighth of the largest one
    of a slice (the weights of one output channel) relative to an average slice."""
    if a is None or not a.numel(): return 0.
    diff, b = (t.flatten(1) if t.dim() > 1 else t.view(1, -1) for t in (a - b, b))
    diffs, norm = torch.linalg.vector_norm(diff, dim=1), torch.linalg.vector_norm(b)
    largest = torch.maximum(torch.linalg.vector_norm(diffs), diffs.max()*math.sqrt(len(diffs))/8)
    return (largest/norm if largest else largest).item()


def _errors(grads, reference) -> list: return [_error(a, b) for a, b in _pairs(grads, reference)]


def _loss_and_grads(learn, batch, stop, make_mode) -> tuple: # Loss, gradients, the mode
    "Loss and unscaled gradients of one batch, in fp32. The step runs inside the mode that `make_mode(model)` returns."
    scaler = learn.scaler or None
    scale = scaler.get_scale() if scaler and scaler.is_enabled() else 1.
    while True:
        set_seed(0)
        learn.model.zero_grad(set_to_none=True)
        stop.mode = mode = make_mode(learn.model)
        with _no_graphs_kept(learn.model), mode: learn.one_batch(0, batch)
        grads = [p.grad if p.grad is None else _wide_copy(p.grad)/scale for p in learn.model.parameters()]
        if scale <= 1 or all(g is None or g.isfinite().all() for g in grads):
            return learn.loss.detach().float().mean().item(), grads, mode
        scale /= 16  # too large for fp16; training would reduce it too
        scaler._scale.fill_(scale)


@contextmanager
def _no_graphs_kept(model):
    "Restore modules that keep results with their graph, as LeViT does in eval mode: otherwise the next backward fails."
    kept = [(vars(m), ExitStack()) for m in model.modules()]
    for attributes, undo in kept: restore_dict(undo, attributes)
    yield
    for attributes, undo in kept:
        if any(t.grad_fn is not None for t in tensors_of([*attributes.values()])): undo.close()


def _set_mode(model, training):
    """Set eval mode, or training mode without dropout of any kind (`DropPath`, `StochasticDepth`). Recurrent layers are
    always in training mode, without dropout: cuDNN's have no backward pass in eval mode (PyTorch issue 5878)."""
    model.train(training)
    for m in model.modules():
        if isinstance(m, nn.RNNBase): m.train().dropout = 0.
        elif 'drop' in type(m).__name__.lower() or isinstance(m, nn.MultiheadAttention): m.eval()


class Comparison:
    "One step of contiguous fp32 and candidates' steps on the same batch. Does not communicate with other processes."
    def __init__(self, learn, baseline, callbacks, batch):
        self.learn, self.baseline, self.batch, self.stop = learn, baseline, batch, StopBeforeStep(learn)
        self.callbacks = [self.stop, *filter(is_part_of_step, callbacks)]
        self.params, self.fp32_precision = dict(learn.model.named_parameters()), fp32_precision(fit_device(learn))
        from . import step_replay  # needs a private module of PyTorch, so it is imported where it is used
        self.Record, self.Replay = step_replay.Record, step_replay.Replay

    def step(self, c, make_mode) -> tuple: # Loss, gradients, the mode
        c.activate(self.learn, self.callbacks)
        return _loss_and_grads(self.learn, self.batch, self.stop, make_mode)

    def run_baseline(self) -> bool: # True if the step had to be in training mode
        "Take the step of contiguous fp32 in eval mode, or in training mode for detectors: they have no eval-mode loss."
        for training in False, True:
            _set_mode(self.learn.model, training)
            try: self.baseline_loss, grads, self.counts = self.step(self.baseline, partial(self.Record, keep=False))
            except Exception:
                if training: raise
            else:
                if training or any(g is not None for g in grads): break
        self.baseline_grads = [g if g is None else g.cpu() for g in grads]  # leaves the device's memory to the steps
        self.grad_norm = _norm(g for g in self.baseline_grads if g is not None)
        self.baseline_metric_errors = metric_errors(self.learn)
        return training

    def run_candidate(self, c) -> tuple: # Arguments of `check_gradients`
        """Set `loss_diff` and `grad_diff`. Infinity, NaN or a failing metric eliminates a candidate, and so does a loss
        or a product that differs from contiguous fp32's by more than rounding explains. The baseline's step is replayed
        with the candidate's values, since rounding alone drives gradients of deep networks far apart."""
        loss, grads, record = self.step(c, self.Record)
        self.set_differences(c, loss, grads)
        if not math.isfinite(loss): raise Eliminated('loss is not finite')
        name = not_finite(zip(self.params, grads))
        if name: raise Eliminated(f'gradient of {name} is not finite')
        check_metrics(self.learn, self.baseline_metric_errors)
        replayed, wrong = self.replay_baseline(c, record)
        if not c.loss_diff <= TOLERANCE[self.precision_of(c)].loss:
            raise Eliminated('numbers differ from contiguous fp32 (loss)')
        if wrong: raise Eliminated(f'numbers differ from contiguous fp32 (result of {wrong[0]})')
        return record, replayed, _errors(grads, replayed)

    def set_differences(self, c, loss, grads):
        c.loss_diff = abs(loss - self.baseline_loss)/(abs(self.baseline_loss) or 1)
        pairs = ((a, b) for a, b in _pairs(grads, self.baseline_grads) if a is not None)
        c.grad_diff = _norm(a - b.to(a.device) for a, b in pairs)/(self.grad_norm or 1)

    def large_errors(self, c, errors) -> list:
        "Pairs `(parameter name, error)` of gradients that differ by more than the tolerance."
        limits = TOLERANCE[self.precision_of(c)]
        return [(n, e) for (n, p), e in zip(self.params.items(), errors)
                if not e <= (limits.vector if p.dim() < 2 else limits.weight)]

    def check_gradients(self, c, record, replayed, errors):
        "Repeat the replay with rounding errors. Eliminates a candidate whose large errors these don't explain."
        rounding_errors = dict(zip(self.params, _errors(self.replay_baseline(c, record, rounded=True)[0], replayed)))
        for n, e in self.large_errors(c, errors):
            if not e <= ROUNDING_FACTOR*rounding_errors[n]:
                raise Eliminated(f'numbers differ from contiguous fp32 (gradient of {n})')

    def replay_baseline(self, c, record, rounded=False) -> tuple: # Gradients of contiguous fp32; products that differ
        precision = self.precision_of(c)
        generator = torch.Generator(fit_device(self.learn)).manual_seed(0)  # leaves the step's own random numbers alone
        _round = partial(perturb, eps=ROUNDING[precision], generator=generator)
        def _mode(model):
            return self.Replay(model, record, self.counts, _round, TOLERANCE[precision].result, ROUNDING_FACTOR,
                               rounded)
        _, grads, mode = self.step(self.baseline, _mode)
        return grads, mode.wrong

    def precision_of(self, c) -> str: return self.fp32_precision if c.base_precision == 'fp32' else c.base_precision


def check_numbers(
    learn, # Inside `preserve_learner`
    candidates, # `Candidate`s, contiguous fp32 first
    callbacks, # Of the Learner, without format and precision
    batch,
    restore_tensors, # Restores weights, buffers and optimizer state
):
    """Set `loss_diff` and `grad_diff`. Eliminate candidates whose numbers differ from contiguous fp32's by more than
    rounding explains, or with which a metric fails."""
    restore_modes = _modes(learn.model)
    baseline, comparison = candidates[0], Comparison(learn, candidates[0], callbacks, batch)
    in_training_mode = baseline.run_or_eliminate(learn, comparison.run_baseline)
    baseline.loss_diff = baseline.grad_diff = 0.
    for c in candidates[1:]:
        args = c.run_or_eliminate(learn, partial(comparison.run_candidate, c)) if c.running else None
        if args is None: continue
        # all processes run the same number of passes, since a model may communicate in them
        explain = gather_from_ranks(bool(comparison.large_errors(c, args[-1])))
        if any(explain): c.run_or_eliminate(learn, partial(comparison.check_gradients, c, *args))
        del args  # free its pass and gradients before the next ones are made
    learn.model.zero_grad(set_to_none=True)
    if in_training_mode: restore_tensors()
    restore_modes()


def check_compiled(
    learn, # Inside `preserve_learner`
    compiled, eager, baseline, # `Candidate`s: one compiled, the same one uncompiled, contiguous fp32
    callbacks, # Of the Learner, without format and precision
    batch,
):
    """Set `loss_diff` and `grad_diff` of the compiled candidate. Eliminate it if its numbers differ from the uncompiled
    one's by more than rounding explains: the tolerance, or three times the change that rounding the input makes. In
    training mode, running statistics change."""
    restore_modes, comparison = _modes(learn.model), Comparison(learn, baseline, callbacks, batch)
    # sets eval mode, which amplifies rounding less than training mode, where the model has a loss there
    baseline.run_or_eliminate(learn, comparison.run_baseline)
    precision = comparison.precision_of(compiled)
    def _step(c): return comparison.step(c, lambda model: nullcontext())[:2]
    def _check():
        for _ in range(3): loss, grads = _step(compiled)  # the first step runs uncompiled, the second one compiles
        if compiled.compile.reason: raise Eliminated(f'not compiled: {compiled.compile.reason}')
        comparison.set_differences(compiled, loss, grads)
        eager_loss, eager_grads = _step(eager)
        missing = [n for n, a, b in zip(comparison.params, grads, eager_grads) if (a is None) != (b is None)]
        if missing: raise Eliminated(f'a gradient is missing only uncompiled, or only compiled ({missing[0]})')
        if not abs(loss - eager_loss) <= TOLERANCE[precision].loss*(abs(eager_loss) or 1):
            raise Eliminated('numbers differ when compiled (loss)')
        comparison.batch = perturb(batch, ROUNDING[precision], torch.Generator(fit_device(learn)).manual_seed(0))
        rounding = dict(zip(comparison.params, _errors(_step(eager)[1], eager_grads)))
        for n, e in comparison.large_errors(compiled, _errors(grads, eager_grads)):
            if not e <= ROUNDING_FACTOR*rounding[n]:
                raise Eliminated(f'numbers differ when compiled (gradient of {n})')
    compiled.run_or_eliminate(learn, _check)
    compiled.compile.forget()  # this code was for these modes
    learn.model.zero_grad(set_to_none=True)
    restore_modes()


def _modes(model):
    "A function that restores the mode of each module and the dropout of recurrent layers."
    modes = [(m, m.training, m.dropout if isinstance(m, nn.RNNBase) else None) for m in model.modules()]
    def _restore():
        for m, training, dropout in modes:
            m.training = training
            if dropout is not None: m.dropout = dropout
    return _restore


def metric_errors(learn) -> dict: # Errors by index
    "Errors of the Learner's metrics on its last prediction. Leaves the metrics' state as it was."
    errors, pred, loss = {}, learn.pred, learn.loss
    with ExitStack() as undo, restore_random_states(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.pred, learn.loss = map_tensors(torch.Tensor.detach, (pred, loss))
        for i, m in enumerate(learn.metrics if len(learn.yb) else ()):
            restore_dict(undo, vars(m))
            try: m.reset(); m.accumulate(learn); m.value
            except Exception as e: errors[i] = e
    learn.pred, learn.loss = pred, loss
    return errors


def check_metrics(learn, baseline_errors):
    "Raise `Eliminated` if a metric fails that does not fail in contiguous fp32."
    for i, e in metric_errors(learn).items():
        if i not in baseline_errors:
            raise Eliminated(f'metric {learn.metrics[i].name} fails: {type(e).__name__}: {str(e).strip()[:100]}')


def check_predictions(
    learn, # Inside `preserve_learner`, evaluating
    candidates, # `Candidate`s
    callbacks, # Of the Learner, without format and precision
    batch,
    reference=None, # Outputs and metric errors of contiguous fp32; None: the first candidate is contiguous fp32
): # The reference
    "Set `pred_diff`. Eliminate candidates whose outputs can't be compared or differ by more than rounding explains."
    callbacks, precision = [*filter(is_part_of_step, callbacks)], fp32_precision(fit_device(learn))
    def _outputs(c):
        c.activate(learn, callbacks)
        if c.folded: learn.one_batch(0, batch)
        learn.one_batch(0, batch)
        return map_tensors(lambda t: t.detach().clone(), learn.pred)
    def _reference(): return _outputs(candidates[0]), metric_errors(learn)
    def _check(c):
        outputs, errors = reference
        c.pred_diff = relative_error(_outputs(c), outputs)
        if not numbers_of(outputs): raise Eliminated("outputs hold no numbers to compare with contiguous fp32")
        if not c.pred_diff <= PREDICTION_TOLERANCE[precision if c.base_precision == 'fp32' else c.base_precision]:
            raise Eliminated('numbers differ from contiguous fp32')
        check_metrics(learn, errors)
    for c in candidates:
        if c.is_baseline: c.pred_diff, reference = 0., c.run_or_eliminate(learn, _reference)
        elif c.running: c.run_or_eliminate(learn, partial(_check, c))
    return reference
