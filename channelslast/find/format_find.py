"`Learner.format_find` measures memory formats and precisions; `Learner.to_fastest` switches to the fastest one."
import torch
from fastai.callback.fp16 import AMPMode, NonNativeMixedPrecision
from fastai.callback.mixup import MixHandler
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip
from fastai.learner import Learner
from fastai.torch_core import num_distrib
from fastcore.basics import noop, patch, uniqueify
from fastcore.meta import delegates
from fastprogress.fastprogress import progress_bar

from ..core import devices
from ..core.autocast import DTYPES
from ..core.devices import fit_device, free_memory
from ..core.distributed import broadcast_from_rank0
from ..learner.fused_optimizer import fused_argument, restore_optimizer, use_fused
from ..learner.mixed_precision import check_scaler
from ..learner.preserve_learner import check_model, preserve_learner
from .candidates import FORMATS, PRECISIONS, Candidate, apply_timing, current_setting
from .predict_benchmark import ROUNDS_UNFOLDED, PredictBenchmark
from .results import FormatTimings, label
from .selection import TIE, fastest
from .train_benchmark import TrainBenchmark, load_batches

__all__ = []

MAX_ROUNDS, EXTRA_ROUNDS = 15, 45  # of steps; extra ones while all steps may lie in one slow phase of the machine
STEP_CALLBACKS = GradientAccumulation, GradientClip, MixHandler, BnFreeze  # part of a step, like all that change data
MULTI_DEVICE = 'ParallelTrainer', 'DistributedTrainer'  # by name: importing `fastai.distributed` needs accelerate


def _checked_loader(learn, train, num_it, dl, compile, optimizer):
    "The loader to take batches from. Raises `ValueError` for arguments and Learners that can't be measured."
    if train not in (True, False): raise ValueError(f'train={train!r}: use True or False')
    if compile not in (True, False): raise ValueError(f'compile={compile!r}: use True or False')
    if optimizer not in (True, False): raise ValueError(f'optimizer={optimizer!r}: use True or False')
    if num_it is not None and (not isinstance(num_it, int) or isinstance(num_it, bool) or num_it < 1):
        raise ValueError(f'num_it={num_it!r}: use a whole number of at least 1')
    if learn._grab_cbs(NonNativeMixedPrecision):
        raise ValueError("`NonNativeMixedPrecision` can't be measured: call `learn.to_non_native_fp32()` first.")
    check_model(learn)
    params = list(learn.model.parameters())
    if train and not any(p.requires_grad for p in params):
        raise ValueError('No parameter requires a gradient: there is nothing to train. Call `learn.unfreeze()` first.')
    half = ' and '.join(sorted({str(p.dtype).removeprefix('torch.') for p in params if p.dtype in DTYPES.values()}))
    if half: raise ValueError(f"The model's weights are {half}, not fp32: call `learn.model.float()` first.")
    if train and dl is not None: raise ValueError('dl: pass it only with `train=False`, to say what to predict on')
    if dl is not None and not hasattr(dl, '__iter__'):
        raise ValueError(f'dl={dl!r}: use a DataLoader, such as `learn.dls.test_dl(files, bs=1)`')
    try: return (learn.dls.train if train else learn.dls.valid) if dl is None else dl
    except IndexError:
        raise ValueError("The Learner's DataLoaders hold no loader: create the Learner with one.") from None


def _batches(learn, loader, train) -> tuple:
    "A few batches, and the loader's milliseconds per batch. Raises `ValueError` if they can't be measured."
    batches, loader_ms = load_batches(learn, loader)
    if not batches and train: raise ValueError('The training loader yields no batch: use one with enough items.')
    if not batches:
        raise ValueError('The loader to predict on yields no batch. A Learner from `load_learner` holds no data: '
                         'pass `train=False, dl=learn.dls.test_dl(files, bs=1)`.')
    learn._split(batches[0])
    if train and not len(learn.yb): raise ValueError('The training loader yields no labels: use one that yields them.')
    return batches, loader_ms


def _choices(name, chosen, possible) -> list:
    chosen = list(possible) if chosen is None else [chosen] if isinstance(chosen, str) else list(chosen)
    for o in chosen:
        if o not in possible:
            raise ValueError(f"{name}: {o!r} can't be measured here; choose from {', '.join(map(repr, possible))}")
    return chosen


