"Steps of candidates that take turns on one Learner, inside `preserve_learner`: time, memory, failures."
from contextlib import contextmanager

import torch
from fastai.callback.channelslast import ChannelsLast as FastaiChannelsLast
from fastai.callback.core import (Callback, CancelEpochException, CancelFitException, CancelStepException, CancelTrainException,
                                  CancelValidException)
from fastai.callback.fp16 import MixedPrecision
from fastcore.basics import noop
from fastcore.foundation import L

from ..core.devices import elapsed_ms, fit_device, free_memory, is_out_of_memory
from ..core.distributed import broadcast_from_rank0, gather_from_ranks, together
from ..core.memory_format import align_optimizer, convert_module
from ..core.nested_tensors import copied
from ..core.stand_in import StandInCallback
from ..learner.setting import Setting
from ..learner.state import State, buffers_of, not_finite
from .batches import halved

MAX_SKIPS = 40  # steps in a row that the gradient scaler may skip: its default scale is down to 2**-24 then
EMULATED_FACTOR = 20  # times contiguous fp32's first step; emulated convolutions took 35 to 139 times, depthwise ones 8
CANCELS = CancelFitException, CancelEpochException, CancelTrainException, CancelValidException
SYNCHRONOUS = {'cpu'}  # device types on which a call returns when its work is done


class Eliminated(Exception):
    "Raised inside `Steps.attempt`, with the reason why the candidate is eliminated."


def step_ms(learn, batch) -> float:
    "Milliseconds of one step of the Learner."
    for cb in learn._grab_cbs(MixedPrecision): cb.skipped = False  # while gradients accumulate, no scaler resets this
    return elapsed_ms(fit_device(learn), lambda: learn.one_batch(0, batch))


def step_was_skipped(learn) -> bool:
    "True if the gradient scaler skipped the Learner's last step in any process. The step's time lacks the optimizer."
    return any(gather_from_ranks(any(getattr(cb, 'skipped', False) for cb in learn._grab_cbs(MixedPrecision))))


class OptimizerStep(Callback):
    "With `skip`, leave the optimizer out. With `check`, note the first gradient that is infinite or NaN."
    order = 1000  # after gradient clipping and the scaler, which skips steps with such gradients
    def __init__(self, learn): self.learn, self.check, self.skip, self.fault, self.skipped = learn, False, False, '', False
    def before_batch(self): self.fault, self.skipped = '', False
    def before_step(self):
        name = self.check and not_finite((n, p.grad) for n, p in self.model.named_parameters())
        if name: self.fault = f'gradient of {name}'
        self.skipped = self.skip
        if self.skip: raise CancelStepException


class Candidate:
    "A setting, the callbacks for it, what the Learner keeps from one of its steps to the next, and what was found out."
    def __init__(self, setting:Setting, train:bool, scaler:dict, note=''):
        self.setting, self.note, self.running, self.ready = setting, note, True, False
        self.cbs, self.scaler, self.state = setting.callbacks(train, **scaler), None, None
        self.loss_diff = self.grad_diff = self.pred_diff = self.memory = None

    @property
    def is_folded(self) -> bool: return self.setting.folded and not self.setting.compiled  # compiling folds, too
    @property
    def prepared(self): # `FoldBatchNorm`, `CompilePredictions` or `CompileTraining`, or None
        return next((cb for cb in reversed(self.cbs) if isinstance(cb, StandInCallback)), None)

    def eliminate(self, note):
        "Stop measuring this candidate, for the reason in `note`."
        if self.setting.compiled: self.prepared.forget()
        self.note, self.running = '; '.join(filter(None, [self.note, note])), False


