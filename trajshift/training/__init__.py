"""Meta-training: the trainer, its four choices, the meta-update, checkpoints and engines."""
