"What `format_find` measured: facts, and apart from them their table and chart."
import html
from dataclasses import asdict, dataclass, is_dataclass

import pandas as pd

from .selection import TIE

__all__ = ['BEST', 'OTHER', 'LABELS', 'Timing', 'FormatTimings', 'label', 'bars']

NOISY = 0.1  # a margin above which a measurement says little
MUCH = 0.1  # the share of a step from which on the optimizer is worth a word
BEST, OTHER, WRONG = '#0072B2', '#B0B7BF', '#E6E6E6'  # colours of bars
LABELS = dict(contiguous='contiguous', channels_last='channels last')


@dataclass(frozen=True)
class Timing:
    "One memory format and precision, measured."
    memory_format: str      # `'contiguous'` or `'channels_last'`
    precision: str          # `'fp32'`, `'fp16'`, `'bf16'`; `'fp16+fp32'`, `'bf16+fp32'`: some layers stay in fp32
    ms: float = None        # Of the fastest training step measured (or a batch's predictions); None: it could not run
    speedup: float = None   # Over contiguous fp32
    loss_diff: float = None # Relative difference of the loss from contiguous fp32, same batch, eval mode
    grad_diff: float = None # The same of all gradients: norm of the difference over their norm
    memory: float = None    # Peak MiB on the device; None where it can't tell
    note: str = ''          # How many layers stay in fp32; why it is out of the running or was measured less
    valid: bool = True      # May be chosen: it ran, and its numbers are right
    doubt: float = None     # How far below `ms` an undisturbed step may still lie, as a fraction of it (`race.doubt`)
    folded: bool = False    # With `FoldBatchNorm`; of predictions only
    pred_diff: float = None # Relative difference of all outputs from contiguous fp32; of predictions only


def _plain(o): return asdict(o) if is_dataclass(o) else o


def label(row: Timing) -> str: return f'{LABELS[row.memory_format]}, {row.precision}' + ', folded'*row.folded


class FormatTimings:
    """What `Learner.format_find` measured. Prints as a table, renders as one in a notebook.

    `.rows`: a `Timing` a candidate; `.best`: the suggested one; `.rival`: the one that may be faster still, and
    `.margin`: by which fraction at the most (2 %, a tie, where the choice is sure); `.loader_ms`: median milliseconds
    the loader needs for a batch; `.input_bound`: does it need longer than the fastest step? `.optimizer_ms`: the
    optimizer's part of the suggested step; `.advice`: the argument of `Learner` that makes that shorter with the same
    weights, where one is known; `.layers`: a `LayerTiming` for each distinct layer and half precision; `.frozen`: how
    many of how many weights in the optimizer's groups took no part in training (None for predictions); `.notes`:
    sentences on the conditions of the measurement."""
    def __init__(self, rows, best, margin, loader_ms, layers=(), rival=None, optimizer_ms=None, advice=None,
                 train=True, frozen=None, notes=()):
        self.rows, self.best, self.margin, self.rival = list(rows), best, margin, rival
        self.loader_ms, self.layers, self.optimizer_ms, self.advice = loader_ms, list(layers), optimizer_ms, advice
        self.train, self.frozen, self.notes = train, frozen, list(notes)

    @property
    def fastest_ms(self) -> float: return min(r.ms for r in self.rows if r.valid)
    @property
    def input_bound(self) -> bool: return self.loader_ms > self.fastest_ms

    def __reduce__(self): # an exported Learner that holds this loads where this library is not installed
        return dict, ({k: list(map(_plain, v)) if isinstance(v, list) else _plain(v) for k, v in vars(self).items()},)
    def __copy__(self): return self
    def __deepcopy__(self, memo): return self

    def to_frame(self) -> pd.DataFrame:
        "One row a candidate, with the fields of `Timing`."
        return pd.DataFrame([asdict(r) for r in self.rows])

    @property
    def verdict(self) -> str:
        "The whole in a sentence or two."
        return ' '.join(filter(None, [self._choice, self._loader, self._optimizer, self.frozen_hint, *self.notes]))

    @property
    def _choice(self) -> str:
        b, of = self.best, f'{self.best.speedup:.2f}× contiguous fp32'
        if self.margin <= TIE: return f'Fastest: {label(b)}, {of} (differences below {TIE:.0%} are a tie).'
        more = '' if self.margin <= NOISY else ' That is much: measure again when this machine is less busy.'
        by = f'{self.margin:.0%}' if self.margin < 1 else 'more than twice as fast: too few steps to tell'
        return f'Undecided: {label(b)}, {of}, but {label(self.rival)} may be faster by up to {by}.{more}'

    @property
    def _loader(self) -> str:
        if not self.input_bound: return ''
        what, step = ('training is', 'step') if self.train else ('predictions are', 'candidate')
        return (f"But {what} input-bound: the loader takes {self.loader_ms:.1f} ms a batch, the fastest "
                f"{step} {self.fastest_ms:.1f} ms. No format can help until it is faster.")

    @property
    def _optimizer(self) -> str:
        share = (self.optimizer_ms or 0)/self.best.ms
        if share <= MUCH: return ''
        said = f'The optimizer takes {self.optimizer_ms:.1f} ms of the step, {share:.0%}'
        return f'{said}; a fused one gives the same weights: `{self.advice}`.' if self.advice else said + '.'

    @property
    def frozen_hint(self) -> str:
        "A sentence or two on frozen weights; empty where none is frozen."
        if not self.frozen or not self.frozen[0]: return ''
        return (f'{self.frozen[0]:,} of {self.frozen[1]:,} parameters are frozen. If they will train later, call '
                '`learn.unfreeze()` and measure again.')

    def __repr__(self): return f'{_table(self).to_string(index=False)}\n{self.verdict}'
    def _repr_html_(self): return f'{_table(self).to_html(index=False)}<p>{html.escape(self.verdict)}</p>'

    def plot(self,
        ax=None, # matplotlib axes to draw on; None makes new ones
    ):
        "Bars of the speed-up of each candidate that ran, contiguous fp32 marked; returns the axes."
        return _chart(self, ax)


