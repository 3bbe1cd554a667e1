"""The commands: only here are arguments parsed, the environment read and processes joined."""
