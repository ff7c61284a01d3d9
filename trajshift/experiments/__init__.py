"""The paper's own experiments, one sub-package each; `trajshift experiment NAME` runs them."""
