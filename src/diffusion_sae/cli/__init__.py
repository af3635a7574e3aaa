"""The command line: one file a command, each parse → config → one call."""
