"Results of `format_find`: the measurements, and the table, verdict and chart made from them."
import html
import math
from dataclasses import asdict, dataclass, is_dataclass

import pandas as pd

from .selection import TIE

__all__ = ['BEST', 'OTHER', 'LABELS', 'Timing', 'FormatTimings', 'label', 'bars']

NOISY = 0.1  # margin above which the verdict suggests measuring again
LARGE_SHARE = 0.1  # the optimizer's share of a step above which the verdict mentions it
MEMORY_GAIN = 0.05  # gain of `keep_memory()` above which the verdict mentions it
NOTE_WIDTH = 80  # characters of a printed note: with the other columns, lines have at most 160
BEST, OTHER, FAILED = '#0072B2', '#B0B7BF', '#E6E6E6'  # colors of bars
LABELS = dict(contiguous='contiguous', channels_last='channels last')


@dataclass(frozen=True)
class Timing:
    """Measurements of one memory format and precision.

    >>> from channelslast.find.results import Timing
    >>> Timing('channels_last', 'bf16', ms=61., speedup=1.64)  # doctest: +ELLIPSIS
    Timing(memory_format='channels_last', precision='bf16', ms=61.0, speedup=1.64, ...)"""
    memory_format: str      # `'contiguous'` or `'channels_last'`
    precision: str          # `'fp32'`, `'fp16'`, `'bf16'`; with some layers in fp32 `'fp16+fp32'`, `'bf16+fp32'`
    ms: float = None        # Fastest measured training step (or batch's predictions); None if it could not run
    speedup: float = None   # Over contiguous fp32 with the Learner's own optimizer
    loss_diff: float = None # Relative difference of the loss from contiguous fp32; eval mode (detectors: training mode)
    grad_diff: float = None # The same for all gradients: norm of the difference divided by their norm
    memory: float = None    # Peak MiB on the device; None where the device can't tell
    note: str = ''          # How many layers stay in fp32; why it was eliminated or measured in fewer steps
    valid: bool = True      # True if it ran and computes the same, so that it may be chosen
    doubt: float = None     # Uncertainty: the true step may be up to this fraction faster than `ms`
    folded: bool = False    # With `FoldBatchNorm`; predictions only
    pred_diff: float = None # Relative difference of all outputs from contiguous fp32; predictions only
    compiled: bool = False  # With the model compiled: `CompilePredictions`, in training `CompileTraining`
    compile_s: float = None # Seconds that the compilation took


def label(row: Timing) -> str:
    kind = ', compiled' if row.compiled else ', folded' if row.folded else ''
    return f'{LABELS[row.memory_format]}, {row.precision}{kind}'
def _name(row: Timing) -> str: # In sentences
    name = label(row).replace('contiguous, fp32', 'contiguous fp32').replace(', folded', ' with batch norms folded')
    name = name.replace(', compiled', ' with the model compiled')
    return name.replace(', ', ' in ')
def _plain(o): return asdict(o) if is_dataclass(o) else o


