"Are a candidate's numbers those of contiguous fp32, as far as its precision allows?"
import math
import warnings
from contextlib import ExitStack, contextmanager
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
from .step_replay import Record, Replay

__all__ = ['TOLERANCE', 'PREDICTION_TOLERANCE', 'stop_before_step', 'not_finite', 'check_numbers', 'check_predictions']

# Relative differences from fp32 that rounding explains: of the loss, of an operation's result, of a weight's gradient,
# of a vector's (biases, norms). Vectors' gradients are sums over all pixels: in bf16 one in Swin3D differed by 0.6.
TOLERANCE = dict(fp32=(1e-3, 1e-2, 5e-2, 5e-2), fp16=(2e-2, 1e-2, 5e-2, 0.2), bf16=(5e-2, 2e-2, 0.12, 0.8))
ROUNDING = dict(fp32=2**-18, fp16=2**-11, bf16=2**-8)  # a sum's in fp32
ROUNDING_FACTOR = 3  # times the difference that such rounding errors make

PREDICTION_TOLERANCE = dict(fp32=1e-3, fp16=2e-2, bf16=1e-1)  # relative differences of all outputs


class StopBeforeStep(Callback):
    "Stop each batch before the optimizer; tell `mode`, which follows the step, when the backward pass begins."
    order, mode = -1000, None
    def before_backward(self):
        if self.mode: self.mode.backward = True
    def before_step(self): raise CancelBatchException


def stop_before_step(learn):
    "The callback, for a Learner whose callbacks are exchanged by hand."
    cb = StopBeforeStep()
    cb.learn = learn
    return cb


def not_finite(named) -> str: # `''` where all are finite
    "The first name whose tensor holds NaN or infinity, of pairs `(name, tensor)`. Tensors without numbers pass."
    named = [(n, t._values() if t.layout is torch.sparse_coo else t) for n, t in named if t is not None]
    named = [(n, t) for n, t in named if t.layout is torch.strided and (t.is_floating_point() or t.is_complex())]
    if not named: return ''
    finite = torch.stack([t.isfinite().all().to(named[0][1].device) for _, t in named])  # one wait for all
    return '' if finite.all() else named[finite.int().argmin().item()][0]


# gradients

def _norm(tensors) -> float:
    "Of all together; in float64, which not all GPUs have: a CPU's float32 norm of a hundred million numbers is 1% off."
    def _one(t): return torch.linalg.vector_norm(t, dtype=_wide(t, torch.float64) if t.is_cpu or t.is_cuda else None)
    return math.hypot(*map(_one, tensors))


def _wide(t, dtype): return torch.promote_types(t.dtype, dtype)  # complex numbers stay complex


def _wide_copy(g):
    g = g.detach().to_dense() if g.layout is not torch.strided else g.detach()  # of embeddings with `sparse=True`
    return g.to(_wide(g, torch.float32), copy=True)


def _pairs(grads, truth):
    "Gradients side by side; none is as good as zeros."
    for a, b in zip(grads, truth):
        if a is not None or b is not None:
            yield (torch.zeros_like(b) if a is None else a), (torch.zeros_like(a) if b is None else b)
        else: yield None, None


def _error(a, b) -> float:
    """The relative difference of the whole, or an eighth of the largest one of a slice along the first dimension: the
    weights of one output channel, relative to an average one."""
    if a is None or not a.numel(): return 0.
    off, b = (t.flatten(1) if t.dim() > 1 else t.view(1, -1) for t in (a - b, b))
    offs, norm = torch.linalg.vector_norm(off, dim=1), torch.linalg.vector_norm(b)
    most = torch.maximum(torch.linalg.vector_norm(offs), offs.max()*math.sqrt(len(offs))/8)
    return (most/norm if most else most).item()


def _errors(grads, truth) -> list: return [_error(a, b) for a, b in _pairs(grads, truth)]


def _loss_and_grads(learn, batch, stop, make_mode) -> tuple: # Loss, gradients, the mode
    "Loss and gradients of one batch, in fp32, unscaled; the step runs in the mode that `make_mode(model)` gives."
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
        scale /= 16  # too large for fp16: training finds that out, too
        scaler._scale.fill_(scale)


