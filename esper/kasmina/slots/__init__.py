"""What a slot is and computes."""
