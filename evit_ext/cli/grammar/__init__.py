"""What the commands take: nothing slow is imported, so that mistakes are told at once."""
