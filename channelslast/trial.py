"Training steps of many candidates on one Learner, inside `untouched`: batches, warm-up, layers, rounds, optimizer."
import statistics
import time
from contextlib import contextmanager
from itertools import islice

import torch
from fastai.callback.channelslast import ChannelsLast as FastaiChannelsLast
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastcore.foundation import L

from . import race
from .candidates import Candidate
from .containers import leaves, tensors_of
from .devices import elapsed_ms, fit_device, rank0s, synchronize, unwrapped
from .layers import fp32_names, record_inputs, time_layers
from .precision import DTYPES
from .same_numbers import check_numbers, not_finite, stop_before_step

__all__ = ['BATCHES', 'LOADER_BATCHES', 'step_ms', 'load_batches', 'Trial']

BATCHES, LOADER_BATCHES = 4, 8
EMULATED = 20  # times contiguous fp32's first step; emulated convolutions took 35 to 139 times (depthwise ones 8)
KNOWN = 0.05  # contiguous fp32 goes on until its time is as sure as this: every speed-up is told in it
OPTIMIZER_STEPS = 3
APART = {'cpu'}  # where the optimizer runs when all before it has ended, so that its time can be added


class OptimizerApart(Callback):
    "Leaves the optimizer out of each step, and notes what that would have taken."
    order = 1000  # clipping and the scaler's part come before, and stay
    def __init__(self, ms): self.ms, self.owed = ms, 0.
    def before_step(self):
        self.owed += self.ms
        raise CancelStepException

    def pay(self) -> float:
        ms, self.owed = self.owed, 0.
        return ms


class LookAtGradients(Callback):
    "Names the first parameter whose gradient the optimizer would take though it is not finite."
    order, found = 900, ''  # after the scaler, which skips steps for that, and clipping
    def before_batch(self): self.found = ''
    def before_step(self):
        name = not_finite((n, p.grad) for n, p in self.model.named_parameters())
        self.found = f'gradient of {name}' if name else ''


def step_ms(learn, batch) -> float:
    "Milliseconds of one training step of the Learner, with what its optimizer takes, if that is left out."
    ms = elapsed_ms(fit_device(learn), lambda: learn.one_batch(0, batch))
    return ms + sum(cb.pay() for cb in learn._grab_cbs(OptimizerApart))


def load_batches(learn, loader) -> tuple:
    """A few batches on the device, and the median milliseconds that the loader takes for one.

    All are of one shape: the fastest step of each candidate counts, which a smaller last batch would be."""
    device, batches, ms = fit_device(learn), [], []
    def _shapes(b): return [getattr(t, 'shape', None) for t in leaves(b)]
    start = time.perf_counter()
    for b in islice(loader, LOADER_BATCHES):
        synchronize(device)
        ms.append((time.perf_counter() - start)*1e3)
        if len(batches) < BATCHES and (not batches or _shapes(b) == _shapes(batches[0])):
            batches.append(learn._set_device(b))
        start = time.perf_counter()
    return batches, statistics.median(ms[1:] or ms or [0])  # the first one starts the workers


