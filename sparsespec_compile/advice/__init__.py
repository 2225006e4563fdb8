"""The cost model: what a device can do, how long an iteration takes, and whether speculation pays."""
