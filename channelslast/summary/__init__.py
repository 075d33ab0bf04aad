"Where a training step loses channels last."
