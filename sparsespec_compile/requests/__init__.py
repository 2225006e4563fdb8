"""What callers ask for, read into requests for the runtime, or refused by name."""
