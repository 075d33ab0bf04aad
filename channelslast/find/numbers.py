"""Check that a candidate computes the numbers of contiguous fp32, as far as rounding explains the difference.

All passes are made on a few items, and start from the same weights, buffers, attributes and random numbers."""
import math
import warnings
from collections import namedtuple
from contextlib import ExitStack, nullcontext
from functools import partial

import torch
from fastai.callback.core import Callback, CancelBatchException
from fastai.torch_core import set_seed
from torch import nn

from ..core.compare import FACTOR, PASSES, SUM_ERROR, numbers_of, relative_error
from ..core.compiling import stance
from ..core.devices import fit_device, fp32_precision
from ..core.distributed import gather_from_ranks, without_gathering
from ..core.nested_tensors import copied, first_items, map_tensors
from ..core.random_state import restore_random_states
from ..core.undo import restore_dict
from ..learner.state import not_finite
from ..learner.step_callbacks import is_part_of_step
from .steps import Eliminated, canceled, error_note

ITEMS = 4  # of a batch: more take longer, but show no other faults
# Relative differences from fp32 that need no explanation: of the loss or outputs, an operation's result, the gradient
# of a weight, and the gradient of a vector (bias or norm), a sum over all positions: in bf16, one in Swin3D differed by
# 0.6 in one run and by 0.4 in another, where rounding the results explained 0.02.
Tolerance = namedtuple('Tolerance', 'output result weight vector')
TOLERANCE = dict(fp32=Tolerance(1e-3, 1e-2, 5e-2, 5e-2), fp16=Tolerance(2e-2, 1e-2, 5e-2, 0.2), bf16=Tolerance(5e-2, 2e-2, 0.12, 0.8))
# Relative rounding error, and the distance of the smallest numbers: fresh weights of 1e-6 (gMLP) have two digits in fp16
ROUNDING = dict(fp32=(SUM_ERROR, 0.), fp16=(2**-11, 2**-24), bf16=(2**-8, 0.))
MIN_SCALE = 2**-24  # least scale of the loss in fp16
NORM = nn.modules.batchnorm._BatchNorm  # no public name
NOISE = 0.5  # a gradient whose rounding errors are a larger share of it is nothing but rounding errors
NOISE_FACTOR = 10*FACTOR  # accept up to this many times the rounding errors of such a gradient
LOSS = 'loss'
NO_MODE = "Operations were not compared: the model can't run under a dispatch mode, as `flex_attention` can't."
DIFFER = 'numbers differ from contiguous fp32'


class Difference(namedtuple('Difference', 'off size limit varies')):
    """Absolute difference of a loss or gradient from its reference, the reference's absolute value or norm, and the
    difference that needs no explanation. `varies` is True if rounding errors vary much from pass to pass, as in vectors."""
    @property
    def is_large(self) -> bool: return not self.off <= self.limit


def no_mode(model): return nullcontext()


class StopBatch(Callback):
    "Stop each batch before the optimizer. Sets `mode.backward` when the backward pass begins, and `reached` when the model has run."
    order = -1000
    def __init__(self, learn): self.learn, self.mode, self.reached = learn, None, False
    def after_pred(self): self.reached = True
    def before_backward(self):
        if self.mode: self.mode.backward = True
    def before_step(self): raise CancelBatchException


def _norm(tensors) -> float:
    "Norm of all tensors, in float64 if the device has it: a CPU's float32 norm of 100 million numbers is 1% off."
    def _one(t):
        wide = torch.promote_types(t.dtype, torch.float64) if t.is_cpu or t.is_cuda else None
        return torch.linalg.vector_norm(t, dtype=wide)
    return math.hypot(*map(_one, tensors))


def _wide_copy(grad):
    dense = grad.detach().to_dense() if grad.layout is not torch.strided else grad.detach()  # sparse: of embeddings
    return dense.to(torch.promote_types(dense.dtype, torch.float32), copy=True)  # complex numbers stay complex


def _pairs(grads, reference):
    "Pairs of gradients. A missing one counts as zeros if the other one exists."
    for a, b in zip(grads, reference):
        if a is None and b is not None: a = torch.zeros_like(b)
        elif b is None and a is not None: b = torch.zeros_like(a)
        yield a, b


