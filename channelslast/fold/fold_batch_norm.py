"Predictions with batch norm folded into the convolutions, as a fastai callback."
import warnings
from contextlib import ExitStack

import torch
from fastai.callback.core import Callback
from torch import nn

from ..core.compare import numbers_of, perturb, relative_error
from ..core.devices import fp32_precision
from ..core.pickle_as import pickle_as
from ..core.random_state import restore_random_states
from ..core.undo import ForwardPatch, restore_dict
from .fold_trace import ForwardTrace, Pair, is_complete
from .folded_weights import FoldedWeights, has_global_hooks, input_key, is_eager, structure_key

__all__ = ['FoldBatchNorm']

OUTPUT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # relative, of each tensor of the output
HALF_TOLERANCE = 5e-2  # where something is computed in half precision
# where fp32 is computed in TF32 or in bf16: the tolerance, and the rounding error of a number
REDUCED_FP32 = dict(fp16=(1e-2, 2**-10), bf16=(HALF_TOLERANCE, 2**-7))
# Deep models amplify rounding errors: one of the input alone changes a ResNet-152's output by 4e-4 where its batch
# norms have a batch's statistics. Folding changes it by 0.9 to 2.8 times as much in ten architectures of torchvision.
AMPLIFICATION = 10
MAX_SHAPES = 8  # of inputs are looked at one by one; where all gave one plan, it serves the others too


class FoldCache:
    "What is known of one model, and prepared for it. Copies and pickles are empty."
    def __init__(self, model=None):
        self.model, self.structure, self.plans, self.agreed, self.prepared = model, None, {}, set(), None
        self.folded = self.found = None
        self.stays = False  # unfolded, for good

    def __reduce__(self): return type(self), ()

    def run(self, forward, args, kwargs):
        "The output of the model, whose `forward` this is, folded where that is safe."
        if self.stays or torch.is_grad_enabled() or self.model.training or has_global_hooks():
            return forward(*args, **kwargs)
        if (structure := structure_key(self.model)) != self.structure:
            self.structure, self.plans, self.agreed, self.prepared = structure, {}, set(), None
        kind, shapes = input_key(args, kwargs)
        known = self.plans.setdefault(kind, {})
        plan = known.get(shapes)
        if plan is None and len(known) >= MAX_SHAPES and len({*known.values()}) == 1: plan = next(iter(known.values()))
        if plan is None or not self._prepare(plan): return self._observe(known, kind, shapes, forward, args, kwargs)
        out, held = self.prepared.run(forward, args, kwargs)
        if held: return out
        self._stay("does not run the same layers for every batch")
        return forward(*args, **kwargs)

    def _prepare(self, plan) -> bool:
        "Have the plan's weights ready; False if the model lacks what they are computed from."
        if self.prepared and self.prepared.plan == plan and self.prepared.is_current(): return True
        self.prepared = None  # before the next ones take their memory
        if all(map(is_complete, plan)): self.prepared = FoldedWeights(plan)
        return self.prepared is not None

    def _observe(self, known, kind, shapes, forward, args, kwargs):
        """The output of an unfolded pass, from which the plan for this kind of input follows; a new plan is tried on
        the same input."""
        if not is_eager(self.structure[0]):
            known[shapes], self.folded = (), 0
            return forward(*args, **kwargs)
        with ExitStack() as back:
            back.enter_context(restore_random_states())
            with ForwardTrace(self.model, (args, kwargs)) as trace: out = forward(*args, **kwargs)
            plan = trace.plan()
            if trace.writes: plan = ()
            self.found, self.folded = trace.found, sum(isinstance(o, Pair) for o in plan)
            with restore_random_states(), ExitStack() as undo:
                back.close()  # a pass from the same random states
                if plan and plan not in self.agreed:
                    for m in self.model.modules(): restore_dict(undo, vars(m))
                    self._try(plan, out, kind, forward, args, kwargs)
            known[shapes] = plan  # if nothing was wrong, and nobody interrupted
        return out

    def _try(self, plan, truth, kind, forward, args, kwargs):
        if not numbers_of(truth): return self._stay("gives outputs without numbers, which can't be compared")
        self._prepare(plan)
        try:
            with restore_random_states(): off = relative_error(self.prepared.run(forward, args, kwargs)[0], truth)
        except Exception as e: return self._stay(f"fails with its batch norms folded ({type(e).__name__}: {e})")
        tolerance, eps = self._tolerance(plan, kind)
        if off <= tolerance or off <= HALF_TOLERANCE and off <= self._amplified(eps, truth, forward, args, kwargs):
            self.agreed.add(plan)
        else: self._stay(f"gives other outputs with its batch norms folded (relative difference {off:.0e})")

    def _amplified(self, eps, truth, forward, args, kwargs) -> float:
        "What rounding alone may do to this model's output; nothing, if one of the input makes another output of it."
        try:
            with restore_random_states(): args, kwargs = perturb((args, kwargs), eps)
            off = AMPLIFICATION*relative_error(forward(*args, **kwargs), truth)
        except Exception: return 0  # a model that looks at its input closely
        return off if off <= HALF_TOLERANCE else 0

    def _tolerance(self, plan, kind) -> tuple: # And the rounding error of what is computed least exactly
        sources = [t for t in self.prepared.sources if t is not None]
        dtypes = {t.dtype for t in sources if t.is_floating_point()} | {o.dtype for o in plan}
        dtypes |= {o[1] for o in kind if isinstance(o, tuple) and isinstance(o[0], str)}  # autocast's
        precisions = {fp32_precision(d) for d in {t.device for t in sources}}
        limits = [REDUCED_FP32[p] for p in precisions if p in REDUCED_FP32 and torch.float32 in dtypes]
        limits += [(OUTPUT_TOLERANCE.get(t, HALF_TOLERANCE), torch.finfo(t).eps) for t in dtypes]
        return tuple(map(max, zip(*limits)))

    def _stay(self, why):
        self.stays, self.folded, self.prepared, self.plans = True, 0, None, {}
        warnings.warn(f"FoldBatchNorm: {type(self.model).__name__} {why}. It stays unfolded.", stacklevel=2)


