"A fastai callback that folds batch norms into convolutions for predictions."
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
from .folded_weights import FoldedWeights
from .plan_conditions import has_global_hooks, input_key, is_eager, structure_key

__all__ = ['FoldBatchNorm']

OUTPUT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # relative error allowed in each output tensor
HALF_TOLERANCE = 5e-2  # the same if anything is computed in half precision
REDUCED_FP32 = dict(fp16=(1e-2, 2**-10), bf16=(HALF_TOLERANCE, 2**-7))  # fp32 in TF32 or bf16; with rounding errors
# Deep models amplify rounding errors. A rounding error of the input changes the output of a ResNet-152 by 4e-4 if its
# batch norms hold one batch's statistics. Folding changes it by 0.9 to 2.8 times as much in ten torchvision models.
AMPLIFICATION = 10
MAX_SHAPES = 8  # input shapes to trace; if all of them gave the same plan, other shapes use it too


class FoldCache:
    "Plans and folded weights of one model. Copies and pickles are empty."
    def __init__(self, model=None):
        self.model, self.structure, self.plans, self.verified, self.prepared = model, None, {}, set(), None
        self.folded, self.found, self.disabled = None, None, False  # `disabled`: the model stays unfolded

    def __reduce__(self): return type(self), ()

    def run(self, forward, args, kwargs):
        "The model's output. `forward` is the model's own; batch norms are folded where that is safe."
        if self.disabled or torch.is_grad_enabled() or self.model.training or has_global_hooks():
            return forward(*args, **kwargs)
        structure = structure_key(self.model)
        if structure != self.structure:
            self.structure, self.plans, self.verified, self.prepared = structure, {}, set(), None
        kind, shapes = input_key(args, kwargs)
        known = self.plans.setdefault(kind, {})
        plan = known.get(shapes)
        if plan is None and len(known) >= MAX_SHAPES and len({*known.values()}) == 1: plan = next(iter(known.values()))
        if plan is None or not self._prepare(plan): return self._trace(known, kind, shapes, forward, args, kwargs)
        out, matches_plan = self.prepared.run(forward, args, kwargs)
        if matches_plan: return out
        self._disable("does not run the same layers for every batch")
        return forward(*args, **kwargs)

    def _prepare(self, plan) -> bool:
        "Prepare the plan's weights. False if the model lacks tensors that they are computed from."
        if self.prepared and self.prepared.plan == plan and self.prepared.is_current(): return True
        self.prepared = None  # frees the old weights first
        if all(map(is_complete, plan)): self.prepared = FoldedWeights(plan)
        return self.prepared is not None

    def _trace(self, known, kind, shapes, forward, args, kwargs):
        "Output of an unfolded pass, which is traced to make a plan. A new plan is verified on the same input."
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
                back.close()  # the second pass starts from the same random states
                if plan and plan not in self.verified:
                    for m in self.model.modules(): restore_dict(undo, vars(m))
                    self._verify(plan, out, kind, forward, args, kwargs)
            known[shapes] = plan  # not reached after an error or an interrupt
        return out

    def _verify(self, plan, truth, kind, forward, args, kwargs):
        if not numbers_of(truth): return self._disable("gives outputs without numbers, which can't be compared")
        self._prepare(plan)
        try:
            with restore_random_states(): error = relative_error(self.prepared.run(forward, args, kwargs)[0], truth)
        except Exception as e: return self._disable(f"fails with its batch norms folded ({type(e).__name__}: {e})")
        tolerance, eps = self._tolerance(plan, kind)
        if tolerance < error <= HALF_TOLERANCE: tolerance = self._amplified(eps, truth, forward, args, kwargs)
        if error <= tolerance: self.verified.add(plan)
        else: self._disable(f"gives other outputs with its batch norms folded (relative difference {error:.0e})")

    def _amplified(self, eps, truth, forward, args, kwargs) -> float:
        "Error that rounding may cause in the output. 0 if the model fails on a perturbed input or its error is large."
        try:
            with restore_random_states(): args, kwargs = perturb((args, kwargs), eps)
            error = AMPLIFICATION*relative_error(forward(*args, **kwargs), truth)
        except Exception: return 0  # a model that checks its input
        return error if error <= HALF_TOLERANCE else 0

    def _tolerance(self, plan, kind) -> tuple: # Relative error allowed; rounding error of the least exact number
        sources = [t for t in self.prepared.sources if t is not None]
        dtypes = {t.dtype for t in sources if t.is_floating_point()} | {o.dtype for o in plan}
        dtypes |= {o[1] for o in kind if isinstance(o, tuple) and isinstance(o[0], str)}  # autocast's
        precisions = {fp32_precision(d) for d in {t.device for t in sources}}
        limits = [REDUCED_FP32[p] for p in precisions if p in REDUCED_FP32 and torch.float32 in dtypes]
        limits += [(OUTPUT_TOLERANCE.get(t, HALF_TOLERANCE), torch.finfo(t).eps) for t in dtypes]
        return tuple(map(max, zip(*limits)))

    def _disable(self, why):
        self.disabled, self.folded, self.prepared, self.plans = True, 0, None, {}
        warnings.warn(f"FoldBatchNorm: {type(self.model).__name__} {why}. It stays unfolded.", stacklevel=2)