class FormatTimings:
    """Result of `Learner.format_find`. Prints as a table, also in a notebook.

    - `rows`: one `Timing` per candidate; `best`: the one to use
    - `rival`: the one that may be faster than `best`; `margin`: by up to this fraction, at least 0.02, a tie
    - `loader_ms`: milliseconds to load a batch; `input_bound`: True if that is longer than the fastest step
    - `optimizer_ms`: the optimizer's part of the best step; `fused_ms`: that of its fused step, if it was timed
    - `fused`: True if that is clearly faster, so that all times are with it: `to_fastest` puts it in
    - `advice`: argument of `Learner` for a faster optimizer step with the same weights, if one is known
    - `memory_gain`: with `keep_memory()`, the best step is this many times as fast; None if not measured
    - `layers`: one `LayerTiming` per distinct layer and half precision; `notes`: conditions of the measurement
    - `frozen`: numbers of frozen and of all parameters in the optimizer's groups; None for predictions

    >>> from channelslast.find.results import FormatTimings, Timing
    >>> rows = [Timing('contiguous', 'fp32', 100., 1.), Timing('channels_last', 'bf16', 61., 1.64)]
    >>> print(FormatTimings(rows, best=rows[1], margin=0.02, loader_ms=8.).verdict)
    Use channels last in bf16: 1.64× as fast as contiguous fp32 (differences below 2% count as a tie)."""
    def __init__(self, rows, best, margin, loader_ms, layers=(), rival=None, optimizer_ms=None, advice=None,
                 train=True, frozen=None, notes=(),
                 fused_ms=None, fused=False, memory_gain=None,
                 current=('contiguous', 'fp32', False, False)): # The Learner's setting, as from `current_setting`
        self.rows, self.best, self.margin, self.rival = list(rows), best, margin, rival
        self.loader_ms, self.layers, self.optimizer_ms, self.advice = loader_ms, list(layers), optimizer_ms, advice
        self.train, self.frozen, self.notes, self._current = train, frozen, list(notes), current
        self.fused_ms, self.fused, self.memory_gain = fused_ms, fused, memory_gain

    @property
    def fastest_ms(self) -> float: return min(r.ms for r in self.rows if r.valid)
    @property
    def input_bound(self) -> bool: return self.loader_ms > self.fastest_ms

    def __reduce__(self): # an exported Learner that holds this loads where this library is not installed
        return dict, ({k: list(map(_plain, v)) if isinstance(v, list) else _plain(v) for k, v in vars(self).items()},)
    def __copy__(self): return self
    def __deepcopy__(self, memo): return self

    def to_frame(self) -> pd.DataFrame:
        "One row per candidate, with the fields of `Timing` in full."
        return pd.DataFrame([asdict(r) for r in self.rows])

    @property
    def verdict(self) -> str:
        "What to do, in a few sentences."
        return ' '.join(self._sentences())

    def _sentences(self) -> list:
        again = self.margin > NOISY and 'Measure again when this machine is less busy.'
        sentences = [self._choice, again, self._compiling, self._loader, self._optimizer, self.memory_hint,
                     self.frozen_hint]
        return [*filter(None, [*sentences, *self.notes])]

    @property
    def _choice(self) -> str:
        b, name = self.best, _name(self.best)
        use = 'Keep' if (b.memory_format, b.precision, b.folded, b.compiled) == self._current else 'Use'
        speed = '' if name == 'contiguous fp32' else f'{b.speedup:.2f}× as fast as contiguous fp32'
        if self.margin > TIE:
            gain = f'up to {self.margin:.0%} faster' if self.margin < 1 else 'more than twice as fast'
            pick = f'{name} ({speed})' if speed else name
            return f'Undecided: {use.lower()} {pick}, but {_name(self.rival)} may be {gain}.'
        if speed: return f'{use} {name}: {speed} (differences below {TIE:.0%} count as a tie).'
        others = [r.valid for r in self.rows if r is not b and r.ms]
        if len(self.rows) == 1: return f'{use} {name}: nothing else was measured.'
        subject = 'nothing else' if all(others) else 'no other valid setting'
        return f'{use} {name}: {subject} was ' + (f'more than {TIE:.0%} faster.' if others else 'usable.')

    @property
    def _compiling(self) -> str:
        if not self.best.compiled: return ''
        gain = min(r.ms for r in self.rows if r.valid and not r.compiled) - self.best.ms
        batches = f': {math.ceil(self.best.compile_s*1e3/gain):,} batches earn it back' if gain > 0 else ''
        return f'The compilation took {self.best.compile_s:.0f} s{batches}.'

    @property
    def _loader(self) -> str:
        if not self.input_bound: return ''
        what, do = ('Training is', 'train on') if self.train else ('Predictions are', 'predict')
        return (f'{what} limited by data loading: {self.loader_ms:.1f} ms to load a batch, {self.fastest_ms:.1f} ms to '
                f'{do} it. Speed up the DataLoader first.')

    @property
    def _optimizer(self) -> str:
        if self.fused:
            return (f'All times are with the fused step of the same optimizer, which takes '
                    f'{self.optimizer_ms - self.fused_ms:.1f} ms less. `to_fastest()` puts it in, as does '
                    f'`{self.advice}` in `Learner`.')
        share = (self.optimizer_ms or 0)/self.best.ms
        if share <= LARGE_SHARE: return ''
        helps = self.advice and self.fused_ms is None
        advice = f' Pass `{self.advice}` to `Learner`: the same weights in less time.' if helps else ''
        return f'The optimizer takes {self.optimizer_ms:.1f} ms of each step ({share:.0%}).{advice}'

    @property
    def memory_hint(self) -> str:
        "A sentence on `keep_memory()`; empty if it gains little."
        if (self.memory_gain or 0) <= 1 + MEMORY_GAIN: return ''
        what, before = ('the step', 'training') if self.train else ('predictions', 'predicting')
        return f'`keep_memory()` makes {what} {self.memory_gain:.2f}× as fast: call it before {before}.'

    @property
    def frozen_hint(self) -> str:
        "A sentence or two on frozen parameters; empty if there are none."
        if not self.frozen or not self.frozen[0]: return ''
        return (f'{self.frozen[0]:,} of {self.frozen[1]:,} parameters are frozen. To train them later, call '
                '`learn.unfreeze()` and measure again.')

    def __repr__(self):
        return '\n'.join([_table(self).to_string(index=False, max_colwidth=NOTE_WIDTH), *self._sentences()])
    def _repr_html_(self): return f'{_table(self).to_html(index=False)}<p>{html.escape(self.verdict)}</p>'

    def plot(self,
        ax=None, # matplotlib axes to draw on; None makes new ones
    ):
        "Draw the speedup of each candidate that ran as bars, with a line at contiguous fp32. Returns the axes."
        from matplotlib import pyplot as plt
        rows, what = [r for r in self.rows if r.ms], 'a training step' if self.train else 'predictions'
        if ax is None: ax = plt.subplots(figsize=(7, 0.9 + 0.45*len(rows)), layout='constrained')[1]
        ax.axvline(1, color='#444444', lw=1, ls='--')
        def _text(r):
            return f"{r.speedup:.2f}×  ({r.ms:.{0 if r.ms >= 100 else 1}f} ms){'' if r.valid else '  failed'}"
        colors = [BEST if r is self.best else OTHER if r.valid else FAILED for r in rows]
        bars(ax, [label(r) for r in rows], [r.speedup for r in rows], [_text(r) for r in rows], colors)
        own = ' with the plain optimizer' if self.fused else ''
        ax.set(xlabel=f'speedup of {what} over contiguous fp32{own} (dashed)', title=f'Suggested: {label(self.best)}')
        return ax