class Steps:
    "Training steps or predictions of candidates that take turns on the same batches and weights."
    def __init__(self, learn, train, batches, originals, bs=None, scaler=None):
        self.learn, self.train, self.batches, self.bs, self.scaler = learn, train, batches, bs, scaler or {}
        self.on_pass = noop
        self.device, self.candidates, self.first_ms = fit_device(learn), {}, None
        self.callbacks = [o for o in learn.cbs if not isinstance(o, (FastaiChannelsLast, MixedPrecision))]
        copies = {data.untyped_storage()._cdata: data.untyped_storage().nbytes() for _, data in originals
                  if data.device.type == self.device.type and data.layout is torch.strided}
        self.copied_bytes = sum(copies.values())  # by `preserve_learner`
        self.opts, self.optimizer_ms, self.optimizer_step = {}, {}, OptimizerStep(learn)  # by `Setting.fused`
        learn.cbs, own = L(self.callbacks), buffers_of(learn, self.callbacks)
        for event in 'before_fit', 'before_epoch', 'before_train' if train else 'before_validate': learn(event)
        moved = {id(own[k]): t for k, t in buffers_of(learn, self.callbacks).items() if k in own}  # by `before_fit`, to the device
        self.state = State(learn, self.callbacks, [(moved.get(id(t), t), data) for t, data in originals])
        if train: self.callbacks.append(self.optimizer_step)

    # candidates

    def add(self, setting, note='') -> Candidate:
        c = self.candidates[setting] = Candidate(setting, self.train, self.scaler, note)
        if not self.opts: self.opts[setting.fused] = self.learn.opt
        return c

    @property
    def baseline(self) -> Candidate: return next(iter(self.candidates.values()))
    @property
    def running(self) -> list: return [c for c in self.candidates.values() if c.running]

    def activate(self, c, cbs=None):
        "Switch the Learner to a candidate."
        learn = self.learn
        learn.cbs = L(*(self.callbacks if cbs is None else cbs), *c.cbs)
        for cb in c.cbs: cb.learn = learn
        if self.train: learn.opt = self.opts[c.setting.fused]
        convert_module(learn.model, c.setting.is_channels_last)
        align_optimizer(learn.opt)
        if c.setting.compiled: c.prepared.trust()  # the conversion moved the weights
        for cb in c.cbs:
            cb('before_validate')
            if not c.ready: cb('before_fit')
        if not c.ready: c.scaler = False if c.setting.precision == 'fp32' else learn.scaler
        c.ready, learn.scaler = True, c.scaler

    def attempt(self, c, f):
        """Return `f()`. If it fails in any process, return None and eliminate the candidate, or raise the error if this is
        contiguous fp32."""
        try: return together(f, error_note)
        except Exception as e:
            if c is self.baseline and isinstance(e, CANCELS): raise ValueError(canceled(type(e).__name__)) from e
            if c is self.baseline: raise
            note = error_note(e)
        self.release()
        c.eliminate(note)

    def release(self):
        "Free the memory of a failed step: its activations, which the loss holds, and gradients."
        learn = self.learn
        learn.pred = learn.loss = learn.loss_grad = None
        learn.model.zero_grad(set_to_none=True)
        free_memory(self.device)

    # steps

    def step(self, c, i) -> float:
        "Milliseconds of one step of a candidate, which continues where its last step ended."
        batch = copied(self.batches[i % len(self.batches)])  # callbacks such as `CutMix` write into it
        for o in c.state or self.state.start: o.restore()
        c.state = c.state or self.state.take()
        self.activate(c)
        if self.device.type not in SYNCHRONOUS:  # on GPUs memory is scarce, and reported for each candidate
            for o in self.running:
                if o.is_folded and o is not c: o.prepared.forget()
        if c.is_folded and not c.prepared.ready: self.learn.one_batch(0, copied(batch))  # the weights were moved
        with self.peak_memory(c): ms = step_ms(self.learn, batch)
        self.on_pass()
        for o in c.state: o.take()
        if self.optimizer_step.skipped: ms += self.optimizer_ms[c.setting.fused]
        if c.setting.compiled and c.prepared.reason: raise Eliminated(f'not compiled: {c.prepared.reason}')
        if c.is_folded and not c.prepared.works: raise Eliminated('nothing can be folded')
        return ms

    def timed_step(self, c, i=0) -> float:
        "Milliseconds of one step; None if it fails. Steps that the gradient scaler skips are repeated."
        for _ in range(MAX_SKIPS):
            ms = self.attempt(c, lambda: self.step(c, i))
            if ms is None or not self.train or not step_was_skipped(self.learn): break
        else: ms = c.eliminate(f'the gradient scaler skipped {MAX_SKIPS} steps in a row')
        if ms is None and self.train: self.state.restore_tensors()
        return ms

    @contextmanager
    def peak_memory(self, c):
        "Record the memory that the block takes, without the copies of `preserve_learner`, if the device reports it."
        device = dict(cuda=torch.cuda, xpu=torch.xpu).get(self.device.type)
        if device: device.reset_peak_memory_stats(self.device)
        yield
        if device: c.memory = max(c.memory or 0, (device.max_memory_allocated(self.device) - self.copied_bytes)/2**20)

    # first steps

    def warm_up(self, c) -> bool: # True if the candidate runs
        """Take a candidate's first steps, which allocate memory, compile and choose kernels, and check that they give
        finite numbers. It is eliminated if its steps repeatedly take far longer than contiguous fp32's: the device
        emulates its precision, and several such steps would follow."""
        tries = 2 if self.device.type in SYNCHRONOUS else 3  # elsewhere the second step may still choose kernels
        ms = self.checked_step(c)
        if c is self.baseline: self.first_ms = ms
        def _factor(ms): return broadcast_from_rank0(ms/self.first_ms if c.running else 0.)
        factor = _factor(ms)
        for _ in range(tries - 1):
            if factor > EMULATED_FACTOR: factor = _factor(self.timed_step(c))
        if factor > EMULATED_FACTOR: c.eliminate(f'a step takes {factor:.0f} times as long as in contiguous fp32')
        c.memory = None  # the first steps take more, to try kernels
        return c.running

    def checked_step(self, c) -> float:
        "A first step. Infinity or NaN in loss, gradients, weights, buffers or optimizer state eliminates a candidate."
        self.optimizer_step.check = True
        ms = self.first_baseline_step(c) if c is self.baseline else self.timed_step(c)
        self.optimizer_step.check = False
        if not c.running or not self.train: return ms
        fault = not_finite([('loss', self.learn.loss)]) or self.optimizer_step.fault or not_finite(self.state.finite)
        if c is self.baseline: self.baseline_is_finite = not fault  # otherwise the user's own numbers are not finite
        def _check():
            if fault and self.baseline_is_finite: raise Eliminated(f'{fault} is not finite')
        self.attempt(c, _check)
        if fault: self.state.restore_tensors()
        return ms

    def first_baseline_step(self, c) -> float:
        """Milliseconds of the first step of contiguous fp32. While it runs out of memory, the batches are halved for
        all candidates: the user's batch may fit in memory only in fp16."""
        while True:
            try: return self.timed_step(c)
            except Exception as e:
                if not all(gather_from_ranks(is_out_of_memory(e) and self.halve_batches())): raise
            self.release()  # outside the handler, whose traceback holds the step's tensors
            self.state.restore_tensors()

    def halve_batches(self) -> bool: # False if that is not possible
        halves = halved(self.batches, self.bs)
        if halves: self.batches, self.bs = halves, self.bs//2
        return bool(halves)


def canceled(name) -> str: return f'A callback raises `{name}` in a measured batch: remove the callback before you measure.'


def error_note(e) -> str:
    if isinstance(e, Eliminated) or hasattr(e, 'reason'): return getattr(e, 'reason', str(e))  # the latter of another process
    if is_out_of_memory(e): return 'out of memory'
    return f"{type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[-1].strip()[:100]}"
