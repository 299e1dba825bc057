"""What operators see: the operational log and metrics. Evidence is elsewhere (`gateway.audit`)."""
