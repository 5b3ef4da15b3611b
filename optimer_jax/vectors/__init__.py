"""Distribution vectors: what continual pre-training on one data set changed."""
