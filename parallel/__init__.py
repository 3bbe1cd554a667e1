"""One model on many devices: mesh, collectives, parallel layers, stages, checkpoints, and a pipeline whose plans also have a teacher's forwards. No loss."""
