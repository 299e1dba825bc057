"""Providers' wire formats as pure functions: routes, bodies, headers, usage, errors."""
