"""What to draft on the device: tokens from the text itself, and the positions that draft rows read."""
