"`Learner.format_summary`: where does the model keep channels last, and where does it lose it?"
import html
import re
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import fields

import pandas as pd
from fastai.callback.core import Callback, CancelBatchException
from fastai.learner import Learner
from fastcore.basics import patch
from fastcore.foundation import L

from ..core.devices import fit_device
from ..core.nested_tensors import tensors_of
from ..learner.preserve_learner import check_model, preserve_learner
from .format_trace import Conversion, FormatTrace

__all__ = ['FormatSummary']

# Remedies by class name, each shown by a test to remove the loss, with what it gained in channels last: convolutions
# and this layer, forward and backward, on CPUs, in three or four shapes (notebook `format_summary` has the table)
_group_norm = ('`nn.GroupNorm(C, C, affine=False)` computes the same and keeps the format; {} on CPUs, where '
               'contiguous is as fast or faster')
HINTS = dict(InstanceNorm2d=_group_norm.format('0.9–1.2×'), InstanceNorm3d=_group_norm.format('0.9–1.1×'),
             Softmax2d='`x.movedim(1, -1).softmax(-1).movedim(-1, 1)` keeps it; 1.0–1.5× on a CPU',
             GLU='`a, b = x.chunk(2, 1); a * b.sigmoid()` keeps it; 1.0–1.4× on a CPU, where contiguous is as fast')
CPU_HINTS = 'InstanceNorm2d', 'InstanceNorm3d'  # on other devices PyTorch's group norm gives contiguous results


class FormatSummary:
    """What `Learner.format_summary` found. Prints as a table, renders as one in a notebook.

    `.rows`: a `Conversion` an event, in order of execution; `.lost`, `.regained`: those of that kind; `.bytes_moved`:
    of all rows; `.holds`: there are channels-last activations, none is lost, and none has to be regained;
    `.counts[backward]`: `(kept, had)`, the operations that took a channels-last activation and made a new one, and
    those whose result was channels last too."""
    def __init__(self, rows, counts, note='', max_rows=20, device='cpu'):
        self.rows, self.counts, self.note, self.max_rows, self.device = list(rows), counts, note, max_rows, device

    @property
    def lost(self): return [r for r in self.rows if r.kind == 'lost']
    @property
    def regained(self): return [r for r in self.rows if r.kind == 'regained']
    @property
    def bytes_moved(self): return sum(r.bytes for r in self.rows)
    @property
    def holds(self): return not self.lost and not self._unseen and self.counts[False][1] > 0
    @property
    def _unseen(self):
        # what comes back was lost, if by an operation on tensors without pixels, where formats have no name
        return not self.lost and [r for r in self.regained if not r.backward]

    def to_frame(self) -> pd.DataFrame:
        "One row an event, as in `.rows`."
        return pd.DataFrame([vars(r) for r in self.rows], columns=[f.name for f in fields(Conversion)])

    @property
    def verdict(self) -> str:
        "The whole in one or two sentences."
        (kept, had), (bkept, bhad) = self.counts[False], self.counts[True]
        if not had: return ("No activation is channels last, so there is nothing to lose: "
                            "call `learn.to_channelslast()` first.") + self.note
        of = f"{kept} of {had} activations forward, {bkept} of {bhad} backward"
        n = len(self.rows)
        moved = f"{n} conversion{'s'*(n != 1)} move{'s'*(n == 1)} {_mb(self.bytes_moved)} per step."
        if self.holds: return f"Channels last holds: {of}. {moved}{self.note}"
        if unseen := self._unseen:
            return (f"Channels last does not hold: {unseen[0].module or '(model)'} has to regain it, {len(unseen)} time"
                    f"{'s'*(len(unseen) != 1)} forward, so that an operation before it on tensors of other dimensions "
                    f"lost it (kept by {of}). {moved}{self.note}")
        top = Counter(r.cls for r in self.lost).most_common(3)
        times = 'once' if len(self.lost) == 1 else f'{len(self.lost)} times'
        return (f"Channels last is lost {times} (kept by {of}): mostly {', '.join(f'{c} ({n})' for c, n in top)}. "
                f"{moved}{self.note}")

    def __repr__(self):
        table, hidden = _folded(self)
        return '\n'.join([self.verdict, *([table.to_string(index=False)] if len(table) else []), *hidden])

    def _repr_html_(self):
        table, hidden = _folded(self)
        parts = [f'<p>{html.escape(self.verdict)}</p>', table.to_html(index=False) if len(table) else '',
                 *(f'<p>{html.escape(o)}</p>' for o in hidden)]
        return ''.join(parts)


def _mb(n): return f'{n/1e6:.1f} MB' if n >= 5e4 else f'{n/1e3:.1f} kB' if n >= 50 else f'{n} B'


def _common(names) -> str:
    "One name for several that differ in a number or so: `layer1.*.conv2`."
    parts = zip(*(n.split('.') for n in names))
    return '.'.join(p[0] if len(set(p)) == 1 else re.sub(r'\d+', '*', p[0]) for p in parts)


def _hint(r, device) -> str: # `''` where none is known
    "A remedy for a loss on this type of device."
    return HINTS.get(r.cls, '') if r.kind == 'lost' and (device == 'cpu' or r.cls not in CPU_HINTS) else ''


