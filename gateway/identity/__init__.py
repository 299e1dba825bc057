"""Who is calling: issuers' tokens, session tokens, and the slots that SDKs put them in."""
