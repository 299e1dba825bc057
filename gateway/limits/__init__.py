"""Limits in force: one all-or-nothing `admit`, one idempotent `settle`."""
