"""The control plane's HTTP: sessions for applications, health and metrics for operators."""
