"Results of `format_find`: the measurements, and the table, verdict and chart made from them."
import math
from dataclasses import asdict, dataclass, is_dataclass

import pandas as pd

from ..core.markup import paragraph, tag_code
from ..learner.setting import LABELS, Setting
from .race import TIE

NOISY = 0.1  # margin above which the verdict suggests measuring again
LARGE_SHARE = 0.1  # the optimizer's share of a step above which the verdict mentions it
NOTE_WIDTH = 80  # characters of a printed note: with the other columns, lines have at most 160
BEST, OTHER, FAILED = '#0072B2', '#B0B7BF', '#E6E6E6'  # colors of bars


@dataclass(frozen=True)
class Timing:
    """Measurements of one setting.

    >>> from channelslast.find.results import Timing
    >>> from channelslast.learner.setting import Setting
    >>> row = Timing(Setting('channels_last', 'bf16'), ms=61., speedup=1.64)
    >>> row.memory_format, row.precision, row.ms
    ('channels_last', 'bf16', 61.0)"""
    setting: Setting        # Memory format, precision, layers in fp32; folded, compiled, with the fused optimizer?
    ms: float = None        # Fastest measured training step (or batch's predictions); None if it could not run
    speedup: float = None   # Over contiguous fp32 with the Learner's own optimizer
    loss_diff: float = None # Relative difference of the loss from contiguous fp32, on a few items without dropout
    grad_diff: float = None # The same for all gradients: norm of the difference divided by their norm
    memory: float = None    # Peak MiB on the device; None where the device can't tell
    note: str = ''          # How many convolutions stay in fp32; why it was eliminated or measured in fewer steps
    valid: bool = True      # True if it ran and computes the same, so that it may be chosen
    doubt: float = None     # Uncertainty: the true step may be up to this fraction faster than `ms`
    pred_diff: float = None # Relative difference of all outputs from contiguous fp32; predictions only
    compile_s: float = None # Seconds that the compilation took, by the backend `compiled`

    @property
    def memory_format(self) -> str: return self.setting.memory_format
    @property
    def precision(self) -> str: return self.setting.precisions # With some layers in fp32 `'fp16+fp32'`, `'bf16+fp32'`
    @property
    def folded(self) -> bool: return self.setting.folded
    @property
    def compiled(self) -> str: return self.setting.compiled # Name of the backend
    @property
    def fused(self) -> bool: return self.setting.fused

    def as_dict(self) -> dict:
        "All fields, with those of the setting among them."
        own = {k: v for k, v in vars(self).items() if k != 'setting'}
        return {k: getattr(self, k) for k in ('memory_format', 'precision', 'folded', 'compiled', 'fused')} | own


def _plain(o): return o.as_dict() if isinstance(o, Timing) else asdict(o) if is_dataclass(o) else o


