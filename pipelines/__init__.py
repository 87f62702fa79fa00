"""The workflows: one page each, read from top to bottom."""
