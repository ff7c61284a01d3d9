"""Run directories: training into one, resuming, fine-tuning from many, sweeps. Reading one needs no torch."""
