"""What is learnt: model, data, partition and metrics behind one interface."""