def _table(t) -> pd.DataFrame:
    "The columns people read; memory and notes only where there are any."
    def _num(v, spec): return '–' if v is None else format(v, spec)
    table = pd.DataFrame([{
        '': '→' if r is t.best else '', 'format': LABELS[r.memory_format], 'precision': r.precision,
        'batch norm': 'folded' if r.folded else '', 'ms/step' if t.train else 'ms/batch': _num(r.ms, '.1f'),
        '±': _num(r.doubt, '.0%'), 'speed-up': '–' if r.speedup is None else f'{r.speedup:.2f}×',
        **({'loss diff': _num(r.loss_diff, '.0e'), 'grad diff': _num(r.grad_diff, '.0e')} if t.train else
           {'pred diff': _num(r.pred_diff, '.0e')}),
        'MiB': _num(r.memory, '.0f'), 'note': r.note} for r in t.rows])
    empty = ('MiB', '–'), ('note', ''), ('batch norm', '')
    return table.drop(columns=[c for c, nothing in empty if (table[c] == nothing).all()])


def _chart(t, ax):
    from matplotlib import pyplot as plt
    rows = [r for r in t.rows if r.ms]
    if ax is None: ax = plt.subplots(figsize=(7, 0.9 + 0.45*len(rows)), layout='constrained')[1]
    ax.axvline(1, color='#444444', lw=1, ls='--')
    def _said(r):
        wrong = '' if r.valid else '  wrong numbers'
        return f'{r.speedup:.2f}×  ({r.ms:.{0 if r.ms >= 100 else 1}f} ms){wrong}'
    colors = [BEST if r is t.best else OTHER if r.valid else WRONG for r in rows]
    bars(ax, [label(r) for r in rows], [r.speedup for r in rows], map(_said, rows), colors)
    what = 'a training step' if t.train else 'predictions'
    ax.set(xlabel=f'speed-up of {what} over contiguous fp32 (dashed)', title=f'Suggested: {label(t.best)}')
    return ax


def bars(
    ax, # matplotlib axes to draw on
    names, values, said, colors, # Of each bar; `said` stands behind it
):
    "Horizontal bars, the first on top."
    drawn = ax.barh(names, values, height=0.62, color=colors)
    ax.bar_label(drawn, said, padding=4, bbox=dict(facecolor='white', edgecolor='none', pad=1))
    ax.set(xlim=(0, 1.4*max(values)), ylim=(len(drawn) - 0.5, -0.5))
    ax.spines[['top', 'right']].set_visible(False)
