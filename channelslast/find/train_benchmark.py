"Training steps of many candidates on one Learner, inside `preserve_learner`: batches, warm-up, layers, rounds, optimizer."
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

from ..core.autocast import DTYPES
from ..core.devices import elapsed_ms, fit_device, free_memory, is_out_of_memory, synchronize, unwrap_model
from ..core.distributed import broadcast_from_rank0, gather_from_ranks
from ..core.nested_tensors import first_half, leaves_of, tensors_of
from . import selection
from .candidates import Candidate, Eliminated
from .layer_timing import fp32_names, record_inputs, time_layers
from .number_check import check_numbers, not_finite, stop_before_step

__all__ = ['BATCHES', 'LOADER_BATCHES', 'MAX_SKIPS', 'step_ms', 'step_was_skipped', 'load_batches', 'TrainBenchmark']

BATCHES, LOADER_BATCHES = 4, 8
LOADER_MS = 20_000  # at most, for slow loaders
MAX_SKIPS = 40  # of steps in a row by the gradient scaler; its default scale is down to 2**-24 then
EMULATED_FACTOR = 20  # times contiguous fp32's first step; emulated convolutions took 35 to 139 times (depthwise ones 8)
BASELINE_UNCERTAINTY = 0.05  # contiguous fp32 goes on until its time is as sure as this: every speed-up is told in it
OPTIMIZER_STEPS = 3
SYNCHRONOUS = {'cpu'}  # where the optimizer runs when all before it has ended, so that its time can be added


class SkipOptimizer(Callback):
    "Leaves the optimizer out of each step, and notes what that would have taken."
    order = 1000  # clipping and the scaler's part come before, and stay
    def __init__(self, ms): self.ms, self.skipped_ms = ms, 0.
    def before_step(self):
        self.skipped_ms += self.ms
        raise CancelStepException

    def pop_skipped_ms(self) -> float:
        ms, self.skipped_ms = self.skipped_ms, 0.
        return ms


class CheckGradients(Callback):
    "Names the first parameter whose gradient the optimizer would take though it is not finite."
    order, found = 900, ''  # after the scaler, which skips steps for that, and clipping
    def before_batch(self): self.found = ''
    def before_step(self):
        name = not_finite((n, p.grad) for n, p in self.model.named_parameters())
        self.found = f'gradient of {name}' if name else ''


def step_ms(learn, batch) -> float:
    "Milliseconds of one training step of the Learner, with what its optimizer takes, if that is left out."
    for cb in learn._grab_cbs(MixedPrecision): cb.skipped = False  # accumulated batches never come to the scaler
    ms = elapsed_ms(fit_device(learn), lambda: learn.one_batch(0, batch))
    return ms + sum(cb.pop_skipped_ms() for cb in learn._grab_cbs(SkipOptimizer))


def step_was_skipped(learn) -> bool:
    "True if the gradient scaler skipped the Learner's last step, in any process. Its time lacks the optimizer's part."
    return any(gather_from_ranks(any(getattr(cb, 'skipped', False) for cb in learn._grab_cbs(MixedPrecision))))


