"`Learner.format_find` and `Learner.to_fastest`: measure, and switch to, the fastest memory format and precision."
import torch
from fastai.callback.fp16 import AMPMode, NonNativeMixedPrecision
from fastai.callback.mixup import MixHandler
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip
from fastai.learner import Learner
from fastai.torch_core import num_distrib
from fastcore.basics import noop, patch
from fastcore.meta import delegates
from fastprogress.fastprogress import progress_bar

from ..core import devices
from ..core.autocast import DTYPES
from ..core.devices import fit_device, free_memory
from ..core.distributed import broadcast_from_rank0
from ..learner.fused_optimizer import fused_argument
from ..learner.mixed_precision import check_scaler
from ..learner.preserve_learner import check_model, preserve_learner
from .candidates import FORMATS, PRECISIONS, Candidate, apply_timing, current_setting
from .predict_benchmark import ROUNDS_UNFOLDED, PredictBenchmark
from .results import FormatTimings, label
from .selection import TIE, fastest
from .train_benchmark import TrainBenchmark, load_batches

__all__ = []

ROUNDS, MORE = 15, 45  # of steps; more only where these take less than one slow phase of the machine

SEVERAL = 'ParallelTrainer', 'DistributedTrainer'  # left out; `fastai.distributed` imports only beside accelerate
# callbacks whose work is part of each step, beside those that change its numbers
STEP_CALLBACKS = GradientAccumulation, GradientClip, MixHandler, BnFreeze


def _check(learn, train):
    "`ValueError` for a Learner that can't be measured, with what to do."
    if learn._grab_cbs(NonNativeMixedPrecision):
        raise ValueError('The Learner has `NonNativeMixedPrecision`: call `learn.to_non_native_fp32()` first.')
    check_model(learn)
    params = list(learn.model.parameters())
    if train and not any(p.requires_grad for p in params):
        raise ValueError("No parameter of the model requires a gradient: there is nothing to train. "
                         "`learn.unfreeze()` first.")
    if half := {str(p.dtype).removeprefix('torch.') for p in params if p.dtype in DTYPES.values()}:
        raise ValueError(f"The model's weights are {' and '.join(sorted(half))}: mixed precision keeps them in fp32. "
                         "`learn.model.float()` first.")


def _loader(learn, train, dl):
    "Whose batches to measure on; `ValueError` where there is none."
    if train not in (True, False): raise ValueError(f'train={train!r}: use True or False')
    if train and dl is not None: raise ValueError('dl: what to predict, so only with `train=False`')
    if dl is not None and not hasattr(dl, '__iter__'):
        raise ValueError(f'dl={dl!r}: use a DataLoader, as `learn.dls.test_dl(files, bs=1)` makes one')
    try: return (learn.dls.train if train else learn.dls.valid) if dl is None else dl
    except IndexError:
        raise ValueError("The Learner's DataLoaders hold no loader: there is nothing to run on.") from None


def _batches(learn, loader, train) -> tuple:
    "A few batches, and what the loader takes for one; `ValueError` where there is nothing to measure on."
    batches, loader_ms = load_batches(learn, loader)
    if not batches and train:
        raise ValueError("The Learner's training loader yields no batch: there is nothing to measure on.")
    if not batches:
        raise ValueError("There is nothing to predict: the loader yields no batch. A Learner from `load_learner` holds "
                         "no data; say what it shall predict: `learn.to_fastest(train=False, "
                         "dl=learn.dls.test_dl(files, bs=1))`.")
    learn._split(batches[0])
    if train and not len(learn.yb):
        raise ValueError("The Learner's training loader yields no labels: there is nothing to train.")
    return batches, loader_ms


def _asked(name, asked, possible) -> list:
    asked = list(possible) if asked is None else [asked] if isinstance(asked, str) else list(asked)
    for o in asked:
        if o not in possible:
            raise ValueError(f"{name}: {o!r} can't be measured here; choose from {', '.join(map(repr, possible))}")
    return asked


def _pairs(device, formats, precisions) -> list:
    "The formats and precisions to measure: contiguous fp32, the baseline, always and first."
    fast = [p for p in PRECISIONS if p == 'fp32' or devices.autocast_is_fast(device, AMPMode(p))]
    precisions, formats = _asked('precisions', precisions, fast), _asked('formats', formats, FORMATS)
    asked = [(f, p) for f in FORMATS for p in PRECISIONS if f in formats and p in precisions]
    return list(dict.fromkeys([('contiguous', 'fp32'), *asked]))