@dataclass(repr=False, eq=False)
class FormatTimings:
    """Result of `Learner.format_find`. Prints as a table, also in a notebook.

    `input_bound` is True if loading a batch takes longer than the fastest step, `fused` if the best setting has the fused
    optimizer.

    >>> from channelslast.find.results import FormatTimings, Timing
    >>> from channelslast.learner.setting import Setting
    >>> rows = [Timing(Setting(), 100., 1.), Timing(Setting('channels_last', 'bf16'), 61., 1.64)]
    >>> print(FormatTimings(rows, best=rows[1], loader_ms=8.).verdict)
    Use channels last in bf16: 1.64× as fast as contiguous fp32. Without measuring: learn.to_channelslast(amp_mode='bf16')"""
    rows: list                  # One `Timing` per setting
    best: Timing                # The one to use
    margin: float = TIE         # The rival may be faster by up to this fraction; at least 0.02, a tie
    rival: Timing = None        # The one that may be faster
    loader_ms: float = 0.       # Milliseconds to load a batch
    optimizer_ms: float = None  # The optimizer's part of a step in contiguous fp32; None on GPUs, which overlap it
    fused_ms: float = None      # That of its fused step, if it was measured
    advice: str = None          # Argument of `Learner` for the fused step of the same optimizer, if one is known
    train: bool = True          # Training steps? False: predictions
    frozen: tuple = None        # Numbers of frozen and of all parameters in the optimizer's groups; None for predictions
    notes: list = ()            # Conditions of the measurement
    current: Setting = Setting() # The Learner's setting when it was measured
    few_rounds: bool = False    # Did `num_it` allow fewer steps per setting than the default?

    @property
    def fused(self) -> bool: return self.best.fused
    @property
    def layers(self) -> tuple: return self.best.setting.fp32_layers # Names of layers that stay in fp32
    @property
    def code(self) -> str:
        "The line that gives a new Learner the best setting; empty if it has that already."
        is_new = self.best is self.rows[0] and self._is_kept
        return '' if is_new else self.best.setting.code(self.train, self.advice or '')
    @property
    def fastest_ms(self) -> float: return min(r.ms for r in self.rows if r.valid)
    @property
    def input_bound(self) -> bool: return self.loader_ms > self.fastest_ms

    def __reduce__(self): # an exported Learner that holds this loads where this library is not installed
        return dict, ({k: [*map(_plain, v)] if isinstance(v, list) else _plain(v) for k, v in vars(self).items()},)
    def __copy__(self): return self
    def __deepcopy__(self, memo): return self

    def to_frame(self) -> pd.DataFrame:
        "One row per setting, with the fields of `Timing` in full."
        return pd.DataFrame([r.as_dict() for r in self.rows])

    @property
    def verdict(self) -> str:
        "What to do, in a few sentences."
        return ' '.join(self._sentences())

    def _sentences(self) -> list:
        code = self.code and f'Without measuring: {self.code}'
        return [*filter(None, [self._choice, self._again, self._compiling, self._loader, self._optimizer, self.frozen_hint, *self.notes, code])]

    @property
    def _reason(self) -> str:
        b, others = self.best, [r.valid for r in self.rows if r is not self.best and r.ms]
        if b.speedup > 1 + TIE: return f'{b.speedup:.2f}× as fast as contiguous fp32'
        if not others: return 'nothing else was measured' if len(self.rows) == 1 else 'no other valid setting was usable'
        subject = 'nothing else' if all(others) else 'no other valid setting'
        return f'{subject} was ' + ('clearly faster' if self.margin > TIE else f'more than {TIE:.0%} faster')

    @property
    def _rival_gain(self) -> str:
        return f'{self.rival.setting.in_words} may be ' + (f'up to {self.margin:.0%} faster' if self.margin < 1 else 'more than twice as fast')
    @property
    def _again(self) -> str:
        how = 'with a larger `num_it`' if self.few_rounds else 'when this machine is less busy'
        return f'Measure again {how}.' if self.margin > NOISY else ''

    @property
    def _is_kept(self) -> bool: return self.best.setting == self.current

    @property
    def _choice(self) -> str:
        name, use = self.best.setting.in_words, 'Keep' if self._is_kept else 'Use'
        if self.margin <= TIE: return f'{use} {name}: {self._reason}.'
        pick = name if self.best is self.rows[0] else f'{name} ({self._reason})'
        return f'Undecided: {use.lower()} {pick}, but {self._rival_gain}.'

    @property
    def outcome(self) -> str:
        "What `to_fastest` has done, in a few sentences."
        subject = 'Training in' if self.train else 'Predictions in'
        if self._is_kept: subject = 'Training stays in' if self.train else 'Predictions stay in'
        undecided = self._again and f'Undecided: {self._rival_gain}. {self._again}'
        return ' '.join(filter(None, [f'{subject} {self.best.setting}: {self._reason}.', undecided, self.frozen_hint]))

    @property
    def _compiling(self) -> str:
        if not self.best.compiled: return ''
        gain = min(r.ms for r in self.rows if r.valid and not r.compiled) - self.best.ms
        batches = f': {math.ceil(self.best.compile_s*1e3/gain):,} batches earn it back, compared with the fastest uncompiled setting' if gain > 0 else ''
        return f'The compilation by {self.best.compiled} took {self.best.compile_s:.0f} s{batches}.'

    @property
    def _loader(self) -> str:
        if not self.input_bound: return ''
        what, do = ('Training is', 'train on') if self.train else ('Predictions are', 'predict')
        return (f'{what} limited by data loading: {self.loader_ms:.1f} ms to load a batch, {self.fastest_ms:.1f} ms to '
                f'{do} it. Speed up the DataLoader first.')

    @property
    def _optimizer(self) -> str:
        share = (self.optimizer_ms or 0)/self.best.ms
        if self.fused or share <= LARGE_SHARE: return ''
        helps = self.advice and self.fused_ms is None
        advice = f' Pass `{self.advice}` to `Learner`: the same weights in less time.' if helps else ''
        return f'The optimizer takes {self.optimizer_ms:.1f} ms of each step ({share:.0%}).{advice}'

    @property
    def frozen_hint(self) -> str:
        "A sentence or two on frozen parameters; empty if there are none."
        if not self.frozen or not self.frozen[0]: return ''
        return (f'{self.frozen[0]:,} of {self.frozen[1]:,} parameters are frozen. To train them later, call '
                '`learn.unfreeze()` and measure again.')

    def __repr__(self):
        return '\n'.join([_table(self).to_string(index=False, max_colwidth=NOTE_WIDTH), *self._sentences()])
    def _repr_html_(self):
        verdict = self.verdict.removesuffix(self.code) + (self.code and f'`{self.code}`')
        return tag_code(_table(self).to_html(index=False)) + paragraph(verdict)

    def plot(self,
        ax=None, # matplotlib axes to draw on; None makes new ones
    ):
        "Draw the speedup of each setting that ran as bars, with a line at contiguous fp32. Returns the axes."
        from matplotlib import pyplot as plt
        rows, what = [r for r in self.rows if r.ms], 'a training step' if self.train else 'predictions'
        if ax is None: ax = plt.subplots(figsize=(7, 0.9 + 0.45*len(rows)), layout='constrained')[1]
        ax.axvline(1, color='#444444', lw=1, ls='--')
        def _text(r):
            return f"{r.speedup:.2f}×  ({r.ms:.{0 if r.ms >= 100 else 1}f} ms){'' if r.valid else '  failed'}"
        colors = [BEST if r is self.best else OTHER if r.valid else FAILED for r in rows]
        bars(ax, [str(r.setting) for r in rows], [r.speedup for r in rows], [_text(r) for r in rows], colors)
        ax.set(xlabel=f'speedup of {what} over contiguous fp32 (dashed)', title=f'Suggested: {self.best.setting}')
        return ax


def _table(t) -> pd.DataFrame:
    "The measurements as text, without columns that hold nothing."
    def _num(v, spec): return '–' if v is None else format(v, spec)
    table = pd.DataFrame([{
        '': '→' if r is t.best else '', 'format': LABELS[r.memory_format], 'precision': r.precision,
        'batch norm': 'folded' if r.folded and not r.compiled else '',
        'compiled': r.compiled + ('' if r.compile_s is None else f', {r.compile_s:.0f} s'), 'optimizer': 'fused'*r.fused,
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
