"A fastai callback that folds batch norms into convolutions for predictions."
from fastai.callback.core import Callback

from ..core.model_copy import CantCopy
from ..core.pickle_as import pickle_as
from .prepared_model import NotPrepared, PredictionCallback


@pickle_as(Callback)
class FoldBatchNorm(PredictionCallback):
    """Predict faster, with the same numbers up to rounding. While the Learner evaluates (validation, `validate`,
    `get_preds`, `tta`, `predict`), batch norms are folded into the convolutions before them, and mixed precision casts
    weights only once.

    Only safe pairs are folded, found by tracing one forward pass: a 1-D, 2-D or 3-D convolution whose output is read
    only by one batch norm in eval mode, each used once. The pass is traced in a private copy, which shares the memory
    of all weights that stay as they are. Its output may differ from the model's by 1e-5 in fp32, or by three times what
    rounding causes. `.found` batch norms follow a convolution, and `.folded` of these are folded.

    The model predicts as without this callback if it can't be copied, changes in each pass, runs its layers in another
    order, has hooks that the copy lacks, or is compiled, scripted or wrapped for several devices. Changes of weights,
    statistics and attributes are detected, except one through `.data` that leaves 8 elements of each tensor, spread
    over its memory, as they are. Then call `learn.fold_batch_norm.forget()`.

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
        return self.works and self.work.state.same_memory()

    def prepare(self, copy, truth, args, kwargs):
        from .folded_model import FoldedModel, trace_pass  # needs a private module of PyTorch
        plan, self.found = trace_pass(copy.model, args, kwargs)
        run = FoldedModel(copy, plan) if plan else None
        self.folded = len(run.pairs) if run else 0
        return run

    def refresh(self, run): return run.refresh()

    def reason_of(self, e):
        return str(e) if isinstance(e, (NotPrepared, CantCopy)) else f'it fails with its batch norms folded ({type(e).__name__}: {e})'

    def refuse(self, reason):
        self.folded = 0
        super().refuse(reason)

    def warn(self, reason):
        if reason.startswith('it '): super().warn(f'{reason.removeprefix("it ")}. It stays unfolded')
