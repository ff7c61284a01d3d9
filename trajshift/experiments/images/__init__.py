"""The paper's experiments on images: section 4.2 and 4.3."""
