"Candidates: a memory format and a precision, with the callbacks for them. Also reads and changes a Learner's setting."
from fastai.callback.channelslast import ChannelsLast as FastaiChannelsLast
from fastai.callback.fp16 import MixedPrecision
from fastcore.foundation import L

from ..core import devices
from ..core.devices import fit_device, free_memory, is_out_of_memory
from ..core.distributed import gather_from_ranks
from ..core.memory_format import align_optimizer, convert_module
from ..predict.compile_predictions import CompilePredictions
from ..learner.compile_training import CompileTraining
from ..predict.fold_batch_norm import FoldBatchNorm
from ..learner.channels_last import ChannelsLast
from ..learner.mixed_precision import DeviceMixedPrecision
from . import selection
from .layer_timing import fp32_names
from .results import Timing

__all__ = ['FORMATS', 'PRECISIONS', 'Eliminated', 'Candidate', 'current_setting', 'apply_timing']

FORMATS, PRECISIONS = ('contiguous', 'channels_last'), ('fp32', 'fp16', 'bf16')


class Eliminated(Exception):
    "Raised inside `Candidate.run_or_eliminate`, with the reason why the candidate is eliminated."


def _error_note(e) -> str:
    if isinstance(e, Eliminated): return str(e)
    if is_out_of_memory(e): return 'out of memory'
    return f"{type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[-1].strip()[:100]}"


class Candidate:
    "A memory format and precision, the callbacks for them, and their measurements."
    def __init__(self,
        memory_format: str, precision: str, # One of `FORMATS` and one of `PRECISIONS`
        scaler: dict, # Arguments of `torch.amp.GradScaler`
        fp32_layers=(), # Names of layers to keep in fp32
        folded=False, # With `FoldBatchNorm`?
        compile=None, # `CompilePredictions` or `CompileTraining`
    ):
        self.memory_format, self.base_precision = memory_format, precision
        self.precision = f'{precision}+fp32' if fp32_layers else precision
        self.folded, self.fp32_layers, self.is_channels_last = folded, fp32_layers, memory_format == 'channels_last'
        self.compiled, self.compile = bool(compile), compile and compile()
        self.key = memory_format, self.precision, folded, self.compiled
        self.is_baseline = self.key == ('contiguous', 'fp32', False, False)
        self.cbs = [ChannelsLast()] if self.is_channels_last else []
        for cb in self.cbs: cb.measured = True
        if precision != 'fp32':
            self.cbs.append(DeviceMixedPrecision(precision, fp32_layers, **(scaler if precision == 'fp16' else {})))
        self.fold = FoldBatchNorm() if folded else None
        self.cbs += [cb for cb in (self.fold, self.compile) if cb]
        if compile: self.compile.quiet = True
        self.ms, self.note, self.running, self.valid, self.scaler = [], '', True, True, None
        self.loss_diff = self.grad_diff = self.pred_diff = self.memory = None

    def eliminate(self, note, valid=False):
        "Stop measuring this candidate, for the reason in `note`."
        if self.compile: self.compile.forget()
        self.note, self.running, self.valid = '; '.join(filter(None, [self.note, note])), False, valid

    def activate(self, learn, cbs):
        "Switch the Learner, inside `preserve_learner`, to this memory format and precision."
        learn.cbs = L(*cbs, *self.cbs)
        for cb in self.cbs: cb.learn = learn
        convert_module(learn.model, self.is_channels_last)
        align_optimizer(learn.opt)
        if self.compiled: self.compile.trust()  # the conversion moved the weights
        for cb in self.cbs: cb('before_validate')
        if self.scaler is None:
            for cb in self.cbs: cb('before_fit')
            self.scaler = False if self.precision == 'fp32' else learn.scaler
        learn.scaler = self.scaler

    def run_or_eliminate(self, learn, f):
        """Return `f()`. If it fails in any process of a distributed run, return None and eliminate the candidate, or
        raise the error if this is contiguous fp32. All processes must call this in the same order, and `f` must not
        communicate: if it failed in one process, the others would wait forever."""
        result = error = None
        try: result = f()
        except Exception as e: error = e
        notes = gather_from_ranks(error and _error_note(error))
        if not any(notes): return result
        result = learn.pred = learn.loss = learn.loss_grad = None  # they hold the step's activations
        rank, note = next((i, note) for i, note in enumerate(notes) if note)
        if self.is_baseline: raise error or RuntimeError(f'Process {rank} of {len(notes)}: {note}')
        error = None  # its traceback holds the step's tensors
        learn.model.zero_grad(set_to_none=True)
        free_memory(fit_device(learn))
        self.eliminate(note)

    def timing(self, base_ms) -> Timing:
        "The measurements, with the speedup over `base_ms`, the milliseconds of contiguous fp32."
        ms, doubt = (selection.fastest(self.ms), selection.uncertainty(self.ms)) if self.ms else (None, None)
        return Timing(self.memory_format, self.precision, ms, ms and base_ms/ms, self.loss_diff, self.grad_diff,
                      self.memory, self.note, bool(self.ms) and self.valid, doubt, self.folded, self.pred_diff,
                      self.compiled, self.compile and self.compile.seconds)


