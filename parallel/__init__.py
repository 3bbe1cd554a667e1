"""One model on many devices: mesh, collectives, parallel layers, stages, checkpoints and the pipeline. No teacher, no loss."""
