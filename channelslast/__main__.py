"The command: train one model contiguous and in channels last, and compare."
import sys
import time
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torchvision
from fastai.vision.all import (AMPMode, Callback, CategoryBlock, CrossEntropyLossFlat, DataBlock, ImageBlock,
                               ImageDataLoaders, Learner, Normalize, RandomSplitter, Resize, accuracy,
                               get_image_files, imagenet_stats)
from fastcore.script import anno_parser

from . import less_random
from .precision import accelerates


class Mistake(Exception):
    "The user's: printed in one line, exit status 2."


def digits(size, bs, device):
    "scikit-learn's 1797 handwritten digits, 8×8 pixels, enlarged to `size`×`size` RGB images."
    from sklearn.datasets import load_digits
    data = load_digits()
    images = (data.images * 255 / 16).astype(np.uint8)[..., None].repeat(3, -1)
    block = DataBlock((ImageBlock, CategoryBlock), get_items=lambda _: range(len(images)), get_x=images.__getitem__,
                      get_y=data.target.__getitem__, splitter=RandomSplitter(seed=42), item_tfms=Resize(size),
                      batch_tfms=Normalize.from_stats(*imagenet_stats))
    return block.dataloaders(None, bs=bs, device=device, num_workers=0)


def folder(path, size, bs, device):
    "The user's own images: one folder a class, a fifth kept for validation."
    path = Path(path)
    try:
        if not path.is_dir(): raise Mistake(f"--data {path}: no such folder; give one that holds a folder of images a class")
        classes = [o for o in path.iterdir() if o.is_dir() and get_image_files(o)]
    except OSError as e: raise Mistake(f"--data {path}: can't be read ({e.strerror}); give a folder that you may read")
    if len(classes) < 2:
        raise Mistake(f"--data {path}: holds {len(classes)} folder(s) with images; it takes two or more, one a class")
    return ImageDataLoaders.from_folder(path, valid_pct=0.2, seed=42, item_tfms=Resize(size), bs=bs, device=device,
                                        num_workers=0, batch_tfms=Normalize.from_stats(*imagenet_stats))


def build(arch, n_classes, size):
    "A new, untrained classifier by its torchvision or timm name."
    models = torchvision.models
    names = models.list_models(module=models)
    try: import timm
    except ImportError: timm = None
    if arch in names: make = models.get_model
    elif timm and timm.is_model(arch): make = timm.create_model
    else:
        near = get_close_matches(arch, names + (timm.list_models() if timm else []), 3)
        more = '' if timm else '; for the names of timm, pip install timm'
        raise Mistake(f"--arch {arch}: not known to torchvision{' or timm' if timm else ''}; "
                      + (f"did you mean {', '.join(near)}?" if near else 'try resnet18') + more)
    # transformers must be told the size, the Inceptions to give one output; others refuse such arguments
    for extra in dict(image_size=size), dict(input_size=(size, size)), dict(img_size=size), dict(aux_logits=False), {}:
        try: return make(arch, num_classes=n_classes, **extra)
        except TypeError: pass


class StepTimer(Callback):
    "Milliseconds of each training step: forward, loss, backward, optimizer; without loading data."
    order, run_valid = -100, False
    def before_fit(self): self.ms = []
    def _now(self):
        getattr(torch, self.dls.device.type).synchronize()
        return time.perf_counter()
    def before_batch(self): self.start = self._now()
    def after_batch(self): self.ms.append((self._now() - self.start)*1e3)


def train(make_dls, arch, size, epochs, lr, switch):
    "Train from the same seed; the Learner's final accuracy and median milliseconds a step."
    with less_random():
        dls = make_dls()
        learn = switch(Learner(dls, build(arch, dls.c, size), CrossEntropyLossFlat(), metrics=accuracy))
        learn.fit_one_cycle(epochs, lr, cbs=(timer := StepTimer()))
    return float(np.median(timer.ms)), learn.recorder.values[-1][-1]


def unreadable(e): return Mistake(f"--data: an image can't be read ({e}); remove it (fastai's verify_images finds them all)")