def _frozen(opt) -> tuple:
    "Numbers of frozen weights and of all in the optimizer's groups, which are those that `learn.unfreeze()` reaches."
    ps = {p for group in opt.param_lists for p in group}
    return sum(p.numel() for p in ps if not p.requires_grad), sum(p.numel() for p in ps)


def _notes(learn, bs, used) -> list:
    "Sentences on conditions in which the measured step differs, or may differ, from those of a later fit."
    notes, cudnn = [], torch.backends.cudnn
    if used != bs:
        notes.append(f'Measured on {used} of the {bs} items of each batch: contiguous fp32 has no memory for more.')
    if several := [type(o).__name__ for o in learn.cbs if type(o).__name__ in SEVERAL]:
        notes.append(f'Measured in one process on one device, without `{several[0]}` and its communication.')
    if fit_device(learn).type == 'cuda' and not cudnn.benchmark:
        notes.append('Measured with `torch.backends.cudnn.benchmark = False`: measure again if you set it to True, '
                     'since cuDNN then chooses other kernels.')
    return notes


def _result(candidates, decision, **measured) -> FormatTimings:
    "What was measured, as users see it."
    base = fastest(candidates[0].ms)
    rows = {c: c.timing(base) for c in candidates}
    return FormatTimings(rows.values(), rows[decision.best], max(TIE, decision.by), rival=rows.get(decision.rival),
                         **measured)


