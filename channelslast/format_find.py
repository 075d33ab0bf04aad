"`Learner.format_find` and `Learner.to_fastest`: measure, and switch to, the fastest memory format and precision."
import math
import statistics
import time
from itertools import islice

import torch
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.fp16 import AMPMode, MixedPrecision, NonNativeMixedPrecision
from fastai.callback.channelslast import ChannelsLast as _FastaiChannelsLast
from fastai.callback.mixup import MixHandler
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip
from fastai.learner import Learner
from fastai.torch_core import num_distrib
from fastcore.basics import noop, patch
from fastcore.foundation import L
from fastcore.meta import delegates
from fastprogress.fastprogress import progress_bar
from torch.utils._pytree import tree_leaves

from . import precision as _precision
from .callback import ChannelsLast
from .memory_format import align_optimizer, cast_module
from .layers import fp32_names, record_inputs, time_layers
from .precision import DTYPES, DeviceMixedPrecision, check_scaler, elapsed_ms, fit_device, synchronize, unwrapped
from .timings import FormatTimings, Timing, choose, label, noise_margin
from .untouched import TAKE_PART, check_model, untouched

FORMATS, PRECISIONS = ('contiguous', 'channels_last'), ('fp32', 'fp16', 'bf16')
WARM_UP, BATCHES, LOADER_BATCHES = 3, 4, 8
HOPELESS = 1.5  # times the fastest after three rounds: not measured further

# callbacks whose work is part of each step
STEP_CALLBACKS = *TAKE_PART, GradientAccumulation, GradientClip, MixHandler, BnFreeze

# Relative differences of (loss, gradients) from contiguous fp32 beyond which a candidate's numbers are wrong
TOLERANCE = dict(fp32=(1e-3, 5e-2), fp16=(2e-2, 0.4), bf16=(5e-2, 0.8))


def step_ms(learn, batch) -> float:
    "Milliseconds of one training step of the Learner."
    return elapsed_ms(fit_device(learn), lambda: learn.one_batch(0, batch))


class _Candidate:
    "A format and precision, with the callbacks that make it, and what was measured of it."
    def __init__(self, memory_format, precision, scaler, fp32_layers=()):
        self.memory_format, self.precision, self.half = memory_format, precision + '+fp32'*bool(fp32_layers), precision
        self.last, self.baseline = memory_format == 'channels_last', (memory_format, precision) == ('contiguous', 'fp32')
        self.cbs = [ChannelsLast()]*self.last
        if precision != 'fp32': self.cbs.append(DeviceMixedPrecision(precision, fp32_layers, **(scaler if precision == 'fp16' else {})))
        self.ms, self.note, self.running, self.valid, self.scaler = [], '', True, True, None
        self.loss_diff = self.grad_diff = self.memory = None

    def out(self, note, valid=False): self.note, self.running, self.valid = '; '.join(filter(None, [self.note, note])), False, valid

    def switch(self, learn, cbs):
        "Make the Learner, inside `untouched`, train in this format and precision."
        learn.cbs = L(*cbs, *self.cbs)
        for cb in self.cbs: cb.learn = learn
        cast_module(learn.model, self.last)
        align_optimizer(learn.opt)
        if self.scaler is None:
            for cb in self.cbs: cb('before_fit')
            self.scaler = False if self.precision == 'fp32' else learn.scaler
        learn.scaler = self.scaler

    def attempt(self, learn, f):
        "`f()`; an error is the user's own for contiguous fp32, the end of any other candidate."
        try: return f()
        except Exception as e:
            if self.baseline: raise
            oom = isinstance(e, torch.OutOfMemoryError) or 'out of memory' in str(e)
            self.out('out of memory' if oom else f'{type(e).__name__}: {(str(e).strip() or "no message").splitlines()[-1].strip()[:100]}')
        learn.model.zero_grad(set_to_none=True)  # outside the handler: its traceback holds the step's tensors
        if torch.cuda.is_available(): torch.cuda.empty_cache()

    def timing(self, base):
        ms = statistics.median(self.ms) if self.ms else None
        return Timing(self.memory_format, self.precision, ms, ms and base/ms, self.loss_diff, self.grad_diff, self.memory,
                      self.note, bool(self.ms) and self.valid)


class _Backward(Callback):
    "Stop each batch before the optimizer."
    order = -1000
    def before_step(self): raise CancelBatchException


def _stop(learn):
    cb = _Backward()
    cb.learn = learn
    return cb


