"`Learner.format_summary`: where the model keeps channels last, and where it loses it."
import re
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from textwrap import fill

import pandas as pd
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, CancelBatchException
from fastai.learner import Learner
from fastai.torch_core import to_device
from fastcore.basics import patch, uniqueify
from fastcore.foundation import L

from ..core.devices import fit_device
from ..core.markup import paragraph
from ..core.nested_tensors import tensors_of
from ..learner.preserve_learner import check_model, preserve_learner

WIDTH = 160  # of printed lines, in characters
# Remedies by class name. A test shows that each keeps channels last and computes the same. Speedups over the replaced
# layer: convolutions plus this layer, forward and backward, in channels last (table in nbs/02_format_summary.ipynb)
_remedy = '`{}` computes the same{} and keeps channels last (CPU speedup {}).'
_group_norm = _remedy.format('nn.GroupNorm(C, C, affine=False)', ' without parameters', '{}; contiguous is no slower')
HINTS = dict(InstanceNorm2d=_group_norm.format('0.9–1.2×'), InstanceNorm3d=_group_norm.format('0.9–1.1×'),
             Softmax2d=_remedy.format('x.movedim(1, -1).softmax(-1).movedim(-1, 1)', '', '1.0–1.5×'),
             GLU=_remedy.format('a, b = x.chunk(2, 1); a * b.sigmoid()', ' as `nn.GLU(1)`',
                                '1.0–1.4×; contiguous is as fast'))
CPU_HINTS = 'InstanceNorm2d', 'InstanceNorm3d'  # on other devices PyTorch's group norm gives contiguous results


class FormatSummary:
    """Result of `Learner.format_summary`. Prints as a table, renders as one in a notebook.

    `.rows` has one `Conversion` per copy, in order of execution. `.lost` and `.regained` are the rows of that kind.
    `.bytes_moved` is the sum over all rows. `.holds` is True if the forward pass makes channels-last activations and
    neither loses nor regains the format, and the backward pass does not lose it. `.counts[False]` (forward) and
    `.counts[True]` (backward) are `(kept, had)`: `had` operations made a new tensor from a channels-last one, and
    `kept` of these new tensors are channels last too.

    >>> from fastai.vision.all import *
    >>> dl = DataLoader([(torch.randn(3, 32, 32), torch.tensor(0))]*8, bs=4)
    >>> model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Softmax2d(), nn.AdaptiveAvgPool2d(1), Flatten())
    >>> learn = Learner(DataLoaders(dl, dl), model, CrossEntropyLossFlat())
    >>> learn.to_channelslast(to_fp16=False).format_summary().lost[0].cls
    'Softmax2d'"""
    def __init__(self, rows, counts, note='', max_rows=20, device='cpu', is_channels_last=False): # Is the Learner in channels last?
        self.rows, self.counts, self.note, self.max_rows, self.device = list(rows), counts, note, max_rows, device
        self.is_channels_last = is_channels_last

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
        # a format that is regained was lost before, here by an operation on tensors that are not 4-D or 5-D
        return not self.lost and [r for r in self.regained if not r.backward]

    def to_frame(self) -> pd.DataFrame:
        "One row per `Conversion`, as in `.rows`."
        from .format_trace import Conversion
        return pd.DataFrame([vars(r) for r in self.rows], columns=[f.name for f in fields(Conversion)])

    @property
    def verdict(self) -> str:
        "The result in a few sentences."
        (kept, had), (kept_backward, had_backward) = self.counts[False], self.counts[True]
        if not had: return 'No activation is channels last' + (
            ', although the Learner is: the model does not use the format.' if self.is_channels_last else
            ', so there is nothing to lose: call `learn.to_channelslast()` first.') + self.note
        ratio = f'{kept} of {had} activations forward, {kept_backward} of {had_backward} backward'
        lost, unseen, moved = len(self.lost), self._unseen, f'{_mb(self.bytes_moved)} per step.{self.note}'
        moved = '1 conversion moves ' + moved if len(self.rows) == 1 else f'{len(self.rows)} conversions move {moved}'
        if self.holds: return f'Channels last holds: {ratio}. {moved}'
        if unseen: return (
            f"Channels last does not hold (kept by {ratio}). It is regained {_times(len(unseen))} in the forward pass, "
            f"first in {_short(unseen[0].module) or '(model)'}: an earlier operation loses it, on tensors that are "
            f"not 4-D or 5-D. {moved}")
        (cls, top), *others = Counter(_short(r.cls) for r in self.lost).most_common(3)
        where = ', '.join([f'mostly in {cls} ({top} of {lost})', *(f'{c} ({n})' for c, n in others)])
        if not others: where = f'in {cls}' if lost == 1 else f'all in {cls}'
        return f'Channels last is lost {_times(lost)} (kept by {ratio}), {where}. {moved}'

    def __repr__(self): return '\n'.join(_parts(self, _fill, partial(pd.DataFrame.to_string, index=False)))
    def _repr_html_(self): return ''.join(_parts(self, paragraph, partial(pd.DataFrame.to_html, index=False)))