def _table(t) -> pd.DataFrame:
    "The measurements as text, without columns that hold nothing."
    def _num(v, spec): return '–' if v is None else format(v, spec)
    table = pd.DataFrame([{
        '': '→' if r is t.best else '', 'format': LABELS[r.memory_format], 'precision': r.precision,
        'batch norm': 'folded' if r.folded and not r.compiled else '',
        'compiled': '' if r.compile_s is None else f'{r.compile_s:.0f} s',
        'ms/step' if t.train else 'ms/batch': _num(r.ms, '.1f'),
        '±': _num(r.doubt, '.0%'), 'speedup': '–' if r.speedup is None else f'{r.speedup:.2f}×',
        'loss diff': _num(r.loss_diff, '.0e'), 'grad diff': _num(r.grad_diff, '.0e'),
        'pred diff': _num(r.pred_diff, '.0e'), 'MiB': _num(r.memory, '.0f'), 'note': r.note} for r in t.rows])
    return table.loc[:, ~table.isin(['', '–']).all()]


def bars(ax, names, values, texts, colors):
    "Draw horizontal bars on matplotlib axes, the first on top, each with its text at the end."
    drawn = ax.barh(names, values, height=0.62, color=colors)
    ax.bar_label(drawn, texts, padding=4, bbox=dict(facecolor='white', edgecolor='none', pad=1))
    ax.set(xlim=(0, 1.4*max(values)), ylim=(len(drawn) - 0.5, -0.5))
    ax.spines[['top', 'right']].set_visible(False)
