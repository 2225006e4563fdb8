"""What runs on the device: a step, its state and inputs, and the device itself, behind one interface."""
