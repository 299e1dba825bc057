"""The judge: may this principal make this call?

A policy set is compiled from YAML files once. `decide` answers one question with a `Decision`:
deny wins over require, require over allow, and where nothing allows, the answer is no. The order
of rules and files never matters. A rule that fails while it is evaluated never lets a call pass.
"""
