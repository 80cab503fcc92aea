"""What root may do for an owner: closed requests, checks, and the few things that are done."""
