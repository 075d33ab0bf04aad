"The command `channelslast`. `import channelslast` does not import this folder."
