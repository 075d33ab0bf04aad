"The arguments of `format_find`: checked before anything changes."
import torch
from fastai.callback.fp16 import AMPMode, NonNativeMixedPrecision
from fastcore.basics import uniqueify
from fastcore.foundation import L

from ..core import devices
from ..core.autocast import DTYPES
from ..core.devices import fit_device
from ..core.distributed import broadcast_from_rank0
from ..core.nested_tensors import tensors_of
from ..learner.preserve_learner import check_model
from ..learner.setting import FORMATS, PRECISIONS, Setting
from .batches import load_batches


A_LOADER = 'a DataLoader, such as `learn.dls.test_dl(files, bs=1)`'


def checked_loader(learn, train, num_it, dl, *, compile, optimizer, layers):
    "The loader to take batches from. Raises `ValueError` for arguments and Learners that can't be measured."
    for k, v in dict(train=train, optimizer=optimizer, layers=layers).items():
        if v not in (True, False): raise ValueError(f'{k}={v!r}: use True or False')
    if compile not in (True, False):
        raise ValueError(f'compile={compile!r}: use True, which measures each installed backend, or False. Without measuring, '
                         "`learn.add_cb(CompilePredictions('openvino'))` uses one of them.")
    if num_it is not None and (not isinstance(num_it, int) or isinstance(num_it, bool) or num_it < 1):
        raise ValueError(f'num_it={num_it!r}: use a whole number of at least 1')
    if learn._grab_cbs(NonNativeMixedPrecision):
        raise ValueError("`NonNativeMixedPrecision` can't be measured: call `learn.to_non_native_fp32()` first.")
    check_model(learn)
    params = list(learn.model.parameters())
    if train and not any(p.requires_grad for p in params):
        raise ValueError('No parameter requires a gradient: there is nothing to train. Call `learn.unfreeze()` first.')
    half = ' and '.join(sorted({str(p.dtype).removeprefix('torch.') for p in params if p.dtype in DTYPES.values()}))
    if half: raise ValueError(f"The model's weights are {half}, not fp32: call `learn.model.float()` first.")
    if train and dl is not None: raise ValueError('dl: pass it only with `train=False`, to say what to predict on')
    if dl is not None and (not hasattr(dl, '__iter__') or isinstance(dl, torch.Tensor)):
        raise ValueError(f'dl={str(dl)[:50]}: use {A_LOADER}')
    try: return (learn.dls.train if train else learn.dls.valid) if dl is None else dl
    except IndexError:
        raise ValueError("The Learner's DataLoaders hold no loader: create the Learner with one.") from None


def checked_batches(learn, loader, train) -> tuple:
    "A few batches, and the loader's milliseconds per batch. Raises `ValueError` if they can't be measured."
    batches, loader_ms = load_batches(learn, loader)
    if not batches:
        raise ValueError(f"The loader {'to train' if train else 'to predict'} on yields no batch. A Learner from `load_learner` holds no "
                         'data: to measure predictions, pass `train=False, dl=learn.dls.test_dl(files, bs=1)`.')
    if not isinstance(batches[0], (tuple, list, L)) and not tensors_of(batches[0]):
        raise ValueError(f'The loader yields {type(batches[0]).__name__}, not batches of tensors: use {A_LOADER}')
    learn._split(batches[0])
    if train and not len(learn.yb): raise ValueError('The training loader yields no labels: use one that yields them.')
    return batches, loader_ms


def _choices(name, chosen, possible, known) -> list:
    chosen = list(possible) if chosen is None else [chosen] if isinstance(chosen, str) or not hasattr(chosen, '__iter__') else list(chosen)
    for o in chosen:
        if o not in possible:
            why = 'is slow on this device' if o in known else 'is unknown'
            raise ValueError(f"{name}: {o!r} {why}; choose from {', '.join(map(repr, possible))}")
    return chosen


def chosen_settings(learn, formats, precisions, fused) -> list:
    "Settings to measure. The baseline, contiguous fp32, is always there and first."
    device = fit_device(learn)
    fast = [p for p in PRECISIONS if p == 'fp32' or devices.autocast_is_fast(device, AMPMode(p))]
    precisions, formats = _choices('precisions', precisions, fast, PRECISIONS), _choices('formats', formats, FORMATS, FORMATS)
    chosen = [Setting(f, p, fused=fused) for f in FORMATS for p in PRECISIONS if f in formats and p in precisions]
    return broadcast_from_rank0(uniqueify([Setting(fused=fused), *chosen]))