def _fill(text): return fill(text, WIDTH, break_on_hyphens=False)
def _mb(n): return f'{n/1e6:.1f} MB' if n >= 5e4 else f'{n/1e3:.1f} kB' if n >= 50 else f'{n} B'
def _times(n): return 'once' if n == 1 else f'{n} times'


def _short(text, n=60) -> str:
    "`text` in at most `n` characters: `…` replaces its middle."
    return text if len(text) <= n else f'{text[:(n - 1)//2]}…{text[-(n//2):]}'


def _common(names) -> str:
    "One name for names that differ only in numbers: `layer1.*.conv2`."
    parts = zip(*(n.split('.') for n in names))
    return '.'.join(p[0] if len(set(p)) == 1 else re.sub(r'\d+', '*', p[0]) for p in parts)


def _row(events) -> dict:
    "One row of the table for conversions that differ only in numbers."
    first, name = events[0], _common({r.module for r in events}) or '(model)'
    return {'module': name + (f' ×{len(events)}' if len(events) > 1 else ''), 'class': first.cls, 'op': first.op,
            'pass': 'backward' if first.backward else 'forward', 'kind': first.kind,
            'shape': '×'.join(map(str, max(events, key=lambda r: r.bytes).shape)),
            'moved': _mb(sum(r.bytes for r in events))}


def _parts(summary, show_text, show_table) -> list:
    "Verdict, table (the largest conversions first) and the notes under it, as these functions show them."
    groups = defaultdict(list)
    for r in summary.rows: groups[re.sub(r'\d+', '*', r.module), r.cls, r.op, r.backward, r.kind].append(r)
    groups = sorted(groups.values(), key=lambda g: -sum(r.bytes for r in g))
    table, hidden = pd.DataFrame(map(_row, groups[:summary.max_rows])), len(groups) - summary.max_rows
    widths = {k: max(map(len, [k, *table[k]])) for k in table}
    while sum(widths.values()) + len(widths) > WIDTH: widths[max(widths, key=widths.get)] -= 1
    for k, n in widths.items(): table[k] = [_short(o, n) for o in table[k]]
    known = {*HINTS} if summary.device == 'cpu' else {*HINTS} - {*CPU_HINTS}
    notes = [f'{c}: {HINTS[c]}' for c in uniqueify(r.cls for r in summary.lost) if c in known]
    verdict = summary.verdict + (' Remedies are under the table.' if notes else '')
    more = f"{hidden} more {'row' if hidden == 1 else 'rows'}"
    if hidden > 0: notes.insert(0, f'… and {more}: `max_rows={len(groups)}` shows all.')
    return [show_text(verdict), *([show_table(table)] if len(table) else []), *map(show_text, notes)]


