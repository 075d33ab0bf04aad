"The command `channelslast`: the demo, the bench, and what both need. Nothing of it is imported by a Learner."