def _pairs(device, formats, precisions) -> list:
    "Formats and precisions to measure. The baseline, contiguous fp32, is always there and first."
    fast = [p for p in PRECISIONS if p == 'fp32' or devices.autocast_is_fast(device, AMPMode(p))]
    precisions, formats = _choices('precisions', precisions, fast), _choices('formats', formats, FORMATS)
    chosen = [(f, p) for f in FORMATS for p in PRECISIONS if f in formats and p in precisions]
    return uniqueify([('contiguous', 'fp32'), *chosen])


def _frozen(opt) -> tuple:
    "Numbers of frozen and of all weights in the optimizer's groups, which `learn.unfreeze()` would train."
    ps = {p for group in opt.param_lists for p in group}
    return sum(p.numel() for p in ps if not p.requires_grad), sum(p.numel() for p in ps)


def _notes(learn, bs, used, wrapped) -> list:
    "Sentences on how the measured step differs, or may differ, from steps of a later fit."
    notes = []
    if used != bs:
        notes.append(f'Measured on {used} of the {bs} items of each batch: contiguous fp32 has no memory for more.')
    if wrapped: notes.append(f'Measured in one process on one device, without `{wrapped[0]}` and its communication.')
    if fit_device(learn).type == 'cuda' and not torch.backends.cudnn.benchmark:
        notes.append('Measured with `torch.backends.cudnn.benchmark = False`. Measure again if you set it to True: '
                     'cuDNN then chooses other kernels.')
    return notes


def _measure(learn, precisions=None, formats=None, num_it=None, layers=True, train=True, dl=None, compile=False,
             optimizer=True, **scaler) -> tuple: # `FormatTimings`; the best candidate's compiled callback, or None
    "Measure, as documented in `format_find`."
    loader = _checked_loader(learn, train, num_it, dl, compile, optimizer)
    wrapped = [type(o).__name__ for o in learn.cbs if type(o).__name__ in MULTI_DEVICE]  # callbacks that wrap the model
    rounds, extra_rounds = (MAX_ROUNDS, EXTRA_ROUNDS) if num_it is None else (num_it, 0)
    pairs, current = broadcast_from_rank0(_pairs(fit_device(learn), formats, precisions)), current_setting(learn, train)
    current = *current[:3], current[3] and compile  # otherwise it is not measured
    candidates = [Candidate(f, p, scaler) for f, p in pairs]
    n = len(pairs) + len([p for f, p in pairs if layers and f == 'channels_last' and p != 'fp32'])
    steps = n*(1 + rounds) if train else n*(2*(1 + rounds) + ROUNDS_UNFOLDED)  # unfolded and folded
    bar = progress_bar(range(steps), leave=False) if hasattr(learn, 'progress') else None  # `no_bar` removes `progress`
    on_step = (lambda i: bar.update(min(i, steps))) if bar else noop
    on_step(0)
    bs = getattr(loader, 'bs', None) or getattr(loader, 'batch_size', None)
    with preserve_learner(learn, STEP_CALLBACKS if train else (), eager=False, loader=loader) as originals:
        def _make_benchmark():
            batches, loader_ms = _batches(learn, loader, train)
            if train and optimizer: restore_optimizer(learn)  # measure from the Learner's own
            if train and learn.opt is None: learn.create_opt()
            if train: learn.opt.set_hypers(lr=0.) # keeps the weights the same for every candidate
            learn.n_iter = steps
            benchmark = TrainBenchmark if train else PredictBenchmark
            return benchmark(learn, candidates, batches, originals, on_step, bs), loader_ms
        with torch.set_grad_enabled(train):
            benchmark, loader_ms = candidates[0].run_or_eliminate(learn, _make_benchmark)
            frozen, advice = (_frozen(learn.opt), fused_argument(learn)) if train else (None, None)
            benchmark.warm_up(candidates)
            layer_timings = benchmark.add_mixed_precisions(scaler) if layers else []
            benchmark.check_numbers()
            if train: benchmark.time_optimizer(optimizer and advice is not None)
            else: benchmark.add_folded(scaler)
            if compile and not wrapped: benchmark.add_compiled(scaler)
            decision, note = benchmark.run(rounds, current, extra_rounds), ''
            if train and decision.best.compiled: decision, note = benchmark.reject_unearned(decision, current, loader)
            if compile and wrapped: note = f'The model stays uncompiled, because `{wrapped[0]}` wraps it.'
            memory_gain = benchmark.time_kept_memory(decision.best)
    rows = {c: c.timing(fastest(benchmark.own_ms or candidates[0].ms)) for c in candidates}
    result = FormatTimings(rows.values(), rows[decision.best], max(TIE, decision.max_gain), loader_ms, layer_timings,
                           rows.get(decision.rival), benchmark.optimizer_ms, advice, train, frozen,
                           [*filter(None, [note]), *_notes(learn, bs, benchmark.bs, wrapped)], benchmark.fused_ms,
                           benchmark.fused is not None, memory_gain, current)
    best = candidates[broadcast_from_rank0(candidates.index(decision.best))]
    compiled = best.compile  # for the Learner: it is not compiled again
    # free batches and folded weights
    best = benchmark = candidates = rows = decision = originals = _make_benchmark = None
    free_memory(fit_device(learn))
    result.__dict__.update(broadcast_from_rank0(vars(result)))
    if bar: bar.on_iter_end()
    return result, compiled


