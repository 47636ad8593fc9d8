"""What fits: the trace of a training step, the allocator replay, the network and the plan."""
