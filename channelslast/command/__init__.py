"The command `channelslast`: demo, benchmark and report. `import channelslast` does not import this folder."