def _error(a, b) -> tuple: # And the norm of `b`
    """Difference of two gradients: the larger of the norm of all differences, and an eighth of that which the largest one of
    a slice (the weights of one output channel) would give in all slices."""
    if a is None or not a.numel(): return 0., 0.
    diff, b = (t.flatten(1) if t.dim() > 1 else t.view(1, -1) for t in (a - b, b))
    diffs, norm = torch.linalg.vector_norm(diff, dim=1), torch.linalg.vector_norm(b)
    largest = torch.maximum(torch.linalg.vector_norm(diffs), diffs.max()*math.sqrt(len(diffs))/8)
    return largest.item(), norm.item()


def _set_mode(model, training):
    """Set eval mode or, with `training`, that of the fit, without dropout: each kernel of attention draws its own.

    Modules with statistics of their own (floating-point buffers) stay in the fit's mode. The batch's statistics give
    activations the scale at which the model trains; with initial ones, gradients underflow in fp16. Running statistics of
    batch norms become those of the next batch. Recurrent layers stay in training mode, without dropout: cuDNN's have no
    backward pass in eval mode (PyTorch issue 5878)."""
    for m in model.modules():
        drops = 'drop' in type(m).__name__.lower() or isinstance(m, nn.MultiheadAttention)
        stays = training or any(b.is_floating_point() for b in m.buffers(recurse=False))
        if isinstance(m, NORM): m.momentum = 1.
        elif isinstance(m, nn.RNNBase): m.dropout = 0.
        elif drops or not stays: m.training = False


class Numbers:
    "Passes of contiguous fp32 and of candidates on the same items. Does not communicate with other processes."
    def __init__(self, steps): # A `Steps` object, whose first candidate is contiguous fp32
        from ..core import replay  # needs a private module of PyTorch, so it is imported where it is used
        self.steps, self.learn, self.stop, self.notes = steps, steps.learn, StopBatch(steps.learn), []
        self.callbacks = [self.stop, *filter(is_part_of_step, steps.callbacks)]
        self.Record, self.Replay, self.replays = replay.Record, replay.Replay, True
        self.whole = self.batch = steps.batches[0]
        self.fp32_precision, self.training, self.finite = fp32_precision(fit_device(steps.learn)), False, True

    def start(self):
        """Take the pass of contiguous fp32, on few items, or on the whole batch if the model takes no other number or these items
        give no loss, such as images without labels."""
        def _start():
            few = first_items(self.whole, self.steps.bs, ITEMS) if (self.steps.bs or 0) > ITEMS else self.whole
            for batch in few, self.whole:
                self.batch = batch
                try: self.run_baseline()
                except Exception:
                    if batch is self.whole: raise
                else:
                    if self.finite: return
        with self.uncompiled(self.steps.baseline): self.steps.attempt(self.steps.baseline, _start)

    def uncompiled(self, c):
        "Context manager: a model that the user compiled is not compiled again for few items and the eval mode."
        return nullcontext() if c.setting.compiled else stance('force_eager')

    def precision_of(self, c) -> str: return self.fp32_precision if c.setting.precision == 'fp32' else c.setting.precision

    def tolerance_of(self, c) -> Tolerance: return TOLERANCE[self.precision_of(c)]

    def generator(self, seed=0): return torch.Generator(fit_device(self.learn)).manual_seed(seed)

    def restart(self):
        self.steps.state.restart()
        set_seed(0)

    def one_batch(self):
        "A pass of a copy of the items: models and callbacks may write into them."
        self.stop.reached = False
        self.steps.on_pass()
        self.learn.one_batch(0, copied(self.batch))
        if not self.stop.reached: raise ValueError(canceled('CancelBatchException'))

    def record(self, keep=True):
        "A function that returns the mode for a pass of a model."
        return partial(self.Record, keep=keep) if self.replays else no_mode

    def replay(self, c, record, seed=None):
        "A function that returns the mode for a pass of contiguous fp32 with the values of a candidate's pass; with `seed` rounded."
        precision = self.precision_of(c)
        return lambda model: self.Replay(model, record, self.counts, TOLERANCE[precision].result, *ROUNDING[precision],
                                         generator=self.generator(seed or 0), rounded=seed is not None)

    def rounding(self, precision, seed=0):
        "A function that returns the mode for a pass in which each operation makes a rounding error."
        from ..core.rounding import Rounding
        return lambda model: Rounding(ROUNDING[precision][0], self.generator(seed))

    def run_checks(self, candidates):
        "Compare candidates. Those whose numbers differ by more than rounding explains are eliminated."
        for c in candidates:
            if not c.running: continue
            with self.uncompiled(c):
                args = self.steps.attempt(c, partial(self.compare, c))
                # all processes run the same number of passes, since a model may communicate in them
                if any(gather_from_ranks(args is not None and self.is_large(c, *args))): self.steps.attempt(c, partial(self.explain, c, *args))
            del args  # free its pass and gradients before the next ones are made
        self.learn.model.zero_grad(set_to_none=True)
        self.steps.state.restart()