@patch
@delegates(torch.amp.GradScaler, but=['device'])
def format_find(self:Learner,
    precisions=None, # Some of `'fp32'`, `'fp16'`, `'bf16'`; None: fp32 and those that are fast on the device
    formats=None, # Some of `'contiguous'`, `'channels_last'`; None: both
    num_it:int=None, # Maximum timed steps per candidate; None: 15, or up to 60 if all steps are very short
    show_plot:bool=True, # Draw the chart?
    layers:bool=True, # Also measure single layers, and try to keep in fp32 those that half precision slows down?
    train:bool=True, # Measure training steps? False: predictions, as `get_preds` makes them
    dl=None, # Data to predict on, in batches of the size you will use; None: the validation loader
    compile:bool=False, # Also measure with the model compiled by `torch.compile`? Each compilation takes up to minutes
    optimizer:bool=True, # Also measure the fused step of the same optimizer (`fused`)? Training only
    **kwargs
) -> FormatTimings:
    """Measure a training step, or predictions with `train=False`, in each memory format and precision. The Learner
    stays bit for bit unchanged.

    The steps are the Learner's own (its loss, optimizer, gradient clipping and accumulation, MixUp), at learning rate
    0, on a few batches kept on the device. Candidates take turns, and the fastest step of each one counts, since other
    work on the machine only adds time. Candidates that can no longer win are dropped. Measuring stops when the choice
    is certain, or when the possible gain is not worth the time. The current setting is replaced only by one that is
    clearly faster (contiguous fp32 counts as current if that is not measured). Steps that the gradient scaler skips are
    repeated. The loader is timed separately. On a CPU the optimizer is, too, and its time is added to each step.

    If the fused step of the same optimizer (`fused`) makes the step clearly faster, all candidates are measured with
    it. Speedups are over contiguous fp32 with the Learner's own optimizer. On Linux, the steps of the fastest candidate
    on a CPU are also measured with `keep_memory()`, unless it is in use.

    Each candidate's loss, results and gradients are compared with contiguous fp32, which is always measured, and is
    replayed with the candidate's activations. A candidate is eliminated if its numbers differ by more than rounding
    explains or are not finite, or if a metric fails that works in contiguous fp32. With `layers`, each distinct
    convolution and linear layer is timed alone in half precision and in fp32. One more candidate per half precision
    (`'bf16+fp32'`) keeps in fp32 those that are clearly faster there.

    Predictions are made in eval mode without gradients on batches of `dl`, whose size affects which candidate is
    fastest. Candidates that are not far behind after two rounds are also measured with folded batch norms
    (`FoldBatchNorm`). All outputs are compared with contiguous fp32.

    `compile=True` also measures candidates with the model compiled by `torch.compile`. A compilation takes seconds to
    minutes and needs a C++ compiler (on GPUs Triton). Candidates that keep layers in fp32 are not compiled, nor are
    models that are wrapped for several devices. If a model can't be compiled, the candidate's `note` gives the reason.

    - Predictions (`CompilePredictions`): the fastest candidate of each precision, so at most three compilations.
    - Training (`CompileTraining`): the fastest candidate, compiled twice: once to compare its loss and gradients with
      those of the same candidate uncompiled, once to train. It is chosen only if an epoch of the training loader earns
      the second compilation back. If not, the result's `notes` say how many batches would.

    Callbacks that change the batch, predictions or loss take part; those that log, save, stop or draw are left out.
    Communication between GPUs is left out too: each process computes on one device. In a distributed run, rank 0's
    result holds for all, and a candidate that fails in one process is eliminated in all.

    Costs about `1 + num_it` steps per candidate (predictions: folded and unfolded), two or three forward and backward
    passes per candidate, memory for one more copy of the model and the optimizer's state, and main memory for one
    pass's activations. If contiguous fp32 runs out of memory, all candidates are measured on half of each batch or
    less, and the result's `notes` say so.

    Other arguments are those of `torch.amp.GradScaler`, for fp16. Raises `ValueError` for invalid arguments, a model
    that can't train or has half-precision weights, and a loader without batches or labels. Errors in contiguous fp32
    are raised; an error in another candidate becomes its `note`.

    >>> from fastai.vision.all import *
    >>> dl = DataLoader([(torch.randn(3, 32, 32), torch.tensor(0))]*8, bs=4)
    >>> learn = Learner(DataLoaders(dl, dl), xresnet18(n_out=2), CrossEntropyLossFlat())
    >>> with learn.no_bar(): t = learn.format_find(precisions='fp32', num_it=1, show_plot=False)
    >>> [r.memory_format for r in t.rows]
    ['contiguous', 'channels_last']"""
    check_scaler(Learner.format_find, kwargs)
    result, _ = _measure(self, precisions, formats, num_it, layers, train, dl, compile, optimizer, **kwargs)
    if show_plot: result.plot()
    return result