@patch
@delegates(torch.amp.GradScaler, but=['device'])
def format_find(self:Learner,
    precisions=None, # Some of `'fp32'`, `'fp16'`, `'bf16'`; None: fp32 and what the device accelerates
    formats=None, # Some of `'contiguous'`, `'channels_last'`; None: both
    num_it:int=None, # Maximum timed steps per candidate; None: 15, or up to 60 where all steps are very short
    show_plot:bool=True, # Draw the chart?
    layers:bool=True, # Measure single layers too, and try to keep in fp32 those that half precision slows down?
    train:bool=True, # Measure training steps? Else predictions, as `get_preds` makes them
    dl=None, # What to predict, in batches of the size that counts; None: the validation loader
    **kwargs
) -> FormatTimings:
    """Mock-train (or, with `train=False`, predict) in each memory format and precision and measure a step of each; the
    Learner is left bit for bit as it was.

    Steps are the Learner's own (its loss, optimizer, gradient clipping and accumulation, MixUp; learning rate 0), on a
    few batches kept on the device, interleaved; of each candidate the fastest counts, since whatever else the machine
    does only adds time. Who cannot win any more stops early; all stop when the choice is sure, or when what may still
    be gained is not worth the time. What the Learner has (contiguous fp32, if that is not measured) is left only for
    what is clearly faster. The loader is timed apart; on a CPU the optimizer too, once, since it does the same in each
    format, and its time is added.
    Each candidate's loss, results and gradients are compared with contiguous fp32, which is always measured and is
    replayed with the candidate's activations: differences beyond rounding put a candidate out, as do infinity, NaN, and
    a metric that fails. Callbacks that change batch, predictions or loss take part; those that log, save, stop or draw
    are left out. Takes at most `(1 + num_it) × candidates` steps and two or three forward and backward passes each, and
    the memory of one more copy of the model and the optimizer's state, and in main memory of one pass's activations.
    A step that the gradient scaler skips is taken again. Where contiguous fp32 runs out of memory, all candidates are
    measured on half of each batch, or less, and `.notes` of the result says so. One process computes on one device: the
    communication of several GPUs is not part of a step.
    With `layers`, each distinct convolution and linear layer is timed alone in half and in fp32, and one candidate more
    per half precision keeps in fp32 those that are clearly faster there: its precision reads `'bf16+fp32'`.

    Predictions are made in eval mode, without gradients, on batches of `dl`; which candidate is the fastest depends on
    their size. They are measured with batch norms folded too (`FoldBatchNorm`), where two rounds more show that a
    format is not far behind, and all outputs are compared with contiguous fp32.

    Other arguments are those of `torch.amp.GradScaler`, for fp16. In a distributed run, rank 0's result holds for all,
    and a candidate that fails in one process is out in all.
    Raises `ValueError` for arguments that can't be, a model that can't train or whose weights are in half precision, an
    empty loader, or a loader without labels; an error in contiguous fp32 is raised as it is, in any other candidate it
    is its `note`."""
    check_scaler(**kwargs)
    rounds, more = (ROUNDS, MORE) if num_it is None else (num_it, 0)
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise ValueError(f'num_it={num_it!r}: use a whole number from 1')
    _check(self, train)
    loader = _loader(self, train, dl)
    pairs, incumbent = broadcast_from_rank0(_pairs(fit_device(self), formats, precisions)), current_setting(self)
    candidates, advice = [Candidate(f, p, kwargs) for f, p in pairs], fused_argument(self) if train else None
    tuned = [p for f, p in pairs if layers and f == 'channels_last' and p != 'fp32']
    n = len(pairs) + len(tuned)
    steps = n*(1 + rounds) if train else n*(2*(1 + rounds) + ROUNDS_UNFOLDED)  # as they are, and folded
    bar = progress_bar(range(steps), leave=False) if hasattr(self, 'progress') else None  # `no_bar` takes it away
    on_step = (lambda i: bar.update(min(i, steps))) if bar else noop
    on_step(0)
    bs = getattr(loader, 'bs', None) or getattr(loader, 'batch_size', None)
    with preserve_learner(self, STEP_CALLBACKS if train else (), eager=False, loader=loader) as originals:
        def _set_up():
            batches, loader_ms = _batches(self, loader, train)
            if train and self.opt is None: self.create_opt()
            if train: self.opt.set_hypers(lr=0.) # weights stay, so that every candidate steps on the same ones
            self.n_iter = steps
            return (TrainBenchmark if train else PredictBenchmark)(self, candidates, batches, originals, on_step, bs), loader_ms
        with torch.set_grad_enabled(train):
            trial, loader_ms = candidates[0].run_or_eliminate(self, _set_up)
            frozen = _frozen(self.opt) if train else None
            trial.warm_up(candidates)
            layer_rows = trial.add_mixed_precisions(kwargs) if layers else []
            trial.check_numbers()
            if train: trial.time_optimizer()
            else: trial.add_folded(kwargs)
            decision = trial.run(rounds, incumbent if not train else (*incumbent[:2], False), more)
    result = _result(candidates, decision, loader_ms=loader_ms, layers=layer_rows,
                     optimizer_ms=trial.optimizer_ms, advice=advice, train=train, frozen=frozen,
                     notes=_notes(self, bs, trial.bs))
    del trial, candidates, decision, originals, _set_up  # which hold batches and folded weights
    free_memory(fit_device(self))
    result.__dict__.update(broadcast_from_rank0(vars(result)))
    if bar: bar.on_iter_end()
    if show_plot: result.plot()
    return result


@patch
@delegates(Learner.format_find)
def to_fastest(self:Learner, *,
    show_plot:bool=False, # Draw the chart?
    **kwargs
):
    """Measure with `format_find`, switch the Learner to the winner, say it in one line; returns the Learner.

    With `train=False` it is the fastest for predictions, with `FoldBatchNorm` if that is part of it; a later call for
    training undoes that, and the other way round. For an app: `learn = load_learner('export.pkl')`, then
    `learn.to_fastest(train=False, dl=learn.dls.test_dl(files, bs=1))`, then `predict`.

    The measurements stay in `learn.format_timings`. In a distributed run call it inside `learn.distrib_ctx()`, where
    all processes take rank 0's choice; `ValueError` outside, where each would make its own."""
    if num_distrib() > 1 and not torch.distributed.is_initialized():
        raise ValueError("Each process would decide for itself: call it inside `with learn.distrib_ctx():`, where rank "
                         "0 decides for all.")
    timings = self.format_find(show_plot=show_plot, **kwargs)
    own = 'precisions', 'formats', 'num_it', 'layers', 'train', 'dl'
    scaler = {k: v for k, v in kwargs.items() if k not in own}
    apply_timing(self, timings.best, timings.layers, **scaler)
    self.format_timings = timings
    what = 'Training' if timings.train else 'Predictions'
    said = f'{what} in {label(timings.best)}: {timings.best.speedup:.2f}× contiguous fp32'
    print('. '.join(filter(None, [said, timings.frozen_hint])))
    return self
