"Are a candidate's numbers those of contiguous fp32, as far as its precision allows?"
import math
import warnings
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from fastai.callback.core import Callback, CancelBatchException
from fastai.torch_core import set_seed

from .containers import map_tensors, tensors_of
from .devices import fit_device, rank0s
from .folding import difference, nudge, numbers_of
from .replay import Record, Replay
from .reproducible import keep_random_states
from .step_callbacks import takes_part
from .untouched import keep_dict

__all__ = ['TOLERANCE', 'PREDICTIONS', 'stop_before_step', 'not_finite', 'check_numbers', 'check_predictions']

# Relative differences from fp32 that rounding explains: of the loss, of an operation's result, of a weight's gradient,
# of a vector's (biases, norms). Vectors' gradients are sums over all pixels: in bf16 one in Swin3D differed by 0.6.
TOLERANCE = dict(fp32=(1e-3, 1e-2, 5e-2, 5e-2), fp16=(2e-2, 1e-2, 5e-2, 0.2), bf16=(5e-2, 2e-2, 0.12, 0.8))
ROUNDING = dict(fp32=2**-18, fp16=2**-11, bf16=2**-8)  # a sum's in fp32
EXPLAINED = 3  # times the difference that such rounding errors make

PREDICTIONS = dict(fp32=1e-3, fp16=2e-2, bf16=1e-1)  # relative differences of all outputs


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
    "Of all together; in float64, where there is one: a CPU's float32 norm of a hundred million numbers is 1% off."
    def _one(t): return torch.linalg.vector_norm(t, dtype=None if t.is_mps else _wide(t, torch.float64))
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
    for own, undo in kept: keep_dict(undo, own)
    yield
    for own, undo in kept:
        if any(t.grad_fn is not None for t in tensors_of([*own.values()])): undo.close()


def _set_mode(model, training):
    "Eval mode, or training mode without dropout (of any kind: `DropPath`, `StochasticDepth`)."
    model.train(training)
    for m in model.modules():
        if 'drop' in type(m).__name__.lower(): m.eval()


def _reference(learn, baseline, cbs, batch, stop) -> tuple:
    """Loss, gradients and counted operations in contiguous fp32, and whether in training mode: detectors have no loss
    in eval mode, and cuDNN's recurrent layers no gradients."""
    for training in False, True:
        _set_mode(learn.model, training)
        baseline.switch(learn, cbs)
        try: loss, grads, counts = _loss_and_grads(learn, batch, stop, partial(Record, keep=False))
        except Exception:
            if training: raise
        else:
            if training or any(g is not None for g in grads): return loss, grads, counts, training


def _fault(learn, baseline, c, found, counts, cbs, batch, stop) -> str: # `''` where there is none
    """The first that differs from contiguous fp32 by more than rounding explains.

    The baseline's step is replayed with the candidate's values: gradients of two steps of a deep network are far apart
    by rounding alone. Where the replay does not explain a gradient, it is repeated with rounding errors."""
    names = [n for n, _ in learn.model.named_parameters()]
    most_loss, most_result, *most_grad = TOLERANCE[c.half]
    most = [most_grad[p.dim() < 2] for p in learn.model.parameters()]
    def _replayed(rounded=False):
        baseline.switch(learn, cbs)
        generator = torch.Generator(fit_device(learn))  # the step's own random numbers stay
        _round = partial(nudge, eps=ROUNDING[c.half], generator=generator.manual_seed(0))
        def _mode(model): return Replay(model, found[2], counts, _round, most_result, EXPLAINED, rounded)
        _, grads, mode = _loss_and_grads(learn, batch, stop, _mode)
        return grads, mode.wrong
    grads, wrong = _replayed()
    errors = _errors(found[1], grads)
    fault = 'loss' if not c.loss_diff <= most_loss else f'result of {wrong[0]}' if wrong else ''
    if rank0s(bool(fault) or all(e <= m for e, m in zip(errors, most))): return rank0s(fault)
    explained = _errors(_replayed(rounded=True)[0], grads)
    wrong = [n for n, e, m, by in zip(names, errors, most, explained) if not e <= max(m, EXPLAINED*by)]
    return rank0s(f'gradient of {wrong[0]}' if wrong else '')


