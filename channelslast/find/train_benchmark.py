"Timed training steps of several candidates on one Learner, inside `preserve_learner`."
import math
import statistics
import time
from contextlib import contextmanager
from functools import partial
from itertools import islice

import torch
from fastai.callback.channelslast import ChannelsLast as FastaiChannelsLast
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.torch_core import to_device
from fastcore.foundation import L

from ..learner.compile_training import CompileTraining
from ..core.autocast import DTYPES
from ..core.devices import elapsed_ms, fit_device, free_memory, is_out_of_memory, synchronize, unwrap_model
from ..core.distributed import broadcast_from_rank0, gather_from_ranks, is_single_process
from ..core.glibc_malloc import memory_is_default, page_faults, set_memory
from ..core.nested_tensors import first_half, leaves_of, tensors_of
from ..learner.fused_optimizer import FusedOptimizer
from . import selection
from .candidates import Candidate, Eliminated
from .layer_timing import fp32_names, record_inputs, time_layers
from .number_check import StopBeforeStep, check_compiled, check_numbers, not_finite
from .results import MEMORY_GAIN

__all__ = ['BATCHES', 'LOADER_BATCHES', 'MAX_SKIPS', 'step_ms', 'step_was_skipped', 'load_batches', 'TrainBenchmark']

BATCHES, LOADER_BATCHES, OPTIMIZER_STEPS = 4, 8, 3  # to step on; to time the loader with; to time the optimizer with
LOADER_MS = 20_000  # stop timing a slow loader after this time
MAX_SKIPS = 40  # steps in a row that the gradient scaler may skip: its default scale is down to 2**-24 then
EMULATED_FACTOR = 20  # times contiguous fp32's first step; emulated convolutions took 35 to 139 times, depthwise ones 8
BASELINE_UNCERTAINTY = 0.05  # contiguous fp32 is timed until it is this certain, since speedups are relative to it
MEMORY_ROUNDS = 3  # of steps with and without `keep_memory()`
FAULT_MS = 0.1  # more than a page fault takes, even for a huge page
SYNCHRONOUS = {'cpu'}  # device types on which a call returns when its work is done, so that times add up


class SkipOptimizer(Callback):
    "Skip the optimizer in each step, and add up the time that it would have taken."
    order = 1000  # after gradient clipping and the gradient scaler, which stay part of the step
    def __init__(self, learn): self.learn, self.ms, self.skipped_ms = learn, 0., 0.
    def before_step(self):
        self.skipped_ms += self.ms
        raise CancelStepException

    def pop_skipped_ms(self) -> float:
        ms, self.skipped_ms = self.skipped_ms, 0.
        return ms


class CheckGradients(Callback):
    "Name the first parameter whose gradient is infinite or NaN when the optimizer is about to use it."
    order = 900  # after gradient clipping and the scaler, which skips steps with such gradients
    def __init__(self, learn): self.learn, self.fault = learn, ''
    def before_batch(self): self.fault = ''
    def before_step(self):
        name = not_finite((n, p.grad) for n, p in self.model.named_parameters())
        self.fault = f'gradient of {name}' if name else ''


def step_ms(learn, batch) -> float:
    "Milliseconds of one training step of the Learner. Includes the optimizer's time if `SkipOptimizer` skips it."
    for cb in learn._grab_cbs(MixedPrecision): cb.skipped = False  # while gradients accumulate, no scaler resets this
    ms = elapsed_ms(fit_device(learn), lambda: learn.one_batch(0, batch))
    return ms + sum(cb.pop_skipped_ms() for cb in learn._grab_cbs(SkipOptimizer))


def step_was_skipped(learn) -> bool:
    "True if the gradient scaler skipped the Learner's last step in any process. The step's time lacks the optimizer."
    return any(gather_from_ranks(any(getattr(cb, 'skipped', False) for cb in learn._grab_cbs(MixedPrecision))))


