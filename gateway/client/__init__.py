"""The gateway as its callers' tools see it: over HTTP, from outside."""
