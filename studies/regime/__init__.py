"""The paper's regime on a lent GPU: K = 1000, batch 128, ResNet20, 20,000 inner steps, rates tuned there."""