@pickle_as(Callback)
class FoldBatchNorm(Callback):
    """Predict faster, with the same numbers: while the Learner evaluates (validation, `validate`, `get_preds`, `tta`,
    `predict`), each batch norm is folded into the convolution before it, and what mixed precision casts at each call is
    cast once.

    Folded is what is safe, as one pass of the model shows: 1-D, 2-D and 3-D convolutions whose output nothing but one
    batch norm in eval mode reads, each used once. The first batch runs twice (users' hooks, too), and both outputs are
    compared; where they differ by over 1e-5 (in fp32) a third time, its input off by a rounding error, to see whether
    the model amplifies that as much. One that gives other outputs when folded, or that runs its layers in another order
    later, is left alone with a warning. `.folded` of `.found` batch norms after a convolution are folded. Works on
    every device. Compiled models, TorchScript, and models in `DataParallel` or `DistributedDataParallel` stay unfolded.

    The model itself is never changed but for the time of its forward pass. Changed weights and statistics are noticed,
    but for what PyTorch does not count: after `p.data.mul_(2)` or the like outside a fit, call
    `learn.fold_batch_norm.forget()`."""
    order, _folds, _patch, measured = 11, None, ForwardPatch(), False  # after mixed precision

    def __init__(self,
        measured = False, # Put there by `to_fastest(train=False)`, which `to_fastest()` undoes?
    ):
        super().__init__()
        self._folds, self.measured = FoldCache(), measured

    @property
    def folded(self):
        "How many batch norms are folded; None before the first batch."
        return self._folds.folded
    @property
    def found(self):
        "How many batch norms get what a convolution made; None before the first batch."
        return self._folds.found

    @property
    def works(self):
        "Was anything prepared for the last batch, folded or cast?"
        return bool(self._folds.prepared and self._folds.prepared.plan)

    @property
    def ready(self):
        "Are the prepared weights those of the model as it is?"
        return self.works and self._folds.prepared.is_current()

    def forget(self):
        "Free the prepared weights; the next batch prepares them anew."
        self._folds.prepared = None

    def before_batch(self):
        self.leave()
        if self.training: return self.forget()  # fastai's optimizers step through `p.data`, which PyTorch doesn't count
        if not isinstance(self.model, nn.Module) or not is_eager([self.model]): return
        if self._folds.model is not self.model: self._folds = FoldCache(self.model)
        def _folded(m, forward): return lambda *args, **kwargs: self._folds.run(forward, args, kwargs)
        self._patch = ForwardPatch([self.model], _folded)
        self._patch.apply()

    def leave(self):
        "Give the model its own forward back."
        self._patch.undo()
        self._patch = ForwardPatch()  # holds the model

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == 'learn' and value is None: self._folds = FoldCache()  # removed from its Learner