def _row(events, device) -> dict:
    "Like events as one row of the table."
    first, name = events[0], _common(dict.fromkeys(r.module for r in events)) or '(model)'
    return {'module': name + (f' ×{len(events)}' if len(events) > 1 else ''), 'class': first.cls, 'op': first.op,
            'pass': 'backward' if first.backward else 'forward', 'kind': first.kind,
            'shape': '×'.join(map(str, max(events, key=lambda r: r.bytes).shape)),
            'moved': _mb(sum(r.bytes for r in events)),
            'hint': _hint(first, device)}


def _folded(summary) -> tuple:
    "The table people read: like events in one row, the costliest first; and a line on what `max_rows` hides."
    groups = defaultdict(list)
    for r in summary.rows: groups[re.sub(r'\d+', '*', r.module), r.cls, r.op, r.backward, r.kind].append(r)
    groups = sorted(groups.values(), key=lambda g: -sum(r.bytes for r in g))
    shown = groups[:summary.max_rows]
    table = pd.DataFrame(_row(g, summary.device) for g in shown)
    if len(table) and not table['hint'].any(): table = table.drop(columns='hint')
    more = len(groups) - len(shown)
    return table, [f"… and {more} more row{'s'*(more != 1)}: `max_rows={len(groups)}` shows all."] if more else []


class _OneStep(Callback):
    "Trace one batch from its cast to the end of its backward pass, and stop it before the optimizer."
    order = -1000
    def __init__(self, trace, stack): self.trace, self.stack = trace, stack
    def before_batch(self): self.stack.enter_context(self.trace)
    def before_backward(self):
        if not self.loss_grad.requires_grad: raise CancelBatchException
        self.trace.backward = True
    def before_step(self): raise CancelBatchException


def _batch_of(learn, batch):
    "The user's batch as a tuple, or the first of the Learner's own."
    if batch is None:
        try:
            dl = learn.dls.train
            batch = dl.one_batch() if hasattr(dl, 'one_batch') else next(iter(dl))
        except (StopIteration, ValueError, IndexError) as e:
            try: n = len(learn.dls.train)
            except TypeError: n = 0
            if n: raise
            raise ValueError("The Learner's training loader yields no batch: pass one, `format_summary(batch)`.") from e
    listed = isinstance(batch, (tuple, list, L))
    if listed and len(batch): return tuple(batch)
    if not listed and tensors_of(batch): return (batch,)
    raise ValueError(f"batch is {type(batch).__name__}{' without elements' if listed else ''}: use `(x, y)` as the "
                     "Learner's loader yields it, or `(x,)`")


def _without_images(xb) -> ValueError:
    "The error for a step in which no tensor has a memory format."
    shapes = ', '.join(f'{tuple(t.shape)} {t.dtype}' for t in tensors_of(xb))
    return ValueError("The step computes no 4-D or 5-D floating-point tensor, so no memory format matters. The batch's "
                      f"inputs hold: {shapes or 'no tensor'}.")


@patch
def format_summary(self:Learner,
    batch=None, # `(x, y)` as the Learner's loader yields it, or without labels; None: the loader's first
    max_rows:int=20, # Rows of the printed table
) -> FormatSummary:
    """Run one training step (forward, loss, backward, no optimizer step) and show where activations and gradients are
    copied out of channels last and back.

    In the Learner's current format and precision, on its device. The Learner is left bit for bit as it was. A compiled
    model is traced as the module it was made from; a batch without labels, or a frozen model, forward only. Costs a few
    times the step itself.

    Raises `ValueError` for an empty loader, or where neither the batch nor the model's operations make a 4-D or 5-D
    floating-point tensor; the model's own exceptions come as they are."""
    if not isinstance(max_rows, int) or max_rows < 1:
        raise ValueError(f'max_rows={max_rows!r}: use a whole number from 1')
    check_model(self)
    model = self.model
    with preserve_learner(self), ExitStack() as stack:
        batch = self._set_device(_batch_of(self, batch))
        self._split(batch)
        self.opt = None # nothing steps, nothing of it is touched
        xb = self.xb
        loss = type(self.loss_func).__name__ if not hasattr(self.loss_func, '__name__') else self.loss_func.__name__
        trace = FormatTrace(self.model, batch, loss)
        self.add_cb(_OneStep(trace, stack))
        self('before_fit'); self('before_epoch'); self('before_train')
        self.n_iter = 1
        try: self.one_batch(0, batch)
        except Exception as e:  # images may arise inside the model, so that only the pass can tell
            if trace.has_images: raise
            raise _without_images(xb) from e
        if not trace.has_images: raise _without_images(xb)
        notes = [" Traced forward only: the batch has no labels."]*(not len(self.yb))
        frozen = not any(p.requires_grad for p in model.parameters())
        notes += [" Traced forward only: no parameter requires a gradient."]*frozen
        notes += [" Traced the module that was compiled, uncompiled."]*(model is not self.model)
        return FormatSummary(trace.rows, trace.counts, ''.join(notes), max_rows, fit_device(self).type)