@pickle_as(Callback)
class FoldBatchNorm(Callback):
    """Predict faster, with the same numbers up to rounding. While the Learner evaluates (validation, `validate`,
    `get_preds`, `tta`, `predict`), batch norms are folded into the convolutions before them, and mixed precision casts
    weights only once.

    Only safe pairs are folded, found by tracing one forward pass: a 1-D, 2-D or 3-D convolution whose output is read
    only by one batch norm in eval mode, each used once. The first batch runs twice (users' hooks too), to compare both
    outputs. If they differ by more than 1e-5 (in fp32), it runs again with a rounding error added to its input, to see
    if the model amplifies that as much. A model that gives other outputs when folded, or that later runs its layers in
    another order, stays unfolded, with a warning. Compiled models, TorchScript, and models in `DataParallel` or
    `DistributedDataParallel` stay unfolded. `.found` is the number of batch norms that follow a convolution, and
    `.folded` of these are folded. The model is changed only during its forward pass.

    Changed weights and running statistics are detected, except changes that PyTorch does not count: after
    `p.data.mul_(2)` or the like outside a fit, call `learn.fold_batch_norm.forget()`.

    >>> from fastai.vision.all import *
    >>> dl = DataLoader([(torch.randn(3, 32, 32), torch.tensor(0))]*8, bs=4)
    >>> learn = Learner(DataLoaders(dl, dl), xresnet18(n_out=2), CrossEntropyLossFlat(), cbs=FoldBatchNorm())
    >>> with learn.no_bar(): preds, targs = learn.get_preds()
    >>> learn.fold_batch_norm.folded, learn.fold_batch_norm.found
    (22, 22)"""
    order, _folds, _patch = 11, None, ForwardPatch()  # after mixed precision
    measured = False  # True if `to_fastest(train=False)` added it, so that `to_fastest()` removes it

    def __init__(self):
        super().__init__()
        self._folds = FoldCache()

    @property
    def folded(self):
        "Number of folded batch norms; None before the first batch."
        return self._folds.folded
    @property
    def found(self):
        "Number of batch norms whose input is a convolution's output; None before the first batch."
        return self._folds.found

    @property
    def works(self):
        "True if weights are prepared for the last batch, folded or cast."
        return bool(self._folds.prepared and self._folds.prepared.plan)

    @property
    def ready(self):
        "True if the prepared weights match the model's current ones."
        return self.works and self._folds.prepared.is_current()

    def forget(self):
        "Free the prepared weights. The next batch prepares them again."
        self._folds.prepared = None

    def before_batch(self):
        self.leave()
        if self.training: return self.forget()  # fastai's optimizers step through `p.data`, which PyTorch doesn't count
        if not isinstance(self.model, nn.Module) or not is_eager([self.model]): return
        if self._folds.model is not self.model: self._folds = FoldCache(self.model)
        def _wrap(m, forward): return lambda *args, **kwargs: self._folds.run(forward, args, kwargs)
        self._patch = ForwardPatch([self.model], _wrap)
        self._patch.apply()

    def leave(self):
        "Restore the model's own forward."
        self._patch.undo()
        self._patch = ForwardPatch()  # the old one holds the model

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == 'learn' and value is None: self._folds = FoldCache()  # removed from its Learner
