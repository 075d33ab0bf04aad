"Callbacks that run a Learner's model compiled by `torch.compile`."
