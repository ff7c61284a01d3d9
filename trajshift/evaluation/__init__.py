"""Fine-tuning from an initialization, and its results: tables, intervals, tests."""