class _OneStep(Callback):
    "Trace one batch from its conversion to the end of its backward pass, and cancel it before the optimizer step."
    order = -1000
    def __init__(self, trace, stack): self.trace, self.stack = trace, stack
    def before_batch(self): self.stack.enter_context(self.trace)
    def before_backward(self):
        if not self.loss_grad.requires_grad: raise CancelBatchException
        self.trace.backward = True
    def before_step(self): raise CancelBatchException


def _batch_of(learn, batch):
    "The user's batch as a tuple, or the first batch of the Learner's training loader."
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
    kind = f"{'an empty ' if listed else ''}{type(batch).__name__}"
    raise ValueError(f"format_summary(batch=…) is {kind}: pass `(x, y)` as the Learner's loader yields it, or `(x,)`")


def _no_images(xb) -> ValueError:
    "The error for a step in which no tensor has a memory format."
    shapes = ', '.join(f'{tuple(t.shape)} {t.dtype}' for t in tensors_of(xb))
    return ValueError("The step computes no 4-D or 5-D floating-point tensor, so `format_summary` has no memory format "
                      f"to trace. Inputs of the batch: {shapes or 'no tensor'}.")


@patch
def format_summary(self:Learner,
    batch=None, # `(x, y)` as the Learner's loader yields it, or `(x,)` without labels; None: the loader's first batch
    max_rows:int=20, # Maximum rows of the printed table
) -> FormatSummary:
    """Run one training step (forward, loss and backward, but no optimizer step) and show where activations and
    gradients are copied out of channels last and back.

    The step runs in the Learner's current format and precision, on its device. The Learner is left bit for bit as it
    was. A compiled model is traced uncompiled. Only the forward pass is traced if the batch has no labels or the model
    is frozen. Takes a few times as long as the step itself.

    Raises `ValueError` for an empty loader, or if neither the batch nor the model's operations make a 4-D or 5-D
    floating-point tensor. The model's own exceptions are passed on.

    >>> from fastai.vision.all import *
    >>> dl = DataLoader([(torch.randn(3, 32, 32), torch.tensor(0))]*8, bs=4)
    >>> learn = Learner(DataLoaders(dl, dl), xresnet18(n_out=2), CrossEntropyLossFlat())
    >>> learn.to_channelslast(to_fp16=False).format_summary().holds
    True"""
    if not isinstance(max_rows, int) or max_rows < 1:
        raise ValueError(f'format_summary(max_rows={max_rows!r}): use a whole number of at least 1')
    check_model(self)
    model = self.model
    with preserve_learner(self), ExitStack() as stack:
        batch = to_device(_batch_of(self, batch), fit_device(self))  # the model moves there in `before_fit`
        self._split(batch)
        self.opt = None  # it takes no step
        xb = self.xb
        from .format_trace import FormatTrace  # needs a private module of PyTorch
        trace = FormatTrace(self.model, batch, getattr(self.loss_func, '__name__', type(self.loss_func).__name__))
        self.add_cb(_OneStep(trace, stack))
        self('before_fit'); self('before_epoch'); self('before_train')
        self.n_iter = 1
        try: self.one_batch(0, batch)
        except Exception as e:  # the model may make images itself, so only the pass can tell
            if trace.has_images: raise
            raise _no_images(xb) from e
        if not trace.has_images: raise _no_images(xb)
        frozen = not any(p.requires_grad for p in model.parameters())
        notes = {'Only the forward pass was traced: the batch has no labels.': not len(self.yb),
                 'Only the forward pass was traced: no parameter requires a gradient.': frozen,
                 'The compiled model was traced uncompiled.': model is not self.model}
        note = ''.join(f' {text}' for text, applies in notes.items() if applies)
        return FormatSummary(trace.rows, trace.counts, note, max_rows, fit_device(self).type, bool(self._grab_cbs(ChannelsLast)))
