"A fastai callback that folds batch norms into convolutions for predictions."
from functools import partial

import torch
from fastai.callback.core import Callback
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..core.pickle_as import pickle_as
from .fold_trace import STATISTICS, WEIGHTS, Cast, ForwardTrace, Pair, layer_tensors
from ..core.model_copy import HOOKS, own_dicts
from .prepared_model import NotPrepared, PredictionCallback

__all__ = ['FoldBatchNorm']

ORDER = 'it does not run the same layers for every batch'


def fold(conv, norm, eps, dtype) -> dict: # Tensors of the layers
    "Folded weight and bias, in the dtype and strides that the convolution runs in. Computed in at least fp32."
    wide = torch.promote_types(conv['weight'].dtype, torch.float32)
    def _get(tensors, names): return [tensors[k].to(wide) if k in tensors else None for k in names]
    weight, bias = fuse_conv_bn_weights(*_get(conv, WEIGHTS), *_get(norm, STATISTICS), eps, *_get(norm, WEIGHTS))
    return dict(weight=torch.empty_like(conv['weight'], dtype=dtype).copy_(weight), bias=bias.to(dtype))


class Pairing:
    "Checks that each folded convolution runs once, and that its batch norm gets the output."
    def __init__(self): self.pending = {}

    def mark(self, key, m, args, out):
        if key in self.pending: raise NotPrepared(ORDER)
        self.pending[key] = out

    def skip_norm(self, key, after, input):
        "The rest of a folded batch norm's forward."
        if self.pending.pop(key, None) is not input: raise NotPrepared(ORDER)
        for m in after: input = m(input)
        return input


class FoldedModel:
    "Runs a copy with the folded and cast weights of a plan."
    def __init__(self, copy, plan):
        self.copy, self.pairing = copy, Pairing()
        self.pairs = [(o, layer_tensors(o.conv), layer_tensors(o.norm)) for o in plan if isinstance(o, Pair)]
        self.casts = [(o, layer_tensors(o.module)[o.name]) for o in plan if isinstance(o, Cast)]
        for i, (pair, *_) in enumerate(self.pairs):
            for k in HOOKS: vars(pair.norm)[k].clear()  # casts around a layer that does not compute
            pair.conv.register_forward_hook(partial(self.pairing.mark, i))
            pair.norm.forward = partial(self.pairing.skip_norm, i, pair.after)
        self.refresh()

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self):
        "Compute the weights from those that the user's model has now."
        self.copy.follow()
        for pair, conv, norm in self.pairs: self._set(pair.conv, fold(conv, norm, pair.norm.eps, pair.dtype))
        for o, t in self.casts: self._set(o.module, {o.name: t.to(o.dtype)})
        return True

    def _set(self, m, tensors):
        own_dicts(m)[0].update({k: nn.Parameter(t, requires_grad=False) for k, t in tensors.items()})

    def __call__(self, *args, **kwargs):
        self.pairing.pending.clear()
        out = self.copy.model(*args, **kwargs)
        if self.pairing.pending: raise NotPrepared(ORDER)
        return out


@pickle_as(Callback)
class FoldBatchNorm(PredictionCallback):
    """Predict faster, with the same numbers up to rounding. While the Learner evaluates (validation, `validate`,
    `get_preds`, `tta`, `predict`), batch norms are folded into the convolutions before them, and mixed precision casts
    weights only once.

    Only safe pairs are folded, found by tracing one forward pass: a 1-D, 2-D or 3-D convolution whose output is read
    only by one batch norm in eval mode, each used once. The pass is traced in a private copy, which shares the memory
    of all weights that stay as they are. Its output is compared with the model's: it may differ by 1e-5 in fp32, or by
    what rounding errors of the input cause. `.found` is the number of batch norms that follow a convolution, and
    `.folded` of these are folded. The model itself is never changed.

    The model predicts as without this callback if it can't be copied, changes in each pass, runs its layers in another
    order, has hooks that the copy lacks, or is compiled, scripted or wrapped for several devices. Changed weights,
    running statistics and attributes are detected, except a change through `.data` that leaves 8 elements of each
    tensor, spread over its memory, as they are. Then call `learn.fold_batch_norm.forget()`.

    >>> from fastai.vision.all import *
    >>> dl = DataLoader([(torch.randn(3, 32, 32), torch.tensor(0))]*8, bs=4)
    >>> learn = Learner(DataLoaders(dl, dl), xresnet18(n_out=2), CrossEntropyLossFlat(), cbs=FoldBatchNorm())
    >>> with learn.no_bar(): preds, targs = learn.get_preds()
    >>> learn.fold_batch_norm.folded, learn.fold_batch_norm.found
    (22, 22)"""
    folded = None  # number of folded batch norms; None before the first batch
    found = None   # number of batch norms whose input is a convolution's output; None before the first batch
    differs = 'it gives other outputs with its batch norms folded (relative difference {})'

    @property
    def works(self) -> bool:
        "True if weights are prepared, folded or cast."
        return any(self.work.runs.values())

    @property
    def ready(self) -> bool:
        "True if the prepared weights are in the model's current memory."
        return self.works and self.work.state.same_versions() and self.work.state.same_memory()

    def prepare(self, copy, truth, args, kwargs):
        with ForwardTrace(copy.model) as trace: out = copy.model(*args, **kwargs)  # kept while the plan is made
        plan = trace.plan()
        self.found, self.folded = trace.found, sum(isinstance(o, Pair) for o in plan)
        return FoldedModel(copy, plan) if plan else None

    def refresh(self, run): return run.refresh()

    def refuse(self, reason):
        self.folded = 0
        super().refuse(reason)

    def warn(self, reason):
        if reason.startswith('it '): super().warn(f'{reason.removeprefix("it ")}. It stays unfolded')
