"A Learner's setting as a value: read it, apply it, print the line that sets it."
from dataclasses import dataclass

from fastai.callback.channelslast import ChannelsLast as FastaiChannelsLast
from fastai.callback.fp16 import MixedPrecision

from ..core import devices
from ..core.devices import fit_device
from ..core.memory_format import convert_module
from ..predict.compile_predictions import CompilePredictions
from ..predict.fold_batch_norm import FoldBatchNorm
from ..predict.runtimes import BACKENDS
from .added import added_by_to_fastest, record_added
from .channels_last import ChannelsLast
from .compile_training import CompileTraining
from .fused_optimizer import is_fused, restore_optimizer, use_fused
from .mixed_precision import DeviceMixedPrecision

FORMATS, PRECISIONS = ('contiguous', 'channels_last'), ('fp32', 'fp16', 'bf16')
LABELS = dict(contiguous='contiguous', channels_last='channels last')


@dataclass(frozen=True)
class Setting:
    """Memory format, precision and what else makes training or predictions faster, without changing their numbers by
    more than rounding.

    >>> from channelslast.learner.setting import Setting
    >>> setting = Setting('channels_last', 'bf16', folded=True)
    >>> str(setting), setting.code(train=False)
    ('channels last, bf16, folded', "learn.to_channelslast(amp_mode='bf16').add_cb(FoldBatchNorm())")"""
    memory_format: str = 'contiguous' # One of `FORMATS`
    precision: str = 'fp32'           # One of `PRECISIONS`
    fp32_layers: tuple = ()           # Names of modules that stay in fp32
    folded: bool = False              # With `FoldBatchNorm`; predictions only
    compiled: str = ''                # Backend of `CompilePredictions`, such as `'inductor'`, that of `CompileTraining`
    fused: bool = False               # With the fused step of the Learner's optimizer; training only

    @property
    def is_channels_last(self) -> bool: return self.memory_format == 'channels_last'
    @property
    def precisions(self) -> str: return self.precision + '+fp32'*bool(self.fp32_layers)

    def __str__(self):
        kind = self._compiler('compiled') if self.compiled else 'folded' if self.folded else ''
        return ', '.join(filter(None, [LABELS[self.memory_format], self.precisions, kind, 'fused'*self.fused]))

    def _compiler(self, inductor): # Name of a runtime, or the words for PyTorch's own compiler
        return inductor if self.compiled == 'inductor' else BACKENDS[self.compiled].name if self.compiled else ''

    @property
    def in_words(self) -> str: # In sentences
        name = f"{LABELS[self.memory_format]}{' in' if self.precisions != 'fp32' or self.is_channels_last else ''} {self.precisions}"
        kinds = [self._compiler('the model compiled'), 'batch norms folded'*(self.folded and not self.compiled), 'the fused optimizer'*self.fused]
        return ' with '.join([name, ' and '.join(filter(None, kinds))]) if any(kinds) else name

    @property
    def rank(self) -> tuple:
        "Orders settings: the simpler one first."
        return self.precision != 'fp32', bool(self.fp32_layers), bool(self.compiled), self.folded, self.fused, self.is_channels_last

    @staticmethod
    def of(learn, train=True) -> 'Setting':
        "The Learner's setting for training or predictions."
        mp, device = next(iter(learn._grab_cbs(MixedPrecision)), None), fit_device(learn)
        runs = isinstance(mp, DeviceMixedPrecision) or (mp and device.type == 'cuda')  # fastai's own supports only CUDA
        half, compiled = runs and devices.autocast_is_fast(device, mp.amp_mode), learn._grab_cbs(CompileTraining if train else CompilePredictions)
        return Setting(
            'channels_last' if learn._grab_cbs(FastaiChannelsLast) else 'contiguous', mp.amp_mode.value if half else 'fp32',
            tuple(getattr(mp, 'fp32_layers', ())) if half else (), not train and bool(learn._grab_cbs(FoldBatchNorm)),
            compiled[-1].backend if compiled else '',
            train and is_fused(learn))

    def callbacks(self, train=True, **scaler) -> list:
        "New callbacks that give this setting, for measuring: they don't warn. `scaler` are arguments of `GradScaler`."
        cbs = [ChannelsLast()] if self.is_channels_last else []
        if self.precision != 'fp32':
            cbs.append(DeviceMixedPrecision(self.precision, self.fp32_layers, **(scaler if self.precision == 'fp16' else {})))
        cbs += [FoldBatchNorm()]*self.folded
        if self.compiled: cbs.append(self.compiled_callback(train))
        for cb in cbs: cb.quiet = True
        return cbs

    def compiled_callback(self, train): return CompileTraining() if train else CompilePredictions(self.compiled)

    def apply(self, learn,
        train=True, # For training? False: for predictions
        compiled=None, # Callback that is compiled on copies of these weights already
        compile=False, # Also replace a compiled callback that the user has added?
        **scaler # Arguments of `GradScaler`, for fp16
    ):
        """Switch the Learner to this setting. What this adds is recorded, so that the next call takes it away, as does
        `to_contiguous(to_fp32=True)`. Returns the Learner."""
        before, added = Setting.of(learn, train), added_by_to_fastest(learn)['callbacks']
        if self.precision == 'fp32': learn.to_fp32().to_channelslast(to_fp16=False)
        elif (before.precision, before.fp32_layers) == (self.precision, self.fp32_layers) and not scaler: learn.to_channelslast()
        else: learn.to_channelslast(amp_mode=self.precision, fp32_layers=self.fp32_layers or None, **(scaler if self.precision == 'fp16' else {}))
        kind = CompileTraining if train else CompilePredictions
        gone = [o for o in added if train or not isinstance(o, (CompileTraining, FoldBatchNorm))]
        if compile: gone += learn._grab_cbs(kind)
        if not train and not self.folded: gone += learn._grab_cbs(FoldBatchNorm)
        learn.remove_cbs([o for o in gone if o in learn.cbs])
        new = [FoldBatchNorm()] if self.folded and not learn._grab_cbs(FoldBatchNorm) else []
        if self.compiled and not learn._grab_cbs(kind): new.append(compiled or self.compiled_callback(train))
        record_added(learn, callbacks=[o for o in added if o in learn.cbs] + new)
        learn.add_cbs(new)
        if compiled in new:
            compiled.quiet = False
            learn.model.to(fit_device(learn))  # where it was measured
            convert_module(learn.model, self.is_channels_last)
            compiled.trust()
        if train and self.fused != before.fused: (use_fused if self.fused else restore_optimizer)(learn)
        if self.is_channels_last: learn.channels_last.quiet = True  # numbers and speed were compared
        return learn if self.is_channels_last else learn.to_contiguous()

    def code(self, train=True, optimizer='') -> str:
        "The line that gives a new Learner this setting; `optimizer` is the argument of `Learner` for its fused optimizer."
        amp = 'to_fp16=False' if self.precision == 'fp32' else f'amp_mode={self.precision!r}'
        if self.fp32_layers: amp += f', fp32_layers={[*self.fp32_layers]}'
        calls = [f'to_channelslast({amp})']*(self.is_channels_last or self.precision != 'fp32')
        calls += ['to_contiguous()']*bool(calls and not self.is_channels_last) + ['add_cb(FoldBatchNorm())']*self.folded
        backend = '' if self.compiled == 'inductor' else repr(self.compiled)
        if self.compiled: calls.append('add_cb(CompileTraining())' if train else f'add_cb(CompilePredictions({backend}))')
        line = '.'.join(['learn', *(calls or ['to_contiguous(to_fp32=True)'])])
        return f"learn.{optimizer.replace('=', ' = ', 1)}; {line}" if self.fused and optimizer else line
