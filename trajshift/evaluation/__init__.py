"""Fine-tuning from an initialization, and what its results say: tables, intervals, tests."""
