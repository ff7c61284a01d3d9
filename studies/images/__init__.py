"""The study of results/images: tuned methods on real images. Each module but `rows` and `catalogue` is a command."""