@contextmanager
def _no_graphs_kept(model):
    "Restore modules that keep results with their graph, as LeViT does in eval mode: the next backward pass would fail."
    kept = [(vars(m), ExitStack()) for m in model.modules()]
    for own, undo in kept: restore_dict(undo, own)
    yield
    for own, undo in kept:
        if any(t.grad_fn is not None for t in tensors_of([*own.values()])): undo.close()


def _set_mode(model, training):
    """Eval mode, or training mode without dropout (of any kind: `DropPath`, `StochasticDepth`). Recurrent layers are in
    training mode always, and without dropout: cuDNN's have no backward pass in eval mode (PyTorch issue 5878)."""
    model.train(training)
    for m in model.modules():
        if isinstance(m, nn.RNNBase): m.train().dropout = 0.
        elif 'drop' in type(m).__name__.lower() or isinstance(m, nn.MultiheadAttention): m.eval()


class Comparison:
    "One step of contiguous fp32, and candidates' steps on the same batch. Nothing here communicates with other ranks."
    def __init__(self, learn, baseline, cbs, batch):
        self.learn, self.baseline, self.batch, self.stop = learn, baseline, batch, stop_before_step(learn)
        self.cbs = [self.stop, *filter(is_part_of_step, cbs)]
        self.params = dict(learn.model.named_parameters())
        self.computed = fp32_precision(fit_device(learn))

    def step(self, c, make_mode) -> tuple: # Loss, gradients, the mode
        c.activate(self.learn, self.cbs)
        return _loss_and_grads(self.learn, self.batch, self.stop, make_mode)

    def set_up(self) -> bool: # True if the step had to be one in training mode
        """Take the step of contiguous fp32: in eval mode, or in training mode for detectors, which have no loss in eval
        mode."""
        for training in False, True:
            _set_mode(self.learn.model, training)
            try: self.loss, grads, self.counts = self.step(self.baseline, partial(Record, keep=False))
            except Exception:
                if training: raise
            else:
                if training or any(g is not None for g in grads): break
        self.reference = [g if g is None else g.cpu() for g in grads]  # device memory is for the steps
        self.known, self.norm = metric_errors(self.learn), _norm(g for g in self.reference if g is not None)
        return training

    def look(self, c) -> tuple: # What `explain` needs
        """Fill `loss_diff` and `grad_diff`. A candidate that makes infinity or NaN, or with which a metric fails, is
        out; so is one whose loss or products differ from contiguous fp32's by more than rounding explains.

        The baseline's step is replayed with the candidate's values: gradients of two steps of a deep network are far
        apart by rounding alone."""
        loss, grads, record = self.step(c, Record)
        c.loss_diff = abs(loss - self.loss)/(abs(self.loss) or 1)
        pairs = ((a, b) for a, b in _pairs(grads, self.reference) if a is not None)
        c.grad_diff = _norm(a - b.to(a.device) for a, b in pairs)/(self.norm or 1)
        name = '' if math.isfinite(loss) else 'loss'
        if name := name or (f'gradient of {n}' if (n := not_finite(zip(self.params, grads))) else ''):
            raise Eliminated(f'{name} is not finite')
        if note := new_metric_error(self.learn, self.known): raise Eliminated(note)
        replayed, wrong = self.replay(c, record)
        if not c.loss_diff <= TOLERANCE[self.precision(c)][0]: raise Eliminated('numbers differ from contiguous fp32 (loss)')
        if wrong: raise Eliminated(f'numbers differ from contiguous fp32 (result of {wrong[0]})')
        return record, replayed, _errors(grads, replayed)

    def unexplained(self, c, errors) -> list:
        "The parameters whose gradients the replay alone does not explain, with the difference of each."
        most = TOLERANCE[self.precision(c)][2:]
        return [(n, e) for (n, p), e in zip(self.params.items(), errors) if not e <= most[p.dim() < 2]]

    def explain(self, c, record, replayed, errors):
        "Repeat the replay with rounding errors. A candidate is out if these do not explain its gradients either."
        by = dict(zip(self.params, _errors(self.replay(c, record, rounded=True)[0], replayed)))
        for n, e in self.unexplained(c, errors):
            if not e <= ROUNDING_FACTOR*by[n]: raise Eliminated(f'numbers differ from contiguous fp32 (gradient of {n})')

    def replay(self, c, record, rounded=False) -> tuple: # Gradients of contiguous fp32; products that differ
        precision = self.precision(c)
        generator = torch.Generator(fit_device(self.learn)).manual_seed(0)  # the step's own random numbers stay
        _round = partial(perturb, eps=ROUNDING[precision], generator=generator)
        def _mode(model):
            return Replay(model, record, self.counts, _round, TOLERANCE[precision][1], ROUNDING_FACTOR, rounded)
        _, grads, mode = self.step(self.baseline, _mode)
        return grads, mode.wrong

    def precision(self, c) -> str: return self.computed if c.base_precision == 'fp32' else c.base_precision