def current_setting(learn, train=True) -> tuple: # Memory format; precision; True if folded; True if compiled
    "The Learner's current setting for training or predictions."
    mp, device = next(iter(learn._grab_cbs(MixedPrecision)), None), fit_device(learn)
    runs = isinstance(mp, DeviceMixedPrecision) or (mp and device.type == 'cuda')  # fastai's own supports only CUDA
    precision = mp.amp_mode.value if runs and devices.autocast_is_fast(device, mp.amp_mode) else 'fp32'
    if precision != 'fp32' and getattr(mp, 'fp32_layers', ()): precision += '+fp32'
    memory_format = 'channels_last' if learn._grab_cbs(FastaiChannelsLast) else 'contiguous'
    folded = not train and bool(learn._grab_cbs(FoldBatchNorm))
    return memory_format, precision, folded, bool(learn._grab_cbs(CompileTraining if train else CompilePredictions))


def _add_compiled(learn, row, cb):
    "Add a callback that was compiled on copies of these weights, or not at all."
    learn.add_cb(cb)
    cb.measured, cb.quiet = True, False
    learn.model.to(fit_device(learn))  # where it was measured
    convert_module(learn.model, row.memory_format == 'channels_last')
    cb.trust()


def apply_timing(learn, row:Timing, layers=(), compiled=None, compile=False, **scaler):
    """Switch the Learner to the memory format and precision of a `Timing`; for fp16 with these arguments of
    `GradScaler`. A `Timing` of predictions also adds or removes `FoldBatchNorm`. One of training removes it if
    `to_fastest` added it."""
    half, _, mixed = row.precision.partition('+')
    names = tuple(fp32_names(layers, half)) if mixed else ()
    current_names = tuple(getattr(getattr(learn, 'mixed_precision', None), 'fp32_layers', ()))
    if half == 'fp32': learn.to_fp32().to_channelslast(to_fp16=False)
    elif current_setting(learn)[1] == row.precision and names == current_names and not scaler: learn.to_channelslast()
    else: learn.to_channelslast(amp_mode=half, fp32_layers=names or None, **(scaler if half == 'fp16' else {}))
    train = row.pred_diff is None
    kinds = [CompileTraining, CompilePredictions] if train else [CompilePredictions]
    learn.remove_cbs([o for k in kinds for o in learn._grab_cbs(k) if o.measured or compile and k is kinds[0]])
    if train:
        learn.remove_cbs([o for o in learn._grab_cbs(FoldBatchNorm) if o.measured])
    elif not row.folded: learn.remove_cb(FoldBatchNorm)
    elif not learn._grab_cbs(FoldBatchNorm):
        learn.add_cb(FoldBatchNorm())
        learn.fold_batch_norm.measured = True
    if row.compiled: _add_compiled(learn, row, compiled or kinds[0]())
    if row.memory_format == 'contiguous': return learn.to_contiguous()
    learn.channels_last.measured = True
    return learn