def _loss_and_grads(learn, batch):
    "Loss and gradients of one batch in eval mode, in fp32, unscaled."
    scaler = learn.scaler or None
    scale = scaler.get_scale() if scaler and scaler.is_enabled() else 1.
    while True:
        torch.manual_seed(0)
        learn.model.zero_grad(set_to_none=True)
        learn.one_batch(0, batch)
        grads = [None if p.grad is None else p.grad.detach().float()/scale for p in learn.model.parameters()]
        if scale <= 1 or all(g is None or g.isfinite().all() for g in grads): return learn.loss.detach().float().mean().item(), grads
        scale /= 16  # too large for fp16: what training, too, would find out
        scaler._scale.fill_(scale)


def _check_numbers(learn, candidates, cbs, batch):
    "Fill `loss_diff` and `grad_diff`, and drop whoever is outside its tolerance."
    cbs = [o for o in cbs if isinstance(o, TAKE_PART)]
    stop = _stop(learn)
    learn.model.eval()
    reference = None
    for c in candidates:
        if not c.running: continue
        c.switch(learn, [stop, *cbs])
        found = c.attempt(learn, lambda: _loss_and_grads(learn, batch))
        if found is None: continue
        if reference is None: reference = found  # contiguous fp32 comes first
        (loss, grads), (loss0, grads0) = found, reference
        pairs = [(a, b) for a, b in zip(grads, grads0) if b is not None]
        off = math.sqrt(sum((b if a is None else a - b).double().square().sum().item() for a, b in pairs))
        norm = math.sqrt(sum(b.double().square().sum().item() for _, b in pairs))
        c.loss_diff, c.grad_diff = abs(loss - loss0)/(abs(loss0) or 1), off/(norm or 1)
        most_loss, most_grad = TOLERANCE[c.half]
        if c.baseline: continue
        if not math.isfinite(loss): c.out('loss is not finite')
        elif not (c.loss_diff <= most_loss and c.grad_diff <= most_grad): c.out('numbers differ from contiguous fp32')
    learn.model.zero_grad(set_to_none=True)
    learn('before_train')


def _load_batches(learn) -> tuple:
    "A few batches on the device, and the median milliseconds that the loader takes for one."
    device, batches, ms = fit_device(learn), [], []
    start = time.perf_counter()
    for b in islice(learn.dls.train, LOADER_BATCHES):
        synchronize(device)
        ms.append((time.perf_counter() - start)*1e3)
        if len(batches) < BATCHES: batches.append(learn._set_device(b))
        start = time.perf_counter()
    if not batches: raise ValueError("The Learner's training loader yields no batch: there is nothing to measure on.")
    learn._split(batches[0])
    if not len(learn.yb): raise ValueError("The Learner's training loader yields no labels: there is nothing to train.")
    return batches, statistics.median(ms[1:] or ms)  # the first one starts the workers


def _heal(learn, originals, stepped):
    "Put the original values into weights, buffers and optimizer state: a step may have filled them with NaN."
    with torch.no_grad():
        for t, data in originals: t.copy_(data)
    if not stepped: learn.opt.clear_state()  # it had none before this
    learn.model.zero_grad(set_to_none=True)


