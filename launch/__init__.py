"""The commands: arguments are parsed, the environment is read and processes are joined here."""