@patch
@delegates(Learner.format_find)
def to_fastest(self:Learner, *,
    show_plot:bool=False, # Draw the chart?
    **kwargs
):
    """Measure with `format_find`, switch to the fastest setting, print it in one line, and return the Learner.

    With `train=False` this is the fastest setting for predictions, with `FoldBatchNorm` if that is part of it. A later
    call for training replaces this setting and removes that `FoldBatchNorm`, and vice versa. In an app, call `learn =
    load_learner('export.pkl')`, then `learn.to_fastest(train=False, dl=learn.dls.test_dl(files, bs=1))`, then
    `predict`.

    For training, the Learner gets the fused step of its own optimizer if that made the step clearly faster. State,
    groups and hyperparameters are kept. `to_contiguous(to_fp32=True)` restores the optimizer, as does a later call for
    training in which the fused step gains nothing. `optimizer=False` leaves the optimizer alone.

    With `compile=True`, the Learner gets `CompilePredictions` or `CompileTraining` if that was chosen. The measured
    code is used: nothing is compiled again until the format, the precision, frozen layers or, for predictions, weights
    change. Only batches of the measured shape run compiled. A later call for training removes both callbacks if
    `to_fastest` added them; a later call for predictions removes `CompilePredictions`. `to_contiguous(to_fp32=True)`
    removes both.

    The measurements are kept in `learn.format_timings`. In a distributed run, call it inside `learn.distrib_ctx()`, so
    that all processes take rank 0's choice; outside, each would make its own, so it raises `ValueError`.

    >>> from fastai.vision.all import *
    >>> dl = DataLoader([(torch.randn(3, 32, 32), torch.tensor(0))]*8, bs=4)
    >>> learn = Learner(DataLoaders(dl, dl), xresnet18(n_out=2), CrossEntropyLossFlat())
    >>> with learn.no_bar(): learn = learn.to_fastest(precisions='fp32', num_it=1) # doctest: +ELLIPSIS
    Training in ... as fast as contiguous fp32..."""
    check_scaler(Learner.to_fastest, kwargs)
    if num_distrib() > 1 and not torch.distributed.is_initialized():
        raise ValueError('to_fastest(): each process would choose on its own; call it in `with learn.distrib_ctx():`')
    timings, compiled = _measure(self, **kwargs)
    if show_plot: timings.plot()
    own = 'precisions', 'formats', 'num_it', 'layers', 'train', 'dl', 'compile', 'optimizer'
    scaler = {k: v for k, v in kwargs.items() if k not in own}
    apply_timing(self, timings.best, timings.layers, compiled, kwargs.get('compile', False), **scaler)
    if timings.train and kwargs.get('optimizer', True): (use_fused if timings.fused else restore_optimizer)(self)
    self.format_timings = timings
    task, best = 'Training' if timings.train else 'Predictions', timings.best
    step = f", with {timings.advice.removeprefix('opt_func=')}" if timings.fused else ''
    own = ' with the plain optimizer' if timings.fused else ''
    speed = f'{task} in {label(best)}{step}: {best.speedup:.2f}× as fast as contiguous fp32{own}.'
    print(' '.join(filter(None, [speed, timings.memory_hint, timings.frozen_hint])))
    return self