class TrainingNumbers(Numbers):
    "Compares losses, gradients and running statistics."
    def step(self, c, make_mode) -> tuple: # Loss; gradients in fp32, without the scaler's scale; the mode
        "One step without the optimizer, in the mode that `make_mode(model)` returns."
        while True:
            self.restart()
            self.steps.activate(c, self.callbacks)
            _set_mode(self.learn.model, self.training)
            self.learn.model.zero_grad(set_to_none=True)
            scaler = self.learn.scaler if self.learn.scaler and self.learn.scaler.is_enabled() else None
            scale = scaler.get_scale() if scaler else 1.
            self.stop.mode = mode = make_mode(self.learn.model)
            try:
                with mode: self.one_batch()
            finally: self.stop.mode = None  # it holds results
            grads = [p.grad if p.grad is None else _wide_copy(p.grad)/scale for p in self.learn.model.parameters()]
            if not scaler or scale <= MIN_SCALE or all(g is None or g.isfinite().all() for g in grads): break
            scaler._scale.fill_(scale/16)  # too large for fp16; training would reduce it, too
        return self.learn.loss.detach().float().mean().item(), grads, mode

    def run_baseline(self):
        """In eval mode, or in training mode for detectors: they have no eval-mode loss. Without a dispatch mode if the model
        can't run in one."""
        c, self.params = self.steps.baseline, dict(self.learn.model.named_parameters())
        c.loss_diff = c.grad_diff = 0.
        for self.replays, self.training in (True, False), (True, True), (False, False), (False, True):
            try: self.loss, grads, self.counts = self.step(c, self.record(keep=False))
            except Exception:
                if not self.replays and self.training: raise
            else:
                if self.training or any(g is not None for g in grads): break
        norms = {n: m for n, m in self.learn.model.named_modules() if isinstance(m, NORM) and m.running_var is not None}
        own = self.counts.wrong_statistics(norms, self.tolerance_of(c).result) if self.replays else norms  # computed in their own way
        self.norms = {n: m for n, m in norms.items() if n not in own}
        if not self.replays: self.notes.append(NO_MODE)
        self.finite = math.isfinite(self.loss)
        self.grads = [g if g is None else g.cpu() for g in grads]  # leaves the device's memory to the steps
        self.grad_norm, self.reading_errors = _norm(g for g in self.grads if g is not None), reading_errors(self.learn)

    def compare(self, c) -> tuple|None: # Arguments of `is_large` and `explain`
        """Set `loss_diff` and `grad_diff`. Raise `Eliminated` for infinity, NaN, a failing metric, and an operation that
        differs from that of contiguous fp32, whose step is replayed with the candidate's values: rounding alone drives
        losses and gradients of deep networks far apart."""
        loss, grads, record = self.step(c, self.record())
        self.set_differences(c, loss, grads)
        name = 'loss' if not math.isfinite(loss) else not_finite(zip(map('gradient of {}'.format, self.params), grads))
        if name: raise Eliminated(f'{name} is not finite')
        check_reading(self.learn, self.reading_errors)
        if not self.replays: return None
        statistics = record.wrong_statistics(self.norms, self.tolerance_of(c).result)
        *replayed, mode = self.step(self.steps.baseline, self.replay(c, record))
        if mode.wrong: raise Eliminated(f'{DIFFER} ({mode.wrong[0]})')
        if statistics: raise Eliminated(f'{DIFFER} (running statistics of {statistics[0]})')
        return partial(self.replay, c, record), replayed, self.differences(c, (loss, grads), replayed)

    def set_differences(self, c, loss, grads):
        c.loss_diff = abs(loss - self.loss)/(abs(self.loss) or 1)
        pairs = ((a, b) for a, b in _pairs(grads, self.grads) if a is not None)
        c.grad_diff = _norm(a - b.to(a.device) for a, b in pairs)/(self.grad_norm or 1)

    def differences(self, c, step, reference) -> dict:
        "A `Difference` for the loss and each gradient of two steps, by name."
        (loss, grads), (loss0, grads0), tolerance = step, reference, self.tolerance_of(c)
        errors = [_error(a, b) for a, b in _pairs(grads, grads0)]
        least = SUM_ERROR*math.hypot(*(size for _, size in errors))  # relative to the whole gradient, since some are zero but for rounding
        found = {LOSS: Difference(abs(loss - loss0), abs(loss0), tolerance.output*abs(loss0), True)}
        for (n, p), (off, size) in zip(self.params.items(), errors):
            is_vector = p.dim() < 2 or p.numel() == len(p)  # a number per channel, as of a depthwise 1×1 convolution, too
            limit = max(least, size*(tolerance.vector if is_vector else tolerance.weight))
            found[f'gradient of {n}'] = Difference(off, size, limit, is_vector)
        return found

    def is_large(self, c, rounded, reference, differences) -> bool: return any(o.is_large for o in differences.values())

    def explain(self, c, rounded, reference, differences, eager=None, differ=DIFFER):
        """Repeat the reference's step in the modes `rounded(seed)`, with rounding errors. Eliminates a candidate whose
        differences these don't explain. Some gradients are rounding errors alone, such as that of a bias before a batch
        norm, which subtracts the mean: they may differ by a part of the whole gradient."""
        whole = math.hypot(*(o.size for k, o in differences.items() if k != LOSS))
        large, noise = {k: o for k, o in differences.items() if o.is_large}, {}
        def _is_explained(k, o):
            is_noise = k != LOSS and noise[k] >= NOISE*o.size and o.off <= self.tolerance_of(c).weight*whole
            return o.off <= (NOISE_FACTOR if is_noise else FACTOR)*noise[k]
        for seed in range(PASSES):
            try: step = self.step(eager or self.steps.baseline, rounded(seed))
            except Exception as e:
                raise Eliminated(f'{differ} ({next(iter(large))}); with rounding errors, the model fails: {error_note(e)}') from e
            others = self.differences(c, step[:2], reference)
            noise = {k: max(noise.get(k, 0.), others[k].off) if o.varies or not seed else noise[k] for k, o in large.items()}
            large = {k: o for k, o in large.items() if not _is_explained(k, o)}
            if not large: return
        raise Eliminated(f'{differ} ({next(iter(large))})')

    def check_compiled(self, c, eager):
        """Compare a compiled candidate with the same one uncompiled. Its code for these modes is thrown away."""
        def _step(o): return self.step(o, no_mode)[:2]
        def _check():
            for _ in range(3): loss, grads = _step(c)  # the first step runs uncompiled, the second one compiles
            if c.prepared.reason: raise Eliminated(f'not compiled: {c.prepared.reason}')
            self.set_differences(c, loss, grads)
            reference = _step(eager)
            missing = [n for n, a, b in zip(self.params, grads, reference[1]) if (a is None) != (b is None)]
            if missing: raise Eliminated(f'a gradient is missing only uncompiled, or only compiled ({missing[0]})')
            args = partial(self.rounding, self.precision_of(c)), reference, self.differences(c, (loss, grads), reference)
            if self.is_large(c, *args): self.explain(c, *args, eager=eager, differ='numbers differ when compiled')
        self.steps.attempt(c, _check)
        c.prepared.forget()
        self.learn.model.zero_grad(set_to_none=True)
        self.steps.state.restart()