def _measure(learn, candidates, batches, num_it, tick, originals, tune, scaler) -> list:
    "Time all candidates, interleaved; with `tune`, adds those that keep some layers in fp32. Returns the layers' times."
    cbs = [o for o in learn.cbs if not isinstance(o, (_FastaiChannelsLast, MixedPrecision))]
    device, cuda = fit_device(learn), fit_device(learn).type == 'cuda'
    state = tree_leaves(list(getattr(learn.opt, 'opt', learn.opt).state.values()))
    done, sound, stepped = 0, True, any(isinstance(t, torch.Tensor) for t in state)
    def _step(c, i):
        nonlocal done, sound
        if cuda: torch.cuda.reset_peak_memory_stats(device)
        ms = step_ms(learn, batches[i % len(batches)])
        if cuda: c.memory = max(c.memory or 0, torch.cuda.max_memory_allocated(device)/2**20)
        tick(done := done + 1)
        finite = bool(learn.loss.isfinite().all())
        if c.baseline: sound = finite # else the user's own numbers are such
        elif sound and not finite:
            c.out('loss is not finite')
            _heal(learn, originals, stepped)
        return ms
    learn.cbs = L(cbs)
    learn('before_fit'); learn('before_epoch'); learn('before_train')
    def _warm_up(cs):
        for c in cs: c.attempt(learn, lambda: (c.switch(learn, cbs), [_step(c, i) for i in range(WARM_UP) if c.running]))
        learn.cbs = L(cbs)
    _warm_up(candidates)
    layers = []
    for c in [c for c in candidates if tune and c.running and c.last and c.precision != 'fp32']:
        rows, mixed = _mixed(learn, c, cbs, batches[0], scaler)
        layers += rows
        if mixed:
            candidates.append(mixed)
            _warm_up([mixed])
    # uncompiled: each eval-mode variant would be one more recompilation, and those are limited
    with torch.compiler.set_stance('force_eager'): _check_numbers(learn, candidates, cbs, batches[0])
    for i in range(num_it):
        # there and back, so that drift hits all alike and the format changes once a round
        for c in candidates[::-1] if i % 2 else candidates:
            if not c.running: continue
            ms = c.attempt(learn, lambda: (c.switch(learn, cbs), _step(c, i))[1])
            if c.running: c.ms.append(ms)
        if i == 2:
            best = min(statistics.median(c.ms) for c in candidates if c.running)
            for c in candidates:
                if c.running and not c.baseline and statistics.median(c.ms) > HOPELESS*best:
                    c.out(f'dropped after {len(c.ms)} steps: far slower', valid=True)
    return layers


def _mixed(learn, c, cbs, batch, scaler) -> tuple:
    "What each layer takes in the half precision of `c` and in fp32, and the candidate that follows, if any layer is to stay."
    c.switch(learn, [_stop(learn), *cbs])
    model = unwrapped(learn.model)
    inputs = c.attempt(learn, lambda: record_inputs(model, lambda: learn.one_batch(0, batch))) or {}
    rows = time_layers(model, inputs, DTYPES[AMPMode(c.half)], c.half)
    names = fp32_names(rows, c.half)
    if not names: return rows, None
    mixed = _Candidate('channels_last', c.half, scaler, names)
    mixed.note = f'{len(names)} of {sum(len(r.names) for r in rows)} layers in fp32'
    return rows, mixed


def _current(learn) -> tuple:
    "Memory format and precision that the Learner trains in now."
    mp = next(iter(learn._grab_cbs(MixedPrecision)), None)
    device = fit_device(learn).type
    fast = mp and (isinstance(mp, DeviceMixedPrecision) or device == 'cuda') and _precision.accelerates(device, mp.amp_mode)
    tuned = '+fp32'*bool(getattr(mp, 'fp32_layers', ()))
    return FORMATS[bool(learn._grab_cbs(_FastaiChannelsLast))], mp.amp_mode.value + tuned if fast else 'fp32'


def _asked(name, asked, possible) -> list:
    asked = list(possible) if asked is None else [asked] if isinstance(asked, str) else list(asked)
    for o in asked:
        if o not in possible: raise ValueError(f"{name}: {o!r} can't be measured here; choose from {', '.join(map(repr, possible))}")
    return asked


