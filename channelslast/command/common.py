"What the commands share: images, classifiers, devices, and mistakes that end in one line."
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
import torchvision
from fastai.vision.all import (CategoryBlock, DataBlock, ImageBlock, ImageDataLoaders, Normalize, RandomSplitter,
                               Resize, get_image_files, imagenet_stats)


class UsageError(Exception):
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
        if not path.is_dir():
            raise UsageError(f"--data {path}: no such folder; give one that holds a folder of images a class")
        classes = [o for o in path.iterdir() if o.is_dir() and get_image_files(o)]
    except OSError as e: raise UsageError(f"--data {path}: can't be read ({e.strerror}); give a folder that you may read")
    if len(classes) < 2:
        raise UsageError(f"--data {path}: holds {len(classes)} folder(s) with images; it takes two or more, one a class")
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
        raise UsageError(f"--arch {arch}: not known to torchvision{' or timm' if timm else ''}; "
                      + (f"did you mean {', '.join(near)}?" if near else 'try resnet18') + more)
    # transformers must be told the size, the Inceptions to give one output; others refuse such arguments
    for extra in dict(image_size=size), dict(input_size=(size, size)), dict(img_size=size), dict(aux_logits=False), {}:
        try: return make(arch, num_classes=n_classes, **extra)
        except TypeError: pass


def unreadable(e):
    "What to say of an image that can't be opened."
    return UsageError(f"--data: an image can't be read ({e}); remove it (fastai's verify_images finds them all)")


def check(make_dls, arch, size, bs):
    "Build everything once and run one batch, so that a mistake shows before anything is trained."
    dls = make_dls()
    if not len(dls.train):
        n = len(dls.train_ds)
        raise UsageError(f"--bs {bs}: larger than the {n} training images; try --bs {max(n//8, 1)}")
    if not len(dls.valid_ds): raise UsageError(f"--data: {len(dls.train_ds)} images are too few; it takes five or more")
    model = build(arch, dls.c, size)
    try: x, _ = dls.train.one_batch()
    except OSError as e: raise unreadable(e)
    try:
        with torch.no_grad(): out = model.to(x.device).eval()(x[:2])
    except Exception as e:
        raise UsageError(f"--arch {arch}: does not take images of {size}×{size} ({str(e).splitlines()[0]}); "
                      "try --size 224")
    if getattr(out, 'shape', None) != (len(x[:2]), dls.c):
        raise UsageError(f"--arch {arch}: is no image classifier; try resnet18")


def pick_device(name):
    "The asked device, or the fastest one there is; a `UsageError` if it isn't there."
    best = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(name or best)
        torch.zeros(1, device=device)
        return device
    except Exception: raise UsageError(f"--device {name}: not on this machine; try --device {best}")
