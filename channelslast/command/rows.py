"One row per model: an error becomes a row, and a batch that does not fit is halved."
import torch

from ..core.devices import free_memory, is_out_of_memory
from .models import measured

LONGEST = 200  # characters of an error message in a row


def plan(
    kinds, # `'training'`, `'predictions'`, `'format_summary'`
    names: list, # Models
    size: int, bs: int, # Height and width of images, images per batch; 0: the panel's own
    device: torch.device,
) -> list: # `(kind, name, px, bs)` per row
    "The rows to measure, model by model."
    rows = [(kind, name, size or px, bs or images) for kind in kinds
            for name, px, images in measured(names, device, kind == 'predictions')]
    return sorted(dict.fromkeys(rows), key=lambda row: names.index(row[1]))


def measure_row(
    measure, # Function that returns the row, such as `judge`
    name: str, px: int, bs: int, # Model, height and width of images, images per batch
    device: torch.device,
    num_it: int, # Timed steps of each candidate
    busy: bool, # True: `format_find` runs next to a busy process
) -> dict: # With the column `error` if it failed
    "The row of one model, with half the batch as often as memory does not suffice."
    asked = bs
    while True:
        try:
            free_memory(device)  # not in the handler below, whose traceback holds the failed step's tensors
            row = measure(name, px, bs, device, num_it, busy)
            break
        except Exception as e:
            too_large = is_out_of_memory(e)
            said = ' '.join(str(e).split())[:LONGEST]
            row = {'model': name, 'px': px, 'batch': bs, 'error': f'{type(e).__name__}: {said}'}
        if not too_large or bs == 1: break
        bs //= 2
    if bs < asked: row['batch'] = f'{bs} ({asked}: out of memory)'
    return row


def columns(rows) -> list:
    "The columns of all rows: those of the longest row first, `error` last."
    by_length = sorted(rows, key=lambda row: ('error' not in row, len(row)), reverse=True)
    return list(dict.fromkeys(column for row in by_length for column in row))


def summary(rows) -> str:
    "All rows in a line."
    good = [r for r in rows if 'error' not in r]
    failed = f'{len(rows) - len(good)} of {len(rows)} rows failed'
    if not good: return failed
    def _numbers(column): return [float(r[column].rstrip('× s')) for r in good]
    off, over, took = map(_numbers, ('pick/best', 'over contiguous fp32', 'find took'))
    said = (f'{sum(o <= 1.05 for o in off)} of {len(off)} picks within 5 % of the best; over contiguous fp32 at least '
            f'{min(over):.2f}×; format_find took {sum(took):.0f} s')
    return said if len(good) == len(rows) else f'{said}; {failed}'
