"Measuring a Learner in each memory format and precision."
