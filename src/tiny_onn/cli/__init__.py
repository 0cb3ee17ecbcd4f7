"""The command line, in which every verb has a file of its own."""