def check_numbers(
    learn, # Inside `untouched`
    candidates, # `Candidate`s, contiguous fp32 first
    cbs, # Of the Learner, without format and precision
    batch,
    heal, # Restores weights, buffers and optimizer state
):
    """Fill `loss_diff` and `grad_diff`, and drop candidates whose numbers differ from contiguous fp32's by more than
    rounding explains, or with which a metric fails."""
    stop, modes = stop_before_step(learn), [(m, m.training) for m in learn.model.modules()]
    cbs, baseline = [stop, *filter(takes_part, cbs)], candidates[0]
    loss, reference, counts, training = _reference(learn, baseline, cbs, batch, stop)
    baseline.loss_diff = baseline.grad_diff = 0.
    known, norm = failing_metrics(learn), _norm(g for g in reference if g is not None)
    names = [n for n, _ in learn.model.named_parameters()]
    for c in candidates[1:]:
        if not c.running: continue
        c.switch(learn, cbs)
        found = c.attempt(learn, lambda: _loss_and_grads(learn, batch, stop, Record))
        if found is None: continue
        c.loss_diff = abs(found[0] - loss)/(abs(loss) or 1)
        c.grad_diff = _norm(a - b for a, b in _pairs(found[1], reference) if a is not None)/(norm or 1)
        name = '' if math.isfinite(found[0]) else 'loss'
        name = name or (f'gradient of {n}' if (n := not_finite(zip(names, found[1]))) else '')
        if note := rank0s(f'{name} is not finite' if name else failing_metric(learn, known)): c.out(note)
        elif fault := c.attempt(learn, lambda: _fault(learn, baseline, c, found, counts, cbs, batch, stop)):
            c.out(f'numbers differ from contiguous fp32 ({fault})')
    learn.model.zero_grad(set_to_none=True)
    if training: heal()
    for m, was in modes: m.training = was


# metrics

def failing_metrics(learn) -> dict: # Errors by place
    "The Learner's metrics that fail on what it just predicted; their state stays."
    errors = {}
    pred, loss = learn.pred, learn.loss
    with ExitStack() as undo, keep_random_states(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.pred, learn.loss = map_tensors(torch.Tensor.detach, (pred, loss))
        for i, m in enumerate(learn.metrics if len(learn.yb) else ()):
            keep_dict(undo, vars(m))
            try: m.reset(); m.accumulate(learn); m.value
            except Exception as e: errors[i] = e
    learn.pred, learn.loss = pred, loss
    return errors


def failing_metric(learn, known) -> str: # `''` where there is none
    "The first metric that fails here, but not in contiguous fp32, and its error."
    for i, e in failing_metrics(learn).items():
        if i not in known: return f'metric {learn.metrics[i].name} fails: {type(e).__name__}: {str(e).strip()[:100]}'
    return ''


# predictions

def _outputs(learn, batch):
    "The model's outputs as users get them."
    learn.one_batch(0, batch)
    return map_tensors(lambda t: t.detach().clone(), learn.pred)


def check_predictions(
    learn, # Inside `untouched`, evaluating
    candidates, # `Candidate`s
    cbs, # Of the Learner, without format and precision
    batch,
    truth=None, # Outputs and failing metrics of contiguous fp32; None: the first candidate is that one
): # The same
    "Fill `pred_diff`, and drop candidates whose outputs differ by more than rounding explains, or can't be compared."
    cbs = [*filter(takes_part, cbs)]
    for c in candidates:
        if not c.running: continue
        c.switch(learn, cbs)
        found = c.attempt(learn, lambda: (learn.one_batch(0, batch), _outputs(learn, batch))[1] if c.folded else
                          _outputs(learn, batch))
        if found is None: continue
        if truth is None: truth = found, failing_metrics(learn)
        c.pred_diff = 0. if c.baseline else difference(found, truth[0])
        if c.baseline: continue
        if not numbers_of(truth[0]): c.out("outputs hold no numbers: they can't be compared with contiguous fp32")
        elif not c.pred_diff <= PREDICTIONS[c.half]: c.out('numbers differ from contiguous fp32')
        elif note := failing_metric(learn, truth[1]): c.out(note)
    return truth
