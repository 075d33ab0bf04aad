"Switching a Learner: its callbacks, methods, optimizer and state."
