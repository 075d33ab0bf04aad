"Measure a Learner in each memory format and precision, and choose the fastest."
