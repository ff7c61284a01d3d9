"""What tests share: small tasks and models, processes that die, data as it is downloaded."""
