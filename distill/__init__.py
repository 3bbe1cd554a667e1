"""What is learned from whom: the models, the data, the loss, one training step and the loop around it."""
