"One row per model, kind and batch size. An error becomes a row, and a batch that does not fit in memory is halved."
import torch
from fastcore.basics import uniqueify

from ..core.devices import free_memory, is_out_of_memory
from .models import model_sizes


def plan(
    kinds, # `'training'`, `'predictions'`, `'compiled predictions'`, `'format_summary'`
    names: list, # Models
    size: int, bs: int, # Height and width of images, images per batch; 0: the panel's own
    device: torch.device,
) -> list: # `(kind, name, px, bs)` per row
    "The rows to measure, model by model."
    rows = [(kind, name, size or px, bs or images) for kind in kinds
            for name, px, images in model_sizes(names, device, 'predictions' in kind)]
    return sorted(uniqueify(rows), key=lambda row: names.index(row[1]))


def measure_row(
    measure, # Function that returns the row, such as `judge`
    name: str, px: int, bs: int, # Model, height and width of images, images per batch
    device: torch.device,
    num_it: int, # Timed steps per candidate
    busy: bool, # True: `format_find` runs next to a busy process
) -> dict: # With the column `error` if it failed
    "The row of one model. The batch is halved until it fits in memory."
    requested = bs
    while True:
        try:
            free_memory(device)  # not in the handler below, whose traceback holds the failed step's tensors
            row = measure(name, px, bs, device, num_it, busy)
            break
        except Exception as e:
            too_large = is_out_of_memory(e)
            message = ' '.join(str(e).split())[:200]
            row = {'model': name, 'px': px, 'batch': bs, 'error': f'{type(e).__name__}: {message}'}
        if not too_large or bs == 1: break
        bs //= 2
    if bs < requested: row['batch'] = f'{bs} ({requested}: out of memory)'
    return row


def columns(rows) -> list:
    "The columns of all rows: those of the longest row first, `error` last."
    by_length = sorted(rows, key=lambda row: ('error' not in row, len(row)), reverse=True)
    return uniqueify(column for row in by_length for column in row)


def summary(rows) -> str:
    "All rows in one line."
    good = [r for r in rows if 'error' not in r]
    failed = f'{len(rows) - len(good)} of {len(rows)} rows failed'
    if not good: return failed
    def _numbers(column): return [float(r[column].rstrip('× s')) for r in good]
    ratios, speedups, seconds = map(_numbers, ('pick/best', 'speedup', 'search time'))
    text = (f'{sum(o <= 1.05 for o in ratios)} of {len(ratios)} picks within 5% of the best; speedup over contiguous '
            f'fp32 at least {min(speedups):.2f}×; format_find took {sum(seconds):.0f} s')
    return text if len(good) == len(rows) else f'{text}; {failed}'