class PredictionNumbers(Numbers):
    "Compares outputs."
    def outputs(self, c, make_mode=no_mode, passes=1) -> tuple: # Outputs, the mode
        for _ in range(passes):
            self.restart()
            self.steps.activate(c, self.callbacks)
            with make_mode(self.learn.model) as mode: self.one_batch()
        return map_tensors(lambda t: t.detach().clone(), self.learn.pred), mode

    def run_baseline(self):
        self.steps.baseline.pred_diff = 0.
        for self.replays in True, False:
            try: self.reference, self.counts = self.outputs(self.steps.baseline, self.record(keep=False))
            except Exception:
                if not self.replays: raise
            else: break
        if not self.replays: self.notes.append(NO_MODE)
        self.rounding_errors, self.reading_errors = {}, reading_errors(self.learn)

    def compare(self, c) -> tuple|None: # Arguments of `is_large` and `explain`
        """Set `pred_diff`. Raise `Eliminated` for outputs that can't be compared, for a failing metric and, in a model that is
        neither folded nor compiled, for an operation that differs from that of contiguous fp32."""
        if c.setting.compiled and self.batch is not self.whole: self.use_whole_batch()
        plain = self.replays and not c.prepared
        outputs, record = self.outputs(c, self.record() if plain else no_mode, passes=1 + bool(c.prepared))
        c.pred_diff = relative_error(outputs, self.reference)
        if not numbers_of(self.reference): raise Eliminated('outputs hold no numbers to compare with contiguous fp32')
        check_reading(self.learn, self.reading_errors)
        if not plain: return c.pred_diff,
        replayed, mode = self.outputs(self.steps.baseline, self.replay(c, record))
        if mode.wrong: raise Eliminated(f'{DIFFER} ({mode.wrong[0]})')
        return relative_error(outputs, replayed) if record.draws else c.pred_diff,

    def use_whole_batch(self):
        "Only batches of the compiled shape run compiled."
        self.batch = self.whole
        self.run_baseline()

    def is_large(self, c, off) -> bool: return self.replays and not off <= self.tolerance_of(c).output

    def explain(self, c, off):
        precision = self.precision_of(c)
        if precision not in self.rounding_errors:
            rounded, _ = self.outputs(self.steps.baseline, self.rounding(precision))
            self.rounding_errors[precision] = relative_error(rounded, self.reference)
        if not off <= FACTOR*self.rounding_errors[precision]: raise Eliminated(DIFFER)


