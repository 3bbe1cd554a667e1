"""A pipeline as data: plan it, check it, time it and draw it without torch, then walk it with the executor."""
