"Tensors, modules, devices and processes: plain PyTorch, without a Learner."