# what reads a step: metrics, the recorder

def reading_errors(learn) -> dict: # Errors by name
    """Errors of what reads the Learner's last step: its metrics and, in training, its `Recorder`. Their state stays as it
    was."""
    errors, pred, loss, training = {}, learn.pred, learn.loss, learn.training
    recorder, metrics = getattr(learn, 'recorder', None), [*learn.metrics]
    def _score(m): m.reset(); m.accumulate(learn); return m.value
    def _record():
        for event in 'before_fit', 'before_train', 'after_batch': getattr(recorder, event)()
    readers = {f'metric {m.name}': partial(_score, m) for m in metrics} if len(learn.yb) else {}
    if training and recorder: readers[type(recorder).__name__] = _record
    with ExitStack() as undo, restore_random_states(), without_gathering(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.pred, learn.loss = map_tensors(torch.Tensor.detach, (pred, loss))
        for o in (*metrics, *([recorder, recorder.loss, recorder.smooth_loss] if recorder else ())): restore_dict(undo, vars(o))
        restore_dict(undo, vars(learn))
        for name, read in readers.items():
            try: read()
            except Exception as e: errors[name] = e
    learn.pred, learn.loss = pred, loss
    return errors


def check_reading(learn, baseline_errors):
    "Raise `Eliminated` if something fails to read the step that does not fail in contiguous fp32: a fit would fail."
    for name, e in reading_errors(learn).items():
        if name not in baseline_errors: raise Eliminated(f'{name} fails: {type(e).__name__}: {str(e).strip()[:100]}')