class Trial:
    "Candidates that take steps in turn, on the same batches and weights."
    event = 'before_train'

    def __init__(self,
        learn, # Inside `untouched`; for training with learning rate 0
        candidates, # `Candidate`s, contiguous fp32 first; those found on the way are appended
        batches,
        originals, # Of `untouched`: the tensors' own values
        tick, # Called with the number of steps taken
    ):
        self.learn, self.candidates, self.batches = learn, candidates, batches
        self.originals, self.tick = originals, tick
        self.cbs = [o for o in learn.cbs if not isinstance(o, (FastaiChannelsLast, MixedPrecision))]
        self.device = fit_device(learn)
        state = list(getattr(getattr(learn.opt, 'opt', learn.opt), 'state', {}).values())
        self.steps, self.sound, self.stepped = 0, True, bool(tensors_of(state))
        self.optimizer_ms = self.first_ms = None
        names = {id(t): n for n, t in (*learn.model.named_parameters(), *learn.model.named_buffers())}
        finite = [t for t, data in originals if not not_finite([('it', data)])]  # an attention mask may hold infinity
        self.finite = [(names.get(id(t), 'optimizer state'), t) for t in finite]
        self.look = LookAtGradients()
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
        if fault: self.heal()
        if c.baseline: self.sound = not fault # otherwise the user's own numbers are such
        elif self.sound and fault: c.out(f'{fault} is not finite')
        return ms

    @contextmanager
    def peak_memory(self, c):
        "Note how much memory the block takes, where the device can tell."
        if cuda := self.device.type == 'cuda': torch.cuda.reset_peak_memory_stats(self.device)
        yield
        if cuda: c.memory = max(c.memory or 0, torch.cuda.max_memory_allocated(self.device)/2**20)

    def count(self):
        self.steps += 1
        self.tick(self.steps)

    def heal(self):
        "Put the original values into weights, buffers and optimizer state: a step may have filled them with NaN."
        with torch.no_grad():
            for t, data in self.originals: t.copy_(data)
        if self.learn.opt is not None and not self.stepped: self.learn.opt.clear_state()  # it had none before this
        self.learn.model.zero_grad(set_to_none=True)

    def take(self, c, i=0) -> float:
        "Milliseconds of one step in a candidate's format and precision; None if it fails."
        ms = c.attempt(self.learn, lambda: (c.switch(self.learn, self.cbs), self.step(c, i))[1])
        if ms is None: self.heal()
        return ms

    def warm_up(self, candidates):
        """The first step of each, which allocates, compiles and chooses kernels; what else warms up makes early rounds
        slower, which the fastest forgives. Who takes very much longer than contiguous fp32, a second time too, is out:
        the device emulates that precision, and several such steps would follow."""
        def _emulated(c, ms): return rank0s(c.running and ms > EMULATED*self.first_ms)
        self.cbs.append(self.look)
        for c in candidates:
            ms = self.take(c)
            if c.baseline: self.first_ms = ms
            if _emulated(c, ms) and _emulated(c, ms := self.take(c)):
                c.out(f'a step takes {ms/self.first_ms:.0f} times as long as in contiguous fp32')
        self.cbs.remove(self.look)
        self.look.found = ''  # of the last candidate, which the steps that follow have no part in
        self.learn.cbs = L(self.cbs)

    def tune(self, scaler) -> list: # `LayerTiming`s
        "Time single layers, and add a candidate that keeps in fp32 those that half precision slows down."
        layers = []
        for c in [c for c in self.running if c.last and c.precision != 'fp32']:
            c.switch(self.learn, [stop_before_step(self.learn), *self.cbs])
            model, one_batch = unwrapped(self.learn.model), lambda: self.learn.one_batch(0, self.batches[0])
            inputs = c.attempt(self.learn, lambda: record_inputs(model, one_batch)) or {}
            rows = time_layers(model, inputs, DTYPES[AMPMode(c.half)], c.half)
            layers += rows
            if not (names := fp32_names(rows, c.half)): continue
            mixed = Candidate('channels_last', c.half, scaler, names)
            mixed.note = f'{len(names)} of {sum(len(r.names) for r in rows)} layers in fp32'
            self.candidates.append(mixed)
            self.warm_up([mixed])
        return layers

    def check_numbers(self):
        "Drop whose numbers are wrong."
        # uncompiled: each eval-mode variant would be one more recompilation, and those are limited
        with torch.compiler.set_stance('force_eager'):
            check_numbers(self.learn, self.candidates, self.cbs, self.batches[0], self.heal)

    def time_optimizer(self):
        """Fill `optimizer_ms`: its part of a step, the fastest of a few; None where it can't run alone.

        It does the same in each format and precision, and is up to half of a step and much of its noise: on a CPU the
        steps that follow leave it out, and add this time."""
        try:
            self.candidates[0].switch(self.learn, [stop_before_step(self.learn), *self.cbs])
            self.learn.one_batch(0, self.batches[0])
            ms = race.fastest([elapsed_ms(self.device, self.learn.opt.step) for _ in range(OPTIMIZER_STEPS)])
        except Exception: return
        self.optimizer_ms = ms
        if self.device.type not in APART: return
        self.cbs.append(apart := OptimizerApart(ms))
        apart.learn = self.learn

    def run(self,
        num_it, # Rounds at the most
        has, # `(memory_format, precision, folded)` of the Learner
    ) -> race.Decision: # Its keys are `Candidate`s
        "Rounds of timed steps, interleaved, until it is decided; who cannot win any more stops."
        for i in range(num_it):
            # there and back, so that drift hits all alike and the format changes once a round
            for c in sorted(self.candidates, key=lambda c: c.last)[::(-1)**i]:
                if not c.running: continue
                ms = self.take(c, i)
                if c.running: c.ms.append(ms)
            beaten, ends = rank0s(self._judge(has))
            for k in beaten: self._stop(self.candidates[k])
            if ends: break
        return self._decide(has)

    def _decide(self, has) -> race.Decision:
        """Among those still running, the simplest first: what the Learner has, then fp32, one precision, as it is,
        contiguous."""
        def _simple(c): return c.key != has, c.precision != 'fp32', '+' in c.precision, c.folded, c.last
        home = next((c for c in self.candidates if c.key == has), self.candidates[0])
        return race.decide({c: c.ms for c in sorted(self.running, key=_simple)}, home)

    def _judge(self, has) -> tuple:
        "Who is beaten, as places among the candidates, and is it decided among the others?"
        times = {c: c.ms for c in self.running}
        if race.early(times): return [], False
        beaten = [c for c in race.beaten(times) if not (c.baseline and race.doubt(c.ms) > KNOWN)]
        return [self.candidates.index(c) for c in beaten], race.enough(self._decide(has), times)

    def _stop(self, c):
        far = race.fastest(c.ms) > race.FAR*min(race.fastest(o.ms) for o in self.running)
        c.out(f'dropped after {len(c.ms)} steps: far slower' if far else '', valid=True)
