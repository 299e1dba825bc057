"""Custody: a provider key is plaintext in two moments only, at deposit and at use.

When a session opens, each key is sealed under a key derived from the session secret S, which goes
to the caller inside the session token and is not kept here. Neither half is a key: the record
without S opens nothing, and S without the record opens nothing. Closing a session destroys the
record, and with it the key, whatever the caller still holds. At use the key is unsealed straight
into a slot of a region made for secrets, sent from there, and wiped.
"""