def check_numbers(
    learn, # Inside `preserve_learner`
    candidates, # `Candidate`s, contiguous fp32 first
    cbs, # Of the Learner, without format and precision
    batch,
    restore_values, # Restores weights, buffers and optimizer state
):
    """Fill `loss_diff` and `grad_diff`, and drop candidates whose numbers differ from contiguous fp32's by more than
    rounding explains, or with which a metric fails."""
    modes = [(m, m.training, m.dropout if isinstance(m, nn.RNNBase) else None) for m in learn.model.modules()]
    baseline, beside = candidates[0], Comparison(learn, candidates[0], cbs, batch)
    training = baseline.run_or_eliminate(learn, beside.set_up)
    baseline.loss_diff = baseline.grad_diff = 0.
    for c in candidates[1:]:
        if not c.running or (found := c.run_or_eliminate(learn, partial(beside.look, c))) is None: continue
        # all ranks run the same number of passes, since a model may communicate in them
        if any(gather_from_ranks(bool(beside.unexplained(c, found[-1])))): c.run_or_eliminate(learn, partial(beside.explain, c, *found))
        found = None  # the pass and the gradients that it holds, before the next ones are made
    learn.model.zero_grad(set_to_none=True)
    if training: restore_values()
    for m, was, dropout in modes:
        m.training = was
        if dropout is not None: m.dropout = dropout


# metrics

def metric_errors(learn) -> dict: # Errors by place
    "The Learner's metrics that fail on what it just predicted; their state stays."
    errors = {}
    pred, loss = learn.pred, learn.loss
    with ExitStack() as undo, restore_random_states(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.pred, learn.loss = map_tensors(torch.Tensor.detach, (pred, loss))
        for i, m in enumerate(learn.metrics if len(learn.yb) else ()):
            restore_dict(undo, vars(m))
            try: m.reset(); m.accumulate(learn); m.value
            except Exception as e: errors[i] = e
    learn.pred, learn.loss = pred, loss
    return errors


def new_metric_error(learn, known) -> str: # `''` where there is none
    "The first metric that fails here, but not in contiguous fp32, and its error."
    for i, e in metric_errors(learn).items():
        if i not in known: return f'metric {learn.metrics[i].name} fails: {type(e).__name__}: {str(e).strip()[:100]}'
    return ''


# predictions

def _outputs(learn, batch):
    "The model's outputs as users get them."
    learn.one_batch(0, batch)
    return map_tensors(lambda t: t.detach().clone(), learn.pred)


def check_predictions(
    learn, # Inside `preserve_learner`, evaluating
    candidates, # `Candidate`s
    cbs, # Of the Learner, without format and precision
    batch,
    truth=None, # Outputs and failing metrics of contiguous fp32; None: the first candidate is that one
): # The same
    "Fill `pred_diff`, and drop candidates whose outputs differ by more than rounding explains, or can't be compared."
    cbs, computed = [*filter(is_part_of_step, cbs)], fp32_precision(fit_device(learn))
    def _look(c):
        c.activate(learn, cbs)
        if c.folded: learn.one_batch(0, batch)
        found = _outputs(learn, batch)
        if c.baseline: return found, metric_errors(learn)
        c.pred_diff = relative_error(found, truth[0])
        if not numbers_of(truth[0]): raise Eliminated("outputs hold no numbers: they can't be compared with contiguous fp32")
        if not c.pred_diff <= PREDICTION_TOLERANCE[computed if c.base_precision == 'fp32' else c.base_precision]:
            raise Eliminated('numbers differ from contiguous fp32')
        if note := new_metric_error(learn, truth[1]): raise Eliminated(note)
    for c in candidates:
        if not c.running: continue
        if c.baseline: c.pred_diff, truth = 0., c.run_or_eliminate(learn, partial(_look, c))
        else: c.run_or_eliminate(learn, partial(_look, c))
    return truth