def load_batches(learn, loader) -> tuple:
    """A few batches on the device, and the milliseconds that the loader takes for one.

    All are of one shape: the fastest step of each candidate counts, which a smaller last batch would be."""
    device, batches, came = fit_device(learn), [], []
    workers = getattr(loader, 'num_workers', 0)
    wave = 2*workers  # the batches that worker processes prepare before the first one is taken
    n = wave*(1 + -(-LOADER_BATCHES//wave)) if wave else LOADER_BATCHES
    def _shapes(b): return [getattr(t, 'shape', None) for t in leaves_of(b)]
    start = time.perf_counter()
    for b in islice(loader, n):
        synchronize(device)
        came.append((time.perf_counter() - start)*1e3)
        if len(batches) < BATCHES and (not batches or _shapes(b) == _shapes(batches[0])):
            batches.append(to_device(b, device))  # not to the model's, which may be on the CPU before a first fit
        if came[-1] > LOADER_MS: break
    return batches, _per_batch(came, workers, len(came) == n)


def _per_batch(came, workers, complete) -> float:
    """Milliseconds per batch, given the milliseconds after which each batch came.

    Worker processes prepare several batches at once, the first ones in advance. With workers it is the mean of the
    batches after those; or of all batches, if the loader or the time ended early."""
    if not came: return 0.
    if not workers:
        ms = [b - a for a, b in zip([0., *came], came)]
        return statistics.median(ms[1:] or ms)  # the first one sets up
    if complete: return (came[-1] - came[2*workers - 1])/(len(came) - 2*workers)
    return came[-1]/max(len(came), workers*(came[-1] > LOADER_MS))


class TrainBenchmark:
    "Candidates that take steps in turn, on the same batches and weights."
    event = 'before_train'

    def __init__(self,
        learn, # Inside `preserve_learner`; for training with learning rate 0
        candidates, # `Candidate`s, contiguous fp32 first; those found on the way are appended
        batches,
        originals, # Of `preserve_learner`: the tensors' own values
        on_step, # Called with the number of steps taken
        bs=None, # Items in a batch, where known
    ):
        self.learn, self.candidates, self.batches = learn, candidates, batches
        self.originals, self.on_step, self.bs = originals, on_step, bs
        self.cbs = [o for o in learn.cbs if not isinstance(o, (FastaiChannelsLast, MixedPrecision))]
        self.device = fit_device(learn)
        copied = {data.untyped_storage()._cdata: data.untyped_storage().nbytes() for _, data in originals
                  if data.device.type == self.device.type and data.layout is torch.strided}
        self.copied = sum(copied.values())  # by `preserve_learner`
        state = list(getattr(getattr(learn.opt, 'opt', learn.opt), 'state', {}).values())
        self.steps, self.sound, self.stepped = 0, True, bool(tensors_of(state))
        self.optimizer_ms = self.first_ms = None
        names = {id(t): n for n, t in (*learn.model.named_parameters(), *learn.model.named_buffers())}
        finite = [t for t, data in originals if not not_finite([('it', data)])]  # an attention mask may hold infinity
        self.finite = [(names.get(id(t), 'optimizer state'), t) for t in finite]
        self.look = CheckGradients()
        self.look.learn = learn
        learn.cbs = L(self.cbs)
        learn('before_fit'); learn('before_epoch'); learn(self.event)

    @property
    def running(self): return [c for c in self.candidates if c.running]

    def step(self, c, i) -> float:
        "Milliseconds of one step of a candidate, which is out if it makes something infinite or NaN."
        with self.peak_memory(c): ms = step_ms(self.learn, self.batches[i % len(self.batches)])
        self.count()
        fault = not_finite([('loss', self.learn.loss)]) or self.look.found or not_finite(self.finite)
        if c.baseline: self.sound = not fault # otherwise the user's own numbers are such
        elif self.sound and fault: raise Eliminated(f'{fault} is not finite')
        if fault: self.restore_values()
        return ms

    @contextmanager
    def peak_memory(self, c):
        "Note how much memory the block takes, beside the search's own copies, where the device can tell."
        device = dict(cuda=torch.cuda, xpu=torch.xpu).get(self.device.type)
        if device: device.reset_peak_memory_stats(self.device)
        yield
        if device: c.memory = max(c.memory or 0, (device.max_memory_allocated(self.device) - self.copied)/2**20)

    def count(self):
        self.steps += 1
        self.on_step(self.steps)

    def restore_values(self):
        "Put the original values into weights, buffers and optimizer state: a step may have filled them with NaN."
        with torch.no_grad():
            for t, data in self.originals: t.copy_(data)
        if self.learn.opt is not None and not self.stepped: self.learn.opt.clear_state()  # it had none before this
        self.learn.model.zero_grad(set_to_none=True)

    def timed_step(self, c, i=0) -> float:
        "Milliseconds of one step in a candidate's format and precision; None if it fails. Skipped steps don't count."
        for _ in range(MAX_SKIPS):
            ms = c.run_or_eliminate(self.learn, lambda: (c.activate(self.learn, self.cbs), self.step(c, i))[1])
            if ms is None or not step_was_skipped(self.learn): break
        else: ms = c.eliminate(f'the gradient scaler skipped {MAX_SKIPS} steps in a row')
        if ms is None: self.restore_values()
        return ms

    def timed_first_step(self, c) -> float:
        """Milliseconds of the first step of contiguous fp32. While it runs out of memory, the batches are halved for
        all candidates: a batch may be as large as fp16 allows."""
        while True:
            try: return self.timed_step(c)
            except Exception as e:
                if not all(gather_from_ranks(is_out_of_memory(e) and self.halve())): raise
            self.restore_values()  # outside the handler: its traceback holds the step's tensors
            free_memory(self.device)

    def halve(self) -> bool:
        "Cut each batch in half; False where that is not possible."
        halves = [first_half(b, self.bs) for b in self.batches] if self.bs and self.bs > 1 else self.batches
        if any(a is b for a, b in zip(halves, self.batches)): return False
        self.batches, self.bs = halves, self.bs//2
        return True

    def warm_up(self, candidates):
        """The first step of each, which allocates, compiles and chooses kernels; what else warms up makes early rounds
        slower, which the fastest forgives. A candidate is out if its steps take very much longer than contiguous fp32's
        again and again: the device emulates that precision, and several such steps would follow."""
        tries = 2 if self.device.type in SYNCHRONOUS else 3  # elsewhere a second step may still choose kernels
        self.cbs.append(self.look)
        for c in candidates:
            ms = [self.timed_first_step(c) if c.baseline else self.timed_step(c)]
            if c.baseline: self.first_ms, = ms
            while broadcast_from_rank0(c.running and ms[-1] > EMULATED_FACTOR*self.first_ms) and len(ms) < tries: ms.append(self.timed_step(c))
            if broadcast_from_rank0(c.running and len(ms) == tries and ms[-1] > EMULATED_FACTOR*self.first_ms):
                c.eliminate(f'a step takes {ms[-1]/self.first_ms:.0f} times as long as in contiguous fp32')
        self.cbs.remove(self.look)
        self.look.found = ''  # of the last candidate, which the steps that follow have no part in
        self.learn.cbs = L(self.cbs)

    def add_mixed_precisions(self, scaler) -> list: # `LayerTiming`s
        "Time single layers, and add a candidate that keeps in fp32 those that half precision slows down."
        layers = []
        for c in [c for c in self.running if c.is_channels_last and c.precision != 'fp32']:
            model, cbs = unwrap_model(self.learn.model), [stop_before_step(self.learn), *self.cbs]
            def _one_batch():
                c.activate(self.learn, cbs)
                self.learn.one_batch(0, self.batches[0])
            inputs = c.run_or_eliminate(self.learn, lambda: record_inputs(model, _one_batch)) or {}
            rows = time_layers(model, inputs, DTYPES[AMPMode(c.base_precision)], c.base_precision)
            layers += rows
            if not (names := broadcast_from_rank0(fp32_names(rows, c.base_precision))): continue
            mixed = Candidate('channels_last', c.base_precision, scaler, names)
            mixed.note = f'{len(names)} of {sum(len(r.names) for r in rows)} layers in fp32'
            self.candidates.append(mixed)
            self.warm_up([mixed])
        return layers

    def check_numbers(self):
        "Drop whose numbers are wrong."
        # uncompiled: each eval-mode variant would be one more recompilation, and those are limited
        with torch.compiler.set_stance('force_eager'):
            check_numbers(self.learn, self.candidates, self.cbs, self.compared_batch, self.restore_values)

    @property
    def compared_batch(self):
        "A batch to compare numbers on. On GPUs it is half of one, since the comparison takes more memory than a step."
        return self.batches[0] if self.device.type == 'cpu' or (self.bs or 0) < 4 else first_half(self.batches[0], self.bs)

    def time_optimizer(self):
        """Fill `optimizer_ms`: its part of a step, the fastest of a few; None where it can't run alone.

        It does the same in each format and precision, and is up to half of a step and much of its noise: on a CPU the
        steps that follow leave it out, and add this time. Elsewhere its launches overlap the backward pass, so that its
        part is the difference of steps with and without it."""
        alone, apart = self.device.type in SYNCHRONOUS, SkipOptimizer(0.)
        apart.learn = self.learn
        def _fastest(step): return selection.fastest([elapsed_ms(self.device, step) for _ in range(OPTIMIZER_STEPS)])
        try:
            self.candidates[0].activate(self.learn, [*[stop_before_step(self.learn)]*alone, *self.cbs])
            self.learn.one_batch(0, self.batches[0])
            step = self.learn.opt.step if alone else partial(self.learn.one_batch, 0, self.batches[0])
            ms = _fastest(step)
            if not alone:
                self.learn.cbs = L(*self.learn.cbs, apart)
                ms = max(ms - _fastest(step), 0.)
        except Exception: return
        self.optimizer_ms = ms
        if not alone: return
        apart.ms = ms
        self.cbs.append(apart)

    def run(self,
        rounds, # At most
        incumbent, # `(memory_format, precision, folded)` of the Learner
        more=0, # Rounds that may follow while all steps together fit into one slow phase, after which nothing is sure
    ) -> selection.Decision: # Its keys are `Candidate`s
        "Rounds of timed steps, interleaved, until it is decided; who cannot win any more stops."
        for c in self.running: c.memory = None  # warming up takes more: kernels are tried
        for i in range(rounds + more):
            if i >= rounds and not broadcast_from_rank0(selection.too_early({c: c.ms for c in self.running})): break
            # there and back, so that drift hits all alike and the format changes once a round
            for c in sorted(self.candidates, key=lambda c: c.is_channels_last)[::(-1)**i]:
                if not c.running: continue
                ms = self.timed_step(c, i)
                if c.running: c.ms.append(ms)
            eliminated, ends = broadcast_from_rank0(self._judge(incumbent))
            for k in eliminated: self._stop(self.candidates[k])
            if ends: break
        return self._decide(incumbent)

    def _decide(self, incumbent) -> selection.Decision:
        """Among those still running, the simplest first: what the Learner has, then fp32, one precision, as it is,
        contiguous."""
        def _simple(c): return c.key != incumbent, c.precision != 'fp32', '+' in c.precision, c.folded, c.is_channels_last
        home = next((c for c in self.candidates if c.key == incumbent), self.candidates[0])
        return selection.decide({c: c.ms for c in sorted(self.running, key=_simple)}, home)

    def _judge(self, incumbent) -> tuple:
        "Who is beaten, as places among the candidates, and is it decided among the others?"
        times = {c: c.ms for c in self.running}
        if selection.too_early(times): return [], False
        eliminated = [c for c in selection.eliminated(times) if not (c.baseline and selection.uncertainty(c.ms) > BASELINE_UNCERTAINTY)]
        return [self.candidates.index(c) for c in eliminated], selection.should_stop(self._decide(incumbent), times)

    def _stop(self, c):
        far = selection.fastest(c.ms) > selection.FAR_FACTOR*min(selection.fastest(o.ms) for o in self.running)
        c.eliminate(f'dropped after {len(c.ms)} steps: far slower' if far else '', valid=True)
