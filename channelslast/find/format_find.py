"`Learner.format_find` measures settings; `Learner.to_fastest` switches to the fastest one."
import math
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count

import torch
from fastai.callback.mixup import MixHandler
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip
from fastai.learner import Learner
from fastai.torch_core import num_distrib
from fastcore.basics import patch
from fastcore.meta import delegates
from fastprogress.fastprogress import progress_bar

from ..core.devices import fit_device, free_memory
from ..core.distributed import broadcast_from_rank0, is_single_process, together
from ..core.undo import uninterrupted
from ..learner.added import added_by_to_fastest
from ..learner.compile_training import CompileTraining
from ..learner.fused_optimizer import follow_opt_func, fused_argument, restore_optimizer
from ..learner.mixed_precision import check_scaler
from ..learner.preserve_learner import preserve_learner
from ..learner.setting import Setting
from ..predict.compile_predictions import CompilePredictions
from ..predict.runtimes import BACKENDS, missing_packages
from . import proposals
from .arguments import checked_batches, checked_loader, chosen_settings
from .numbers import PredictionNumbers, TrainingNumbers
from .race import MIN_ROUNDS, TIE, decide, fastest, race, uncertainty
from .results import FormatTimings, Timing
from .steps import Steps, error_note

MAX_ROUNDS, EXTRA_ROUNDS = 15, 45  # of steps; extra ones while all steps may lie in one slow phase of the machine
FEW = 2  # rounds before layers in fp32, folded batch norms and compiled predictions join the race
JOINING = 4  # factor of the progress bar: settings that join, their first steps and comparisons
STEP_CALLBACKS = GradientAccumulation, GradientClip, MixHandler, BnFreeze  # part of a step, like all that change data
MULTI_DEVICE = 'ParallelTrainer', 'DistributedTrainer'  # by name: importing `fastai.distributed` needs accelerate


def _frozen(opt) -> tuple:
    "Numbers of frozen and of all weights in the optimizer's groups, which `learn.unfreeze()` would train."
    ps = {p for group in opt.param_lists for p in group}
    return sum(p.numel() for p in ps if not p.requires_grad), sum(p.numel() for p in ps)