@patch
@delegates(torch.amp.GradScaler, but=['device'])
def format_find(self:Learner,
    precisions=None, # Some of `'fp32'`, `'fp16'`, `'bf16'`; None: fp32 and what the device accelerates
    formats=None, # Some of `'contiguous'`, `'channels_last'`; None: both
    num_it:int=10, # Timed steps a candidate
    show_plot:bool=True, # Draw the chart?
    layers:bool=True, # Measure single layers too, and try to keep in fp32 those that half precision slows down?
    **kwargs
) -> FormatTimings:
    """Mock-train in each memory format and precision and measure a step of each; the Learner is left bit for bit as it was.

    Steps are the Learner's own (its loss, optimizer, gradient clipping and accumulation, MixUp; learning rate 0), on a few
    batches kept on the device, interleaved; the loader is timed apart. Each candidate's loss and gradients are compared
    with contiguous fp32, which is always measured. Takes at most `(3 + num_it) × candidates` steps and a forward and
    backward pass each, and the memory of one more copy of the model and the optimizer's state. With `layers`, each distinct
    convolution and linear layer is timed alone in half and in fp32, and one candidate more per half precision keeps in fp32
    those that are clearly faster there: its precision reads `'bf16+fp32'`.

    Other arguments are those of `torch.amp.GradScaler`, for fp16. In a distributed run, rank 0's result holds for all.
    Raises `ValueError` for arguments that can't be, a model that can't train or whose weights are in half precision, an
    empty loader, or a loader without labels; an error in contiguous
    fp32 is raised as it is, in any other candidate it is its `note`."""
    check_scaler(**kwargs)
    if not isinstance(num_it, int) or isinstance(num_it, bool) or num_it < 1: raise ValueError(f'num_it={num_it!r}: use a whole number from 1')
    if self._grab_cbs(NonNativeMixedPrecision):
        raise ValueError('The Learner has `NonNativeMixedPrecision`: call `learn.to_non_native_fp32()` first.')
    check_model(self)
    if not any(p.requires_grad for p in self.model.parameters()):
        raise ValueError("No parameter of the model requires a gradient: there is nothing to train. `learn.unfreeze()` first.")
    if half := {str(p.dtype).removeprefix('torch.') for p in self.model.parameters() if p.dtype in DTYPES.values()}:
        raise ValueError(f"The model's weights are {' and '.join(sorted(half))}: mixed precision keeps them in fp32. `learn.model.float()` first.")
    device = fit_device(self)
    fast = [p for p in PRECISIONS if p == 'fp32' or _precision.accelerates(device.type, AMPMode(p))]
    precisions, formats = _asked('precisions', precisions, fast), _asked('formats', formats, FORMATS)
    pairs = [(f, p) for f in FORMATS for p in PRECISIONS if (f, p) == ('contiguous', 'fp32') or f in formats and p in precisions]
    candidates = [_Candidate(f, p, kwargs) for f, p in pairs]
    current = _current(self)
    tuned = [p for f, p in pairs if layers and f == 'channels_last' and p != 'fp32']
    steps = (WARM_UP + num_it)*(len(pairs) + len(tuned))
    bar = progress_bar(range(steps), leave=False) if hasattr(self, 'progress') else None  # `no_bar` takes it away
    tick = bar.update if bar else noop
    tick(0)
    with untouched(self, STEP_CALLBACKS, eager=False) as originals:
        batches, loader_ms = _load_batches(self)
        if self.opt is None: self.create_opt()
        self.opt.set_hypers(lr=0.) # weights stay, so that every candidate steps on the same ones
        self.n_iter = steps
        layers = _measure(self, candidates, batches, num_it, tick, originals, layers, kwargs)
    base = statistics.median(candidates[0].ms)
    rows = [c.timing(base) for c in candidates]
    margin = noise_margin([c.ms for c in candidates if c.ms and c.valid])
    result = FormatTimings(rows, choose(rows, current, margin), margin, loader_ms, layers)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(shared := [vars(result)], src=0)
        result.__dict__.update(shared[0])
    if bar: bar.on_iter_end()
    if show_plot: result.plot()
    return result


def apply(learn, row:Timing, layers=(), **scaler):
    "Switch a Learner to the format and precision of a `Timing`, with these GradScaler arguments if it is fp16."
    half, _, tuned = row.precision.partition('+')
    names = fp32_names(layers, half) if tuned else ()
    if half == 'fp32': learn.to_fp32().to_channelslast(to_fp16=False)
    elif _current(learn)[1] == row.precision and not scaler and tuple(names) == tuple(getattr(getattr(learn, 'mixed_precision', None), 'fp32_layers', ())):
        learn.to_channelslast()
    else: learn.to_channelslast(amp_mode=half, fp32_layers=names or None, **(scaler if half == 'fp16' else {}))
    return learn if row.memory_format == 'channels_last' else learn.to_contiguous()


@patch
@delegates(Learner.format_find)
def to_fastest(self:Learner, *,
    show_plot:bool=False, # Draw the chart?
    **kwargs
):
    """Measure with `format_find`, switch the Learner to the winner, say it in one line; returns the Learner.

    The measurements stay in `learn.format_timings`. In a distributed run call it inside `learn.distrib_ctx()`, where all
    processes take rank 0's choice; `ValueError` outside, where each would make its own."""
    if num_distrib() > 1 and not torch.distributed.is_initialized():
        raise ValueError("Each process would decide for itself: call it inside `with learn.distrib_ctx():`, where rank 0 decides for all.")
    timings = self.format_find(show_plot=show_plot, **kwargs)
    apply(self, timings.best, timings.layers, **{k: v for k, v in kwargs.items() if k not in ('precisions', 'formats', 'num_it', 'layers')})
    self.format_timings = timings
    print(f'{label(timings.best)}: {timings.best.speedup:.2f}× contiguous fp32')
    return self
