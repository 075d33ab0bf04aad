"Are a candidate's numbers those of contiguous fp32, as far as its precision allows?"
import math

import torch
from fastai.callback.core import Callback, CancelBatchException
from torch.utils._pytree import tree_map_only

from .folding import difference
from .untouched import TAKE_PART

__all__ = ['TOLERANCE', 'PREDICTIONS', 'stop_before_step', 'check_numbers', 'check_predictions']

# Relative differences of (loss, gradients) from contiguous fp32 beyond which a candidate's numbers are wrong
TOLERANCE = dict(fp32=(1e-3, 5e-2), fp16=(2e-2, 0.4), bf16=(5e-2, 0.8))

PREDICTIONS = dict(fp32=1e-3, fp16=2e-2, bf16=1e-1)  # the same of all outputs


class StopBeforeStep(Callback):
    "Stop each batch before the optimizer."
    order = -1000
    def before_step(self): raise CancelBatchException


def stop_before_step(learn):
    "The callback, for a Learner whose callbacks are exchanged by hand."
    cb = StopBeforeStep()
    cb.learn = learn
    return cb


def _loss_and_grads(learn, batch) -> tuple:
    "Loss and gradients of one batch in eval mode, in fp32, unscaled."
    scaler = learn.scaler or None
    scale = scaler.get_scale() if scaler and scaler.is_enabled() else 1.
    while True:
        torch.manual_seed(0)
        learn.model.zero_grad(set_to_none=True)
        learn.one_batch(0, batch)
        grads = [None if p.grad is None else p.grad.detach().float()/scale for p in learn.model.parameters()]
        if scale <= 1 or all(g is None or g.isfinite().all() for g in grads):
            return learn.loss.detach().float().mean().item(), grads
        scale /= 16  # too large for fp16: what training, too, would find out
        scaler._scale.fill_(scale)


def _norm(tensors) -> float:
    "Of all together; in float64, where there is one: a CPU's float32 norm of a hundred million numbers is 1 % off."
    return math.hypot(*(torch.linalg.vector_norm(t, dtype=None if t.is_mps else torch.float64) for t in tensors))


def _differences(found, reference) -> tuple:
    "Of loss and gradients, relative."
    (loss, grads), (loss0, grads0) = found, reference
    pairs = [(a, b) for a, b in zip(grads, grads0) if b is not None]
    off, norm = _norm(b if a is None else a - b for a, b in pairs), _norm(b for _, b in pairs)
    return abs(loss - loss0)/(abs(loss0) or 1), off/(norm or 1)


def check_numbers(
    learn, # Inside `untouched`
    candidates, # `Candidate`s, contiguous fp32 first
    cbs, # Of the Learner, without format and precision
    batch,
):
    "Fill `loss_diff` and `grad_diff`, and drop whoever is outside its tolerance."
    cbs = [stop_before_step(learn), *(o for o in cbs if isinstance(o, TAKE_PART))]
    learn.model.eval()
    reference = None
    for c in candidates:
        if not c.running: continue
        c.switch(learn, cbs)
        found = c.attempt(learn, lambda: _loss_and_grads(learn, batch))
        if found is None: continue
        if c.baseline:
            reference, c.loss_diff, c.grad_diff = found, 0., 0.
            continue
        c.loss_diff, c.grad_diff = _differences(found, reference)
        most_loss, most_grad = TOLERANCE[c.half]
        if not math.isfinite(found[0]): c.out('loss is not finite')
        elif not (c.loss_diff <= most_loss and c.grad_diff <= most_grad): c.out('numbers differ from contiguous fp32')
    learn.model.zero_grad(set_to_none=True)
    learn('before_train')


def _outputs(learn, batch):
    "What the model gives, as users get it."
    learn.one_batch(0, batch)
    return tree_map_only(torch.Tensor, lambda t: t.detach().clone(), learn.pred)


def check_predictions(
    learn, # Inside `untouched`, evaluating
    candidates, # `Candidate`s
    cbs, # Of the Learner, without format and precision
    batch,
    truth=None, # What contiguous fp32 gives; None: the first candidate is that one
): # The same
    "Fill `pred_diff`, and drop whoever is outside its tolerance."
    cbs = [o for o in cbs if isinstance(o, TAKE_PART)]
    for c in candidates:
        if not c.running: continue
        c.switch(learn, cbs)
        found = c.attempt(learn, lambda: (learn.one_batch(0, batch), _outputs(learn, batch))[1] if c.folded else
                          _outputs(learn, batch))
        if found is None: continue
        if truth is None: truth = found
        c.pred_diff = difference(found, truth)
        if not c.baseline and not c.pred_diff <= PREDICTIONS[c.half]: c.out('numbers differ from contiguous fp32')
    return truth
