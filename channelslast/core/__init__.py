"Plain PyTorch helpers for tensors, modules, devices, random states and processes."