def check(make_dls, arch, size, bs):
    "Build everything once and run one batch, so that a mistake shows before anything is trained."
    dls = make_dls()
    if not len(dls.train):
        raise Mistake(f"--bs {bs}: larger than the {len(dls.train_ds)} training images; try --bs {max(len(dls.train_ds)//8, 1)}")
    if not len(dls.valid_ds): raise Mistake(f"--data: {len(dls.train_ds)} images are too few; it takes five or more")
    model = build(arch, dls.c, size)
    try: x, _ = dls.train.one_batch()
    except OSError as e: raise unreadable(e)
    try:
        with torch.no_grad(): out = model.to(x.device).eval()(x[:2])
    except Exception as e:
        raise Mistake(f"--arch {arch}: does not take images of {size}×{size} ({str(e).splitlines()[0]}); try --size 224")
    if getattr(out, 'shape', None) != (len(x[:2]), dls.c):
        raise Mistake(f"--arch {arch}: is no image classifier; try resnet18")


def pick_device(name):
    "The asked device, or the fastest one there is; a `Mistake` if it isn't there."
    best = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(name or best)
        torch.zeros(1, device=device)
        return device
    except Exception: raise Mistake(f"--device {name}: not on this machine; try --device {best}")


def precision_args(device, amp_mode):
    "Arguments of `to_channelslast` for the asked precision, or the one this device is made for, and its name."
    fast = [o.value for o in AMPMode if accelerates(device.type, o)]
    if amp_mode and amp_mode not in ('fp16', 'bf16', 'fp32'):
        raise Mistake(f"--amp-mode {amp_mode}: not known; use fp16, bf16 or fp32")
    mode = amp_mode or (fast[0] if fast else 'fp32')
    if mode != 'fp32' and mode not in fast:
        raise Mistake(f"--amp-mode {mode}: not fast on this {device.type}; use {' or '.join([*fast, 'fp32'])}")
    return (dict(to_fp16=False) if mode == 'fp32' else dict(amp_mode=mode)), mode


def main(
    arch: str = 'resnet18', # Architecture: any classifier's name in torchvision or timm
    data: str = None, # Folder of class folders with images; without it, scikit-learn's digits
    size: int = 48, # Images are resized to size×size pixels
    bs: int = 64, # Images a batch
    epochs: int = 3, # Epochs of each of both trainings
    lr: float = 3e-3, # Highest learning rate of the one-cycle schedule
    device: str = None, # cpu, cuda, cuda:1, mps…; without it, the fastest there is
    amp_mode: str = None, # fp16, bf16 or fp32 for the channels-last run; without it, what the device is made for
):
    "Train an image classifier contiguous in fp32, then in channels last with mixed precision, and compare."
    for k, v in dict(size=size, bs=bs, epochs=epochs, lr=lr).items():
        if not v > 0: raise Mistake(f"--{k} {v}: must be above 0")
    device = pick_device(device)
    kwargs, precision = precision_args(device, amp_mode)
    def make_dls(): return folder(data, size, bs, device) if data else digits(size, bs, device)
    check(make_dls, arch, size, bs)
    rows = []
    for fmt, prec, switch in (('contiguous', 'fp32', lambda learn: learn),
                              ('channels last', precision, lambda learn: learn.to_channelslast(**kwargs))):
        print(f'\n{arch} on {device}, {fmt}, {prec}', flush=True)
        try: ms, acc = train(make_dls, arch, size, epochs, lr, switch)
        except OSError as e: raise unreadable(e)
        rows.append((fmt, prec, f'{ms:.1f}', f"{float(rows[0][2])/ms if rows else 1:.2f}×", f'{acc:.1%}'))
    print()
    print(pd.DataFrame(rows, columns=['format', 'precision', 'ms/step', 'speed-up', 'accuracy']).to_string(index=False))


def cli():
    "Entry point of the command `channelslast`."
    parser = anno_parser(main, prog='channelslast')
    if '--amp-mode' not in parser.format_usage():  # before 2.0, fastcore wrote options with underscores
        sys.argv[1:] = [o.replace('--amp-mode', '--amp_mode') for o in sys.argv[1:]]
    args = vars(parser.parse_args())
    args.pop('pdb', None), args.pop('xtra', None)
    try: main(**args)
    except Mistake as e:
        print(f'channelslast: {e}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__': cli()
