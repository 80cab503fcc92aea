"""What happened: vocabulary, append, read, fold, projections."""
