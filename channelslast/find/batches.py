"A few batches of a loader, the time that it takes to load one, and halves of them."
import statistics
import time
from itertools import islice

from fastai.torch_core import to_device

from ..core.devices import fit_device, synchronize
from ..core.nested_tensors import first_items, leaves_of

BATCHES, LOADER_BATCHES = 4, 8  # to step on; to time the loader with
LOADER_MS = 20_000  # stop timing a slow loader after this time


def load_batches(learn, loader) -> tuple:
    """A few batches on the device, and the loader's milliseconds per batch. The batches have one shape, since a smaller
    last one would always be the fastest step."""
    device, batches, arrivals = fit_device(learn), [], []
    workers = getattr(getattr(loader, 'fake_l', loader), 'num_workers', 0)  # fastai's own attribute is 1 outside of workers
    prepared = 2*workers  # batches that worker processes prepare before the first one is taken
    n = prepared*(1 + -(-LOADER_BATCHES//prepared)) if workers else LOADER_BATCHES
    def _shapes(b): return [getattr(t, 'shape', None) for t in leaves_of(b)]
    start = time.perf_counter()
    for b in islice(loader, n):
        synchronize(device)
        arrivals.append((time.perf_counter() - start)*1e3)
        if len(batches) < BATCHES and (not batches or _shapes(b) == _shapes(batches[0])):
            batches.append(to_device(b, device))  # the model may still be on the CPU before a first fit
        if arrivals[-1] > LOADER_MS: break
    return batches, _ms_per_batch(arrivals, workers, len(arrivals) == n)


def _ms_per_batch(arrivals, workers, complete) -> float:
    """Milliseconds per batch, from the times at which batches arrived: the median. Worker processes prepare `2*workers`
    batches in advance; with them it is the mean of later ones, or of all if the loader or the time ended early."""
    if not arrivals: return 0.
    if not workers:
        ms = [b - a for a, b in zip([0., *arrivals], arrivals)]
        return statistics.median(ms[1:] or ms)  # the first batch includes the loader's setup
    if complete: return (arrivals[-1] - arrivals[2*workers - 1])/(len(arrivals) - 2*workers)
    timed_out = arrivals[-1] > LOADER_MS
    return arrivals[-1]/(max(len(arrivals), workers) if timed_out else len(arrivals))


def halved(batches, bs) -> list: # Empty if they can't be halved
    "The first half of each batch of `bs` items."
    halves = [first_items(b, bs, bs//2) for b in batches] if bs and bs > 1 else batches
    return [] if any(a is b for a, b in zip(halves, batches)) else halves
