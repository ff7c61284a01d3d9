"""The local learners: one matrix of parameters, one module, head and inner optimizer per task."""
