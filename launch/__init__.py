"""The commands: the only place that parses arguments, reads the environment and starts process groups."""