def load_batches(learn, loader) -> tuple:
    """A few batches on the device, and the loader's milliseconds per batch. The batches have one shape, since a smaller
    last one would always be the fastest step."""
    device, batches, arrivals = fit_device(learn), [], []
    workers = getattr(loader, 'num_workers', 0)
    prepared = 2*workers  # batches that worker processes prepare before the first one is taken
    n = prepared*(1 + -(-LOADER_BATCHES//prepared)) if workers else LOADER_BATCHES
    def _shapes(b): return [getattr(t, 'shape', None) for t in leaves_of(b)]
    start = time.perf_counter()
    for b in islice(loader, n):
        synchronize(device)
        arrivals.append((time.perf_counter() - start)*1e3)
        if len(batches) < BATCHES and (not batches or _shapes(b) == _shapes(batches[0])):
            batches.append(to_device(b, device))  # the model may still be on the CPU before a first fit
        if arrivals[-1] > LOADER_MS: break
    return batches, _ms_per_batch(arrivals, workers, len(arrivals) == n)


def _ms_per_batch(arrivals, workers, complete) -> float:
    """Milliseconds per batch, from the times at which batches arrived: the median. Worker processes prepare `2*workers`
    batches in advance; with them it is the mean of later ones, or of all if the loader or the time ended early."""
    if not arrivals: return 0.
    if not workers:
        ms = [b - a for a, b in zip([0., *arrivals], arrivals)]
        return statistics.median(ms[1:] or ms)  # the first batch includes the loader's setup
    if complete: return (arrivals[-1] - arrivals[2*workers - 1])/(len(arrivals) - 2*workers)
    timed_out = arrivals[-1] > LOADER_MS
    return arrivals[-1]/(max(len(arrivals), workers) if timed_out else len(arrivals))


class TrainBenchmark:
    "Training steps of candidates that take turns on the same batches and weights."
    event = 'before_train'

    def __init__(self,
        learn, # Inside `preserve_learner`; for training with learning rate 0
        candidates, # `Candidate`s, contiguous fp32 first; others are appended while measuring
        batches,
        originals, # Tensors with their original values, from `preserve_learner`
        on_step, # Called with the number of steps taken
        bs=None, # Items per batch, if known
    ):
        self.learn, self.candidates, self.batches = learn, candidates, batches
        self.originals, self.on_step, self.bs = originals, on_step, bs
        self.callbacks = [o for o in learn.cbs if not isinstance(o, (FastaiChannelsLast, MixedPrecision))]
        self.device = fit_device(learn)
        copies = {data.untyped_storage()._cdata: data.untyped_storage().nbytes() for _, data in originals
                  if data.device.type == self.device.type and data.layout is torch.strided}
        self.copied_bytes = sum(copies.values())  # by `preserve_learner`
        state = list(getattr(getattr(learn.opt, 'opt', learn.opt), 'state', {}).values())
        self.steps, self.baseline_is_finite, self.optimizer_had_state = 0, True, bool(tensors_of(state))
        self.optimizer_ms = self.fused_ms = self.baseline_first_ms = self.fused = None
        self.own_ms = []  # contiguous fp32's steps with the Learner's own optimizer, if the others have the fused one
        names = {id(t): n for n, t in (*learn.model.named_parameters(), *learn.model.named_buffers())}
        finite = [t for t, data in originals if not not_finite([('it', data)])]  # an attention mask may hold infinity
        self.finite_tensors = [(names.get(id(t), 'optimizer state'), t) for t in finite]
        self.gradient_check = CheckGradients(learn)
        learn.cbs = L(self.callbacks)
        learn('before_fit'); learn('before_epoch'); learn(self.event)

    @property
    def running(self): return [c for c in self.candidates if c.running]

    def step(self, c, i) -> float:
        "Milliseconds of one step of a candidate. A step that gives infinity or NaN eliminates the candidate."
        with self.peak_memory(c): ms = step_ms(self.learn, self.batches[i % len(self.batches)])
        self.steps += 1; self.on_step(self.steps)
        fault = not_finite([('loss', self.learn.loss)]) or self.gradient_check.fault or not_finite(self.finite_tensors)
        if c.is_baseline: self.baseline_is_finite = not fault # False: the user's own numbers are not finite
        elif self.baseline_is_finite and fault: raise Eliminated(f'{fault} is not finite')
        if fault: self.restore_tensors()
        return ms

    @contextmanager
    def peak_memory(self, c):
        "Record the memory that the block takes, without the copies of `preserve_learner`, if the device reports it."
        device = dict(cuda=torch.cuda, xpu=torch.xpu).get(self.device.type)
        if device: device.reset_peak_memory_stats(self.device)
        yield
        if device: c.memory = max(c.memory or 0, (device.max_memory_allocated(self.device) - self.copied_bytes)/2**20)

    def restore_tensors(self):
        "Restore the values of weights, buffers and optimizer state, which a step may have filled with NaN."
        with torch.no_grad():
            for t, data in self.originals: t.copy_(data)
        if self.learn.opt is not None and not self.optimizer_had_state: self.learn.opt.clear_state()
        self.learn.model.zero_grad(set_to_none=True)

    def timed_step(self, c, i=0) -> float:
        "Milliseconds of one step in a candidate's format and precision; None if it fails. Skipped steps are repeated."
        def _step():
            c.activate(self.learn, self.callbacks)
            ms = self.step(c, i)
            if c.compiled and c.compile.reason: raise Eliminated(f'not compiled: {c.compile.reason}')
            return ms
        for _ in range(MAX_SKIPS):
            ms = c.run_or_eliminate(self.learn, _step)
            if ms is None or not step_was_skipped(self.learn): break
        else: ms = c.eliminate(f'the gradient scaler skipped {MAX_SKIPS} steps in a row')
        if ms is None: self.restore_tensors()
        return ms

    def first_baseline_step(self, c) -> float:
        """Milliseconds of the first step of contiguous fp32. While it runs out of memory, the batches are halved for
        all candidates: the user's batch may fit in memory only in fp16."""
        while True:
            try: return self.timed_step(c)
            except Exception as e:
                if not all(gather_from_ranks(is_out_of_memory(e) and self.halve_batches())): raise
            self.restore_tensors()  # outside the handler, whose traceback holds the step's tensors
            free_memory(self.device)

    def halve_batches(self) -> bool:
        "Cut each batch in half. False if that is not possible."
        halves = [first_half(b, self.bs) for b in self.batches] if self.bs and self.bs > 1 else self.batches
        if any(a is b for a, b in zip(halves, self.batches)): return False
        self.batches, self.bs = halves, self.bs//2
        return True

    def warm_up(self, candidates):
        """Take the first step of each candidate, which allocates memory, compiles and chooses kernels. If a later step
        still warms up, only an early round is slow, and the fastest step counts. A candidate whose steps repeatedly
        take far longer than contiguous fp32's is eliminated: the device emulates its precision, and several such steps
        would follow."""
        tries = 2 if self.device.type in SYNCHRONOUS else 3  # elsewhere the second step may still choose kernels
        def _factor(c, ms): return broadcast_from_rank0(ms/self.baseline_first_ms if c.running else 0.)
        self.callbacks.append(self.gradient_check)
        for c in candidates:
            if c.is_baseline: ms = self.baseline_first_ms = self.first_baseline_step(c)
            else: ms = self.timed_step(c)
            factor = _factor(c, ms)
            for _ in range(tries - 1):
                if factor > EMULATED_FACTOR: factor = _factor(c, self.timed_step(c))
            if factor > EMULATED_FACTOR: c.eliminate(f'a step takes {factor:.0f} times as long as in contiguous fp32')
        self.callbacks.remove(self.gradient_check)
        self.gradient_check.fault = ''  # of the last candidate: steps from now on are not checked
        self.learn.cbs = L(self.callbacks)

    def add_mixed_precisions(self, scaler) -> list: # `LayerTiming`s
        "Time single layers. Add a candidate that keeps in fp32 those that half precision slows down."
        layers = []
        for c in [c for c in self.running if c.is_channels_last and c.precision != 'fp32']:
            model, callbacks = unwrap_model(self.learn.model), [StopBeforeStep(self.learn), *self.callbacks]
            def _one_batch():
                c.activate(self.learn, callbacks)
                self.learn.one_batch(0, self.batches[0])
            inputs = c.run_or_eliminate(self.learn, lambda: record_inputs(model, _one_batch)) or {}
            rows = time_layers(model, inputs, DTYPES[AMPMode(c.base_precision)], c.base_precision)
            layers += rows
            names = broadcast_from_rank0(fp32_names(rows, c.base_precision))
            if not names: continue
            mixed = Candidate('channels_last', c.base_precision, scaler, names)
            mixed.note = f'{len(names)} of {sum(len(r.names) for r in rows)} layers in fp32'
            self.candidates.append(mixed)
            self.warm_up([mixed])
        return layers

    def check_numbers(self):
        "Eliminate candidates whose numbers are wrong."
        with torch.compiler.set_stance('force_eager'):  # each eval-mode variant would use up one of few recompilations
            check_numbers(self.learn, self.candidates, self.callbacks, self.compared_batch, self.restore_tensors)

    @property
    def compared_batch(self):
        "Batch to compare numbers on: on GPUs half of one, because the comparison takes more memory than a step."
        if self.device.type == 'cpu' or (self.bs or 0) < 4: return self.batches[0]
        return first_half(self.batches[0], self.bs)

    def add_compiled(self, scaler):
        "Add the fastest candidate with its model compiled."
        self.run(selection.MIN_ROUNDS, None)
        eager = min((c for c in self.candidates if c.ms and c.valid and not c.fp32_layers),
                    key=lambda c: selection.fastest(c.ms))
        eager = self.candidates[broadcast_from_rank0(self.candidates.index(eager))]
        compiled = Candidate(eager.memory_format, eager.base_precision, scaler, compile=CompileTraining)
        self.candidates.append(compiled)
        check_compiled(self.learn, compiled, eager, self.candidates[0], self.callbacks, self.batches[0])
        self.restore_tensors()
        for _ in range(3):  # compiles the training mode's code
            if compiled.running: self.timed_step(compiled)
        for c in self.running: c.ms.clear()  # only steps of the same rounds are compared

    def reject_unearned(self, decision, incumbent, loader) -> tuple: # The decision; why compiling was rejected, or ''
        "Decide again without the compiled candidate if an epoch of the loader does not earn its compilation back."
        c, eager = decision.best, [o for o in self.candidates if o.ms and o.valid and not o.compiled]
        gain = min(selection.fastest(o.ms) for o in eager) - selection.fastest(c.ms)
        if gain <= 0: return decision, ''  # the current setting, within a tie
        needed = math.ceil(1e3*c.compile.seconds/gain)
        try: batches = len(loader)
        except TypeError: return decision, ''
        if needed <= batches: return decision, ''
        seconds, speedup = c.compile.seconds, 1 + gain/selection.fastest(c.ms)
        c.eliminate(f'{needed:,} batches earn the compilation back', valid=True)
        return self._decide(incumbent, eager), (
            f'Compiled, a step would be {speedup:.2f}× as fast, but the compilation takes {seconds:.0f} s: '
            f'{needed:,} batches earn it back, and an epoch has {batches:,}.')

    def time_optimizer(self, try_fused=False):
        """Set `optimizer_ms` to the optimizer's part of a step, the fastest of a few; None if that fails. The optimizer
        does the same in each format and precision, but takes up to half of a step and causes much of its noise.

        On a CPU the steps that follow skip it, and this time is added. On other devices its launches overlap the
        backward pass, so its part is the difference between steps with and without it.

        With `try_fused`, the optimizer and its fused step alternate. The steps that follow take the fused one if that
        makes a step in contiguous fp32 clearly faster."""
        alone, self.skip, own = self.device.type in SYNCHRONOUS, SkipOptimizer(self.learn), self.learn.opt
        step, gain = partial(self.learn.one_batch, 0, self.batches[0]), None
        def _fastest(opts):
            times = {o: [] for o in opts}
            for o in [*opts]*OPTIMIZER_STEPS:
                if not alone: self.use_optimizer(o)
                times[o].append(elapsed_ms(self.device, o.step if alone else step))
            return {o: selection.fastest(ms) for o, ms in times.items()}
        self.optimizers = {own: 0.}  # milliseconds of each
        try:
            if try_fused: self.optimizers[FusedOptimizer(own)] = 0.
            stop = [StopBeforeStep(self.learn)] if alone else []
            self.candidates[0].activate(self.learn, [*stop, *self.callbacks])
            rest_ms = elapsed_ms(self.device, step)
            times = _fastest(self.optimizers)
            if not alone:
                self.learn.cbs = L(*self.learn.cbs, self.skip)
                rest_ms = _fastest([own])[own]
                times = {o: max(ms - rest_ms, 0.) for o, ms in times.items()}
            gain = (times[own] - min(times.values()))/(rest_ms + times[own])
        except Exception: self.learn.opt = own
        gains = gather_from_ranks(gain)
        if gain is None: return
        self.optimizers, self.optimizer_ms = times, times[own]
        *_, last = times
        if try_fused: self.fused_ms = times[last]
        if try_fused and None not in gains and gains[0] > selection.TIE: self.fused = last
        self.use_optimizer(self.fused or own)
        if alone: self.callbacks.append(self.skip)

    def use_optimizer(self, opt):
        "Switch to one of `optimizers`."
        self.learn.opt, self.skip.ms = opt, self.optimizers[opt]

    def own_step(self, i) -> float:
        "Milliseconds of a step in contiguous fp32 with the Learner's own optimizer: speedups are relative to it."
        self.use_optimizer([*self.optimizers][0])
        ms = self.timed_step(self.candidates[0], i)
        self.use_optimizer(self.fused)
        return ms

    def time_kept_memory(self, c) -> float: # None where it can't be measured, or where there is nothing to gain
        """How many times as fast a candidate's steps are with `keep_memory()`. Both settings alternate, and each has
        one step to warm up. Afterwards the process has the thresholds of `set_memory(False)`. A process whose steps get
        no memory from the system is left alone. Not in distributed runs, where page faults differ between ranks."""
        if self.device.type != 'cpu' or not is_single_process() or not memory_is_default(): return None
        self.callbacks = [o for o in self.callbacks if not isinstance(o, SkipOptimizer)]  # it takes memory, too
        def _ms(n=2):
            c.activate(self.learn, self.callbacks)
            return [self.step(c, i) for i in range(n)][-1]
        times = {False: [], True: []}
        try:
            _ms(1)
            before = page_faults()
            ms = _ms(1)
            if (page_faults() - before)*FAULT_MS < MEMORY_GAIN*ms: return None
            try:
                for keep in [*times]*MEMORY_ROUNDS:
                    set_memory(keep)
                    times[keep].append(_ms())
            finally: set_memory(False)
        except Exception: return None
        return selection.fastest(times[False])/selection.fastest(times[True])

    def run(self,
        rounds, # Maximum number of rounds
        incumbent, # Current setting of the Learner, `(memory_format, precision, folded)`
        extra_rounds=0, # More rounds while all steps so far may lie in one slow phase of the machine
    ) -> selection.Decision: # Its keys are `Candidate`s
        "Take timed steps in rounds until the choice is clear. Candidates that can no longer win are dropped."
        for c in self.running: c.memory = None  # the warm-up took more, to try kernels
        forward = sorted(self.candidates, key=lambda c: c.is_channels_last)
        for i in range(rounds + extra_rounds):
            if i >= rounds and not broadcast_from_rank0(selection.too_early({c: c.ms for c in self.running})): break
            # alternate the order: drift affects all candidates alike, and the format changes only once per round
            for c in reversed(forward) if i % 2 else forward:
                if not c.running: continue
                ms = self.timed_step(c, i)
                if c.running: c.ms.append(ms)
                if c.is_baseline and c.running and self.fused: self.own_ms.append(self.own_step(i))
            eliminated, done = broadcast_from_rank0(self._review(incumbent))
            for c in [self.candidates[k] for k in eliminated]:
                far = selection.fastest(c.ms) > selection.FAR_FACTOR*min(selection.fastest(o.ms) for o in self.running)
                c.eliminate(f'dropped after {len(c.ms)} steps: far slower' if far else '', valid=True)
            if done: break
        return self._decide(incumbent)

    def _review(self, incumbent) -> tuple:
        "Indices of the candidates that can no longer win, and whether the choice among the others is clear."
        times = {c: c.ms for c in self.running}
        if selection.too_early(times): return [], False
        def _uncertain(c): return c.is_baseline and selection.uncertainty(self.own_ms or c.ms) > BASELINE_UNCERTAINTY
        eliminated = [self.candidates.index(c) for c in selection.eliminated(times) if not _uncertain(c)]
        return eliminated, selection.should_stop(self._decide(incumbent), times)

    def _decide(self, incumbent, candidates=None) -> selection.Decision:
        """Choose one of these candidates, or of the running ones. Simple ones first: current setting, fp32, one
        precision, uncompiled, unfolded, contiguous."""
        def _rank(c):
            is_fp32, is_mixed = c.precision == 'fp32', '+' in c.precision
            return c.key != incumbent, not is_fp32, is_mixed, c.compiled, c.folded, c.is_channels_last
        current = next((c for c in self.candidates if c.key == incumbent), self.candidates[0])
        return selection.decide({c: c.ms for c in sorted(candidates or self.running, key=_rank)}, current)
