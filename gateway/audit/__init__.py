"""Evidence: one tamper-evident, signed log per process that a stranger can verify."""
