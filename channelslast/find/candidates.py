"What can be measured, and what a Learner has: a memory format, a precision, and the callbacks that make them."
from fastai.callback.channelslast import ChannelsLast as FastaiChannelsLast
from fastai.callback.fp16 import MixedPrecision
from fastcore.foundation import L

from ..core import devices
from ..core.devices import fit_device, free_memory, is_out_of_memory
from ..core.distributed import gather_from_ranks
from ..core.memory_format import align_optimizer, convert_module
from ..fold.fold_batch_norm import FoldBatchNorm
from ..learner.channels_last import ChannelsLast
from ..learner.mixed_precision import DeviceMixedPrecision
from . import selection
from .layer_timing import fp32_names
from .results import Timing

__all__ = ['FORMATS', 'PRECISIONS', 'Eliminated', 'Candidate', 'current_setting', 'apply_timing']

FORMATS, PRECISIONS = ('contiguous', 'channels_last'), ('fp32', 'fp16', 'bf16')


class Eliminated(Exception):
    "Raised inside `Candidate.run_or_eliminate`: the reason why a candidate is out."


def _said(e) -> str:
    "An error as a note."
    if isinstance(e, Eliminated): return str(e)
    said = (str(e).strip() or 'no message').splitlines()[-1].strip()
    return 'out of memory' if is_out_of_memory(e) else f'{type(e).__name__}: {said[:100]}'


class Candidate:
    "A format and precision, with the callbacks that make it, and what was measured of it."
    def __init__(self,
        memory_format: str, # One of `FORMATS`
        precision: str, # One of `PRECISIONS`
        scaler: dict, # Arguments of `torch.amp.GradScaler`
        fp32_layers=(), # Names of layers to leave in fp32
        folded=False, # With `FoldBatchNorm`?
    ):
        self.memory_format, self.base_precision, self.precision = memory_format, precision, precision + '+fp32'*bool(fp32_layers)
        self.folded, self.fp32_layers, self.is_channels_last = folded, fp32_layers, memory_format == 'channels_last'
        self.key = memory_format, self.precision, folded
        self.baseline = self.key == ('contiguous', 'fp32', False)
        self.cbs = [ChannelsLast()]*self.is_channels_last
        for cb in self.cbs: cb.measured = True
        if precision != 'fp32':
            self.cbs.append(DeviceMixedPrecision(precision, fp32_layers, **(scaler if precision == 'fp16' else {})))
        self.fold = FoldBatchNorm() if folded else None
        self.cbs += [self.fold]*folded
        self.ms, self.note, self.running, self.valid, self.scaler = [], '', True, True, None
        self.loss_diff = self.grad_diff = self.pred_diff = self.memory = None

    def eliminate(self, note, valid=False):
        "Not measured further, for this reason."
        self.note, self.running, self.valid = '; '.join(filter(None, [self.note, note])), False, valid

    def activate(self, learn, cbs):
        "Make the Learner, inside `preserve_learner`, train in this format and precision."
        learn.cbs = L(*cbs, *self.cbs)
        for cb in self.cbs: cb.learn = learn
        convert_module(learn.model, self.is_channels_last)
        align_optimizer(learn.opt)
        if self.scaler is None:
            for cb in self.cbs: cb('before_fit')
            self.scaler = False if self.precision == 'fp32' else learn.scaler
        learn.scaler = self.scaler

    def run_or_eliminate(self, learn, f):
        """`f()`, or None where it fails, in this process or in another one of a distributed run. Then the candidate is
        out; an error of contiguous fp32 is the user's own.

        All processes have to call this in the same order, and `f` must not communicate: a process in which `f` fails
        would leave the others waiting."""
        found = error = None
        try: found = f()
        except Exception as e: error = e
        notes = gather_from_ranks(error and _said(error))
        if not any(notes): return found
        found = learn.pred = learn.loss = learn.loss_grad = None  # which hold the activations of the step
        rank, note = next((i, note) for i, note in enumerate(notes) if note)
        if self.baseline: raise error or RuntimeError(f'Process {rank} of {len(notes)}: {note}')
        error = None  # its traceback holds the step's tensors
        learn.model.zero_grad(set_to_none=True)
        free_memory(fit_device(learn))
        self.eliminate(note)

    def timing(self, base) -> Timing:
        "What was measured, beside the milliseconds of contiguous fp32."
        ms, doubt = (selection.fastest(self.ms), selection.uncertainty(self.ms)) if self.ms else (None, None)
        return Timing(self.memory_format, self.precision, ms, ms and base/ms, self.loss_diff, self.grad_diff,
                      self.memory, self.note, bool(self.ms) and self.valid, doubt, self.folded, self.pred_diff)


def current_setting(learn) -> tuple:
    "Memory format and precision that the Learner runs in now, and whether with batch norms folded."
    mp = next(iter(learn._grab_cbs(MixedPrecision)), None)
    device = fit_device(learn)
    works = isinstance(mp, DeviceMixedPrecision) or device.type == 'cuda'  # fastai's own serves CUDA alone
    fast = mp and works and devices.autocast_is_fast(device, mp.amp_mode)
    tuned = '+fp32'*bool(getattr(mp, 'fp32_layers', ()))
    precision = mp.amp_mode.value + tuned if fast else 'fp32'
    return FORMATS[bool(learn._grab_cbs(FastaiChannelsLast))], precision, bool(learn._grab_cbs(FoldBatchNorm))


def apply_timing(learn, row:Timing, layers=(), **scaler):
    """Switch a Learner to the format and precision of a `Timing`, with these GradScaler arguments if it is fp16, and
    fold its batch norms, or not, if that was measured."""
    half, _, tuned = row.precision.partition('+')
    names = tuple(fp32_names(layers, half)) if tuned else ()
    has = tuple(getattr(getattr(learn, 'mixed_precision', None), 'fp32_layers', ()))
    if half == 'fp32': learn.to_fp32().to_channelslast(to_fp16=False)
    elif current_setting(learn)[1] == row.precision and not scaler and names == has: learn.to_channelslast()
    else: learn.to_channelslast(amp_mode=half, fp32_layers=names or None, **(scaler if half == 'fp16' else {}))
    if row.pred_diff is not None: # of predictions
        if not row.folded: learn.remove_cb(FoldBatchNorm)
        elif not learn._grab_cbs(FoldBatchNorm): learn.add_cb(FoldBatchNorm(measured=True))
    else: learn.remove_cbs([o for o in learn._grab_cbs(FoldBatchNorm) if o.measured])
    if row.memory_format != 'channels_last': return learn.to_contiguous()
    learn.channels_last.measured = True
    return learn
