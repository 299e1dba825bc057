"""Where open sessions are kept: in this process, or in a Redis that replicas share."""