def _without_synchronization(model) -> bool: # True if there was any
    "Have `SyncBatchNorm`s use their own process's batch only: if a step fails in one process, the others would wait."
    norms = [m for m in model.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    if not norms or is_single_process(): return False
    own, _ = torch.distributed.new_subgroups(group_size=1)
    for m in norms: m.process_group = own
    return True


class Measurement:
    "One call of `format_find`, with its arguments."
    def __init__(self, learn, precisions=None, formats=None, num_it=None, layers=True, train=True, dl=None, compile=False,
                 optimizer=True, **scaler):
        self.learn, self.train, self.compile, self.optimizer, self.layers, self.scaler = learn, train, compile, optimizer, layers, scaler
        self.loader = checked_loader(learn, train, num_it, dl, compile=compile, optimizer=optimizer, layers=layers)
        self.rounds, self.extra_rounds = (MAX_ROUNDS, EXTRA_ROUNDS) if num_it is None else (num_it, 0)
        self.wrapped = [type(o).__name__ for o in learn.cbs if type(o).__name__ in MULTI_DEVICE]  # callbacks that wrap the model
        self.bs, self.notes = getattr(self.loader, 'bs', None) or getattr(self.loader, 'batch_size', None), []
        self.current = Setting.of(learn, train)
        kind = CompileTraining if train else CompilePredictions
        if self.current.compiled and not compile:  # otherwise it is not measured
            self.current = replace(self.current, compiled='')
            if {*learn._grab_cbs(kind)} - {*added_by_to_fastest(learn)['callbacks']}:
                self.notes.append(f'Measured uncompiled: `{kind.__name__}` stays. Pass `compile=True` to measure it, too.')
        self.runtimes = [] if train else self.other_runtimes()
        own_fused = train and self.current.fused and not (optimizer and added_by_to_fastest(learn)['optimizer'])
        self.settings = chosen_settings(learn, formats, precisions, own_fused)

    def run(self) -> tuple: # `FormatTimings`; the best candidate's compiled callback, or None
        "Measure, as documented in `format_find`."
        with preserve_learner(self.learn, STEP_CALLBACKS if self.train else (), eager=False, loader=self.loader) as originals:
            with torch.set_grad_enabled(self.train):
                race_result, steps = self.measure(originals)
        timings, best = self.result(race_result, steps), broadcast_from_rank0(race_result.decision.best)
        compiled = steps.candidates[best].prepared if best.compiled else None  # for the Learner: it is not compiled again
        steps = race_result = originals = None  # free batches and prepared weights
        free_memory(fit_device(self.learn))
        vars(timings).update(broadcast_from_rank0(vars(timings)))
        return timings, compiled

    def prepare(self, originals) -> Steps:
        learn = self.learn
        batches, self.loader_ms = checked_batches(learn, self.loader, self.train)
        if self.train and self.optimizer: restore_optimizer(learn)  # measure from the Learner's own
        if self.train: follow_opt_func(learn)  # as the next fit does
        if self.train and learn.opt is None: learn.create_opt()
        if self.train: learn.opt.set_hypers(lr=0.)  # keeps the weights the same for every candidate
        learn.dl, learn.n_iter = self.loader, MAX_ROUNDS + EXTRA_ROUNDS  # callbacks read the loader, and divide by `n_iter`
        steps = Steps(learn, self.train, batches, originals, self.bs, self.scaler)  # moves the model to the device
        self.frozen, self.advice = (_frozen(learn.opt), fused_argument(learn)) if self.train else (None, None)
        return steps

    def measure(self, originals) -> tuple: # The race's `Result`, `Steps`
        if _without_synchronization(self.learn.model): self.notes.append('Measured without the communication of `SyncBatchNorm`.')
        steps = together(partial(self.prepare, originals), error_note)
        with self.progress(steps):
            for s in self.settings: steps.warm_up(steps.add(s))
            numbers = (TrainingNumbers if self.train else PredictionNumbers)(steps)
            numbers.start()
            numbers.run_checks(steps.running[1:])
            settings = proposals.time_optimizer(steps, self.tries_fused) if self.train else [c.setting for c in steps.running]
            self.incumbent = replace(self.current, fused=True) if settings[0].fused else self.current  # on a CPU, all have the faster one
            result = race(lambda s, i: steps.timed_step(steps.candidates[s], i), settings, self.incumbent, self.rounds, self.extra_rounds,
                          stages=self.stages(steps, numbers), rank=lambda s: s.rank, agree=broadcast_from_rank0)
            base, ms = self.settings[0], steps.optimizer_ms
            if settings[0] != base: result.times = {base: [o - ms[True] + ms[False] for o in result.times[settings[0]]], **result.times}
        self.notes += numbers.notes
        if self.train and result.decision.best.compiled: self.judge_compilation(result, steps)
        return result, steps

    @property
    def tries_fused(self) -> bool: return self.optimizer and self.advice is not None

    def stages(self, steps, numbers) -> list:
        "Rounds, and a function that proposes more settings after them."
        half = any(s.precision != 'fp32' for s in self.settings)
        fused, compile = self.tries_fused and not steps.optimizer_ms, self.compile and not self.wrapped
        if self.train: more = [(MIN_ROUNDS, proposals.with_fused_optimizer, fused), (MIN_ROUNDS, proposals.compiled_training, compile)]
        else: more = [(FEW, proposals.with_folded_batch_norms, True), (FEW, partial(proposals.compiled_predictions, backends=self.backends), compile)]
        layers = [(FEW, partial(proposals.with_fp32_layers, steps, numbers))] if half and self.layers else []
        return layers + [(n, partial(f, steps, numbers)) for n, f, wanted in more if wanted]

    @property
    def backends(self) -> list: # Of `CompilePredictions`, as far as they are installed and run on the device
        on_cpu = fit_device(self.learn).type == 'cpu'
        return broadcast_from_rank0([k for k in BACKENDS if k == 'inductor' or on_cpu and not missing_packages(k)])

    @contextmanager
    def progress(self, steps):
        "A bar that counts passes. The race ends as soon as the choice is clear, so it may end early."
        if not hasattr(self.learn, 'progress'):  # `no_bar` removes it
            yield
            return
        total, passes = JOINING*len(self.settings)*(1 + self.rounds), count(1)
        bar = progress_bar(range(total), leave=False)
        def _on_pass(): bar.update(min(next(passes), total - 1))
        bar.update(0)
        steps.on_pass = _on_pass
        yield
        bar.update(total)
        bar.on_iter_end()

    def judge_compilation(self, result, steps):
        "Choose again without the compiled candidate if an epoch of the loader does not earn its compilation back."
        best, eager = result.decision.best, {s: ms for s, ms in result.times.items() if ms and not s.compiled and steps.candidates[s].running}
        gain, seconds = min(map(fastest, eager.values())) - fastest(result.times[best]), steps.candidates[best].prepared.seconds
        try: batches = len(self.loader)
        except TypeError: return
        if gain <= 0 or not batches: return  # the current setting, within a tie
        epochs = math.ceil(1e3*seconds/gain/batches)
        if epochs <= 1: return
        result.decision = decide({s: eager[s] for s in sorted(eager, key=lambda s: (s != self.incumbent, s.rank))}, self.incumbent)
        steps.candidates[best].note = f'{epochs:,} epochs earn the compilation back'
        self.notes.append(f'Compiled, a step would be {1 + gain/fastest(result.times[best]):.2f}× as fast: {epochs:,} epochs earn back the '
                          f'{seconds:.0f} s of the compilation. For a longer training, `learn.add_cb(CompileTraining())`.')

    def result(self, race_result, steps) -> FormatTimings:
        times, decision, base = race_result.times, race_result.decision, fastest(race_result.times[self.settings[0]])
        def _timing(s, c):
            ms, note = times.get(s), c.note
            if s in race_result.far_behind: note = '; '.join(filter(None, [note, f'dropped after {len(ms)} steps: far slower']))
            best = fastest(ms) if ms else None
            return Timing(s, best, ms and base/best, c.loss_diff, c.grad_diff, memory=c.memory, note=note, valid=bool(ms) and c.running,
                          doubt=uncertainty(ms) if ms else None, pred_diff=c.pred_diff, compile_s=c.prepared.seconds if s.compiled else None)
        rows = {s: _timing(s, c) for s, c in steps.candidates.items()}
        own = self.settings[0].fused
        return FormatTimings(
            [*rows.values()], rows[decision.best], max(TIE, decision.max_gain), rows.get(decision.rival), self.loader_ms,
            optimizer_ms=steps.optimizer_ms.get(own), fused_ms=None if own else steps.optimizer_ms.get(True),
            advice=self.advice, train=self.train, frozen=self.frozen, notes=[*self.notes, *self.conditions(steps.bs)], current=self.current,
            few_rounds=self.rounds < MAX_ROUNDS)

    def conditions(self, used) -> list:
        "Sentences on how the measured step differs, or may differ, from steps of a later fit."
        notes = [*self.runtimes]
        if self.compile and self.wrapped: notes.append(f'The model stays uncompiled, because `{self.wrapped[0]}` wraps it.')
        if used != self.bs:
            notes.append(f'Measured on {used} of the {self.bs} items of each batch: contiguous fp32 has no memory for more.')
        if self.wrapped: notes.append(f'Measured in one process on one device, without `{self.wrapped[0]}` and its communication.')
        if fit_device(self.learn).type == 'cuda' and not torch.backends.cudnn.benchmark:
            notes.append('Measured with `torch.backends.cudnn.benchmark = False`. Measure again if you set it to True: '
                         'cuDNN then chooses other kernels.')
        return notes

    def other_runtimes(self) -> list:
        "A sentence on runtimes that were not tried: why, and how to."
        installed = ' and '.join(b.name for k, b in BACKENDS.items() if k != 'inductor' and not missing_packages(k))
        if fit_device(self.learn).type != 'cpu': return [f'Not tried: {installed}, for CPUs only.'] if installed and self.compile else []
        if installed: return [] if self.compile else [f'Not tried: {installed}. `compile=True` measures what is installed.']
        return ['OpenVINO and ONNX Runtime often predict faster on CPUs: `pip install openvino onnx onnxruntime`, then pass `compile=True`. With '
                'the faster one, `learn.predict` of five networks was 1.2 to 2.2 times as fast on two cores (nbs/05_benchmarks.ipynb).']


@patch
@delegates(torch.amp.GradScaler, but=['device'])
def format_find(self:Learner,
    precisions=None, # Some of `'fp32'`, `'fp16'`, `'bf16'`; None: fp32 and those that are fast on the device
    formats=None, # Some of `'contiguous'`, `'channels_last'`; None: both
    num_it:int=None, # Maximum timed steps per setting; None: 15, or up to 60 if all steps are very short
    show_plot:bool=True, # Draw the chart?
    layers:bool=True, # Also try depthwise convolutions in fp32, next to half precision?
    train:bool=True, # Measure training steps? False: predictions, as `get_preds` makes them
    dl=None, # Data to predict on, in batches of the size you will use; None: the validation loader
    compile:bool=False, # Also measure the model compiled? Each compilation takes seconds to minutes
    optimizer:bool=True, # Also measure the fused step of the same optimizer (`fused`)? Training only
    **kwargs
) -> FormatTimings:
    """Measure a training step, or predictions with `train=False`, in each setting. The Learner stays bit for bit
    unchanged. Returns a `FormatTimings`: a row per setting, the best one, a verdict.

    Settings are memory formats and precisions; then depthwise convolutions in fp32, the fused optimizer (training), folded
    batch norms (predictions), and with `compile=True` the model compiled by `torch.compile`, which needs a C++ compiler,
    and for predictions on a CPU by OpenVINO and ONNX Runtime, if they are installed. Settings take turns on a few batches,
    and the fastest step of each counts. A setting whose loss, gradients or outputs differ from those of contiguous fp32 by
    more than rounding explains is refused. The batch size affects which one is fastest. `nbs/03_format_find.ipynb` shows
    how it works.

    Costs the memory of one more copy of the model and the optimizer's state. Other threads must not run the model meanwhile:
    its weights change their format and, while training is measured, their values. Other arguments are those of
    `torch.amp.GradScaler`, for fp16. Raises `ValueError` for invalid arguments, a model that can't train or has
    half-precision weights, and a loader without batches or labels. Errors in contiguous fp32 are raised; an error in
    another setting becomes its `note`.

    >>> from fastai.vision.all import *
    >>> dl = DataLoader([(torch.randn(3, 32, 32), torch.tensor(0))]*8, bs=4)
    >>> learn = Learner(DataLoaders(dl, dl), xresnet18(n_out=2), CrossEntropyLossFlat())
    >>> with learn.no_bar(): t = learn.format_find(precisions='fp32', num_it=1, show_plot=False, optimizer=False)
    >>> [str(r.setting) for r in t.rows]
    ['contiguous, fp32', 'channels last, fp32']"""
    check_scaler(Learner.format_find, kwargs)
    result, _ = Measurement(self, precisions, formats, num_it, layers, train, dl=dl, compile=compile, optimizer=optimizer, **kwargs).run()
    if show_plot: result.plot()
    return result


@patch
@delegates(Learner.format_find)
def to_fastest(self:Learner, *,
    show_plot:bool=False, # Draw the chart?
    **kwargs
):
    """Measure with `format_find`, switch to the fastest setting, print it, and return the Learner.

    A later call replaces what this call added, and `to_contiguous(to_fp32=True)` takes it away. `optimizer=False` leaves
    the optimizer alone. A compiled model is used as it was measured: only batches of that shape run compiled. In an app,
    call `learn = load_learner('export.pkl')`, then `learn.to_fastest(train=False, dl=learn.dls.test_dl(files, bs=1))`.

    The measurements are kept in `learn.format_timings`. In a distributed run, call it inside `learn.distrib_ctx()`, so
    that all processes take rank 0's choice; outside, each would make its own, so it raises `ValueError`.

    >>> from fastai.vision.all import *
    >>> dl = DataLoader([(torch.randn(3, 32, 32), torch.tensor(0))]*8, bs=4)
    >>> learn = Learner(DataLoaders(dl, dl), xresnet18(n_out=2), CrossEntropyLossFlat())
    >>> with learn.no_bar(): learn = learn.to_fastest(precisions='fp32', num_it=1) # doctest: +ELLIPSIS
    Training ... contiguous..."""
    check_scaler(Learner.to_fastest, kwargs)
    if num_distrib() > 1 and not torch.distributed.is_initialized():
        raise ValueError('to_fastest(): each process would choose on its own; call it in `with learn.distrib_ctx():`')
    measurement = Measurement(self, **kwargs)
    timings, compiled = measurement.run()
    if show_plot: timings.plot()
    with uninterrupted(): timings.best.setting.apply(self, timings.train, compiled, measurement.compile, **measurement.scaler)
    self.format_timings = timings
    print(' '.join([timings.outcome, *measurement.notes]))
    if timings.code: print(f'Without measuring: {timings.code}')
    for text in measurement.runtimes: print(text)
    return self
