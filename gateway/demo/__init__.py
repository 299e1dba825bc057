"""`veklom demo`: a whole gateway on loopback, told to the person who watches."""
